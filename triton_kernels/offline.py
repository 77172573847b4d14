"""Launching on a machine without a GPU: Triton's own JIT compiles for a chosen chip, and nothing is executed.

    with compiled_for("sm_90") as launches:
        codebook_usage(indices, 1024)                   # an ordinary launcher, on CPU or meta tensors
    launches[0].compiled.asm["ptx"], launches[0].grid

A stub takes the driver's place, so specialisation (divisibility by 16, alignment of pointers), defaults, heuristics and
the compiler are the ones that a user's launch goes through. What a launcher computes with torch itself is computed on
the tensors it was given; the outputs of its kernels stay as torch.empty left them, unless ``execute`` fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 89, 90, 100, 120)}
TARGETS |= {"gfx942": GPUTarget("hip", "gfx942", 64)}


@dataclass(frozen=True)
class Launch:
    """One launch: ``compiled`` is triton's CompiledKernel (asm, metadata); ``arguments`` maps every parameter of the
    kernel, constexprs too, to its value, and ``signature`` to its type ("*fp32", "i32", "constexpr", ...)."""

    name: str
    grid: tuple[int, int, int]
    compiled: Any
    arguments: dict[str, Any]
    signature: dict[str, str]


class _StubDriver(DriverBase):
    """As much of a driver as compiling needs. The device's number is the target's name: JIT functions keep one cache
    per device, so targets do not mix and a second context compiles nothing again."""

    def __init__(self, name: str):
        self.name, self.target = name, TARGETS[name]

    @staticmethod
    def is_active():
        return False

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.name

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_benchmarker(self):
        raise RuntimeError("an autotuner wants to measure and there is no GPU; configs come from tuning.config")


@contextmanager
def compiled_for(target: str, execute: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Inside, launches of @triton.jit kernels compile for ``target`` (one of TARGETS) and are collected in the list
    that it yields. ``execute`` is called with each launch, in order, in place of the GPU."""
    if target not in TARGETS:
        raise ValueError(f"compiled_for: unknown target {target!r}; there are: {', '.join(TARGETS)}")
    if not isinstance(triton.jit(_probe), JITFunction):
        raise RuntimeError("compiled_for: TRITON_INTERPRET is set, so nothing is compiled; unset it and start again")
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if warmup:
            return compiled
        bound = self.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in self.arg_names})
        bound.apply_defaults()
        sizes = tuple(grid(bound.arguments) if callable(grid) else grid)
        launch = Launch(
            self.fn.__name__, sizes + (1,) * (3 - len(sizes)), compiled, dict(bound.arguments), compiled.src.signature
        )
        launches.append(launch)
        if execute is not None:
            execute(launch)
        return compiled

    config = triton.runtime.driver
    before = config._active
    config.set_active(_StubDriver(target))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run
        config.set_active(before)


def _probe():
    pass
