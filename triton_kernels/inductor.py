"""What torch.compile sees of a launcher: a custom operator is opaque to it, unless the launcher is traced in its place.

Traced are the operators in SEEN_THROUGH: their launchers are a few torch operations around one or two launches, which
inductor then fuses with the neighbours, plans memory for, and calls without Python. The others stay opaque: fsq keeps
its tables on the device between calls, and the searches choose among several ways by what they are given.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

SEEN_THROUGH = ("codebook_usage", "codeword_sums", "rotation_trick_backward", "trie_topk")
_tracing: ContextVar[bool] = ContextVar("tracing", default=False)


@contextlib.contextmanager
def _traced():
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


def visible(kernel):
    """``visible(kernel)[grid](...)``: the launch, which stands in the graph while its launcher is traced."""
    return torch.library.wrap_triton(kernel) if _tracing.get() else kernel


def see_through(lib, op: torch._ops.OpOverload, launcher) -> None:
    """AOTAutograd traces ``launcher`` in place of ``op``; torch.export keeps the operator, which serialises."""

    def decompose(mode, op, types, args, kwargs):
        from torch.export._trace import custom_triton_ops_decomposition_disabled  # as torch.library.triton_op does

        if custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode, _traced():
            return launcher(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(op, FunctionalTensorMode, decompose, lib=lib)
