"""Which overload of an operator serves a call: device x forced backend. Traceable; the environment is read once."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch

from ._ops import INTERPRETED
from .reference import onnx
from .registry import AVAILABLE, BACKENDS, SPECS
from .triton_kernels import tuning

# What serves tensors on a device, the first that can. On a GPU the order that `vqkernels tune` measured there counts
# instead; this one has not been timed. CUDA C++ goes first: it compiles nothing at the first call.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# Compute capabilities with matrix instructions of their own (wgmma, tcgen05), which Triton's searches use; those in
# CUDA C++ keep to mma.sync, which these chips run below their full rate.
_TRITON_FIRST = {9: ("nearest_codeword", "residual_quantize"), 10: ("nearest_codeword", "residual_quantize")}
_OVERLOAD = {"reference": "reference", "triton": "triton", "cpu": "default", "cuda": "default"}
# the reference runs anywhere; Triton's interpreter also on CPU tensors
_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "cpu") if INTERPRETED else ("cuda",)}

# One global for the whole process, not a context variable: backward passes run in autograd's own threads.
_forced: str | None = None
_warned: set[tuple[str, str]] = set()


def backends() -> dict[str, dict[str, bool | str]]:
    """``{op: {backend: True, or the reason it cannot run}}`` for every operator and backend: the reference, the CPU's,
    then the GPU's in the order in which tensors on this process's GPU look for one."""
    kernels = {op: [name for name in gpu_order(op)[0] if name != "reference"] for op in AVAILABLE}
    return {
        op: {name: row[name] for name in dict.fromkeys(("reference", "cpu", *kernels[op], *BACKENDS))}
        for op, row in AVAILABLE.items()
    }


@torch.compiler.assume_constant_result  # read from a file once; a traced graph takes the answer as it is
def gpu_order(op: str) -> tuple[tuple[str, ...], bool]:
    """The backends that tensors on this process's GPU look for, first choice first; whether that was measured there."""
    if measured := tuning.preference(op):
        return measured, True
    first = ("triton",) if op in _TRITON_FIRST.get(_generation(), ()) else ()
    return tuple(dict.fromkeys((*first, *_PREFERENCE["cuda"]))), False


@functools.cache
def _generation() -> int | None:
    """The first number of the compute capability; None without an NVIDIA GPU."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() and torch.version.cuda else None


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: unknown backend {name!r}; allowed: {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str):
    """Forces every operator called inside onto one backend: "reference", "cpu", "cuda" or "triton".

    Process-wide while it is active. An operator that the backend cannot run raises with the reason; nothing falls
    back. An unknown name raises ValueError.
    """
    global _forced
    previous, _forced = _forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = previous


def pick(name: str, device: torch.device) -> Callable:
    """The overload of raw operator ``name`` that serves tensors on ``device``, or plain torch operations while an ONNX
    model is made; RuntimeError with every backend's reason where none can."""
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        if name not in onnx.OPS:
            raise RuntimeError(f"{name}: ONNX has no such operator; export the layer in evaluation mode: layer.eval()")
        return onnx.OPS[name]
    kind = device.type
    row = AVAILABLE[name]
    if _forced is not None:
        if row[_forced] is not True:
            raise RuntimeError(f"{name}: backend {_forced!r} was asked for and cannot run: {row[_forced]}")
        runs_on = _DEVICES.get(_forced, (kind,))
        if kind not in runs_on:
            raise RuntimeError(
                f"{name}: backend {_forced!r} serves {' and '.join(runs_on)} tensors, the input is on {kind};"
                " move it with .to(), or choose another backend"
            )
        return getattr(SPECS[name].op, _OVERLOAD[_forced])
    order, measured = gpu_order(name) if kind == "cuda" else (_PREFERENCE.get(kind, ("reference",)), False)
    for backend in order:
        if row[backend] is True:
            if backend == "reference" and not measured and not torch.compiler.is_compiling():
                _say_slow(name, kind, order)
            return getattr(SPECS[name].op, _OVERLOAD[backend])
    raise RuntimeError(f"{name}: no backend serves {kind} tensors: {row}")


def _say_slow(name: str, kind: str, order: tuple[str, ...]) -> None:
    """One warning per operator and device that the plain PyTorch reference serves it although kernels could exist."""
    kernels = [b for b in order if b != "reference"]
    if (name, kind) in _warned or (kernels and not set(kernels) & set(SPECS[name].compiled)):
        return
    _warned.add((name, kind))
    reasons = "; ".join(f"{b}: {AVAILABLE[name][b]}" for b in kernels) or f"no kernels for {kind} devices"
    warnings.warn(f"vqkernels: {name} runs on the slow reference backend on {kind} ({reasons})", stacklevel=4)


if os.environ.get("VQK_BACKEND"):
    _forced = _checked(os.environ["VQK_BACKEND"], "VQK_BACKEND")
