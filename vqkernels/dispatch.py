"""Which overload of an operator serves a call: device x forced backend. Traceable; the environment is read once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch

from ._ops import INTERPRETED
from .reference import onnx
from .registry import AVAILABLE, BACKENDS, SPECS
from .triton_kernels import tuning

# where `vqkernels tune` has not measured: only CPU speeds have been so far
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_OVERLOAD = {"reference": "reference", "triton": "triton", "cpu": "default", "cuda": "default"}
# the reference runs anywhere; Triton's interpreter also on CPU tensors
_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "cpu") if INTERPRETED else ("cuda",)}

# One global for the whole process, not a context variable: backward passes run in autograd's own threads.
_forced: str | None = None
_warned: set[tuple[str, str]] = set()


def backends() -> dict[str, dict[str, bool | str]]:
    """``{op: {backend: True, or the reason it cannot run}}`` for every operator and backend."""
    return {op: dict(row) for op, row in AVAILABLE.items()}


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
    measured = _measured(name) if kind == "cuda" else ()
    preference = measured or _PREFERENCE.get(kind, ("reference",))
    for backend in preference:
        if row[backend] is True:
            if backend == "reference" and not measured and not torch.compiler.is_compiling():
                _say_slow(name, kind, preference)
            return getattr(SPECS[name].op, _OVERLOAD[backend])
    raise RuntimeError(f"{name}: no backend serves {kind} tensors: {row}")


@torch.compiler.assume_constant_result  # read from a file once; a traced graph takes the answer as it is
def _measured(name: str) -> tuple[str, ...]:
    return tuning.preference(name)


def _say_slow(name: str, kind: str, preference: tuple[str, ...]) -> None:
    """One warning per operator and device that the plain PyTorch reference serves it although kernels could exist."""
    kernels = [b for b in preference if b != "reference"]
    if (name, kind) in _warned or (kernels and not set(kernels) & set(SPECS[name].compiled)):
        return
    _warned.add((name, kind))
    reasons = "; ".join(f"{b}: {AVAILABLE[name][b]}" for b in kernels) or f"no kernels for {kind} devices"
    warnings.warn(f"vqkernels: {name} runs on the slow reference backend on {kind} ({reasons})", stacklevel=4)


if os.environ.get("VQK_BACKEND"):
    _forced = _checked(os.environ["VQK_BACKEND"], "VQK_BACKEND")
