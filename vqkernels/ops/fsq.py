"""Finite scalar quantization."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import pick
from . import checks
from .autograd import Function


class FsqFn(Function):
    @staticmethod
    def forward(z, levels):
        return pick("fsq", z.device)(z, levels)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, ctx.levels = inputs
        ctx.save_for_backward(z)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        (z,) = ctx.saved_tensors
        return pick("fsq_backward", z.device)(z, grad, ctx.levels), None


def _levels(op: str, z: Tensor, levels: Sequence[int]) -> list[int]:
    checks.floating(op, "z" if op == "fsq" else "y", z)
    levels = [int(v) for v in levels]
    if not levels or min(levels) < 2:
        raise ValueError(f"{op}: levels={levels}; a non-empty list of integers >= 2 is expected")
    if math.prod(levels) >= 2**31:
        raise ValueError(
            f"{op}: levels={levels} multiply to {math.prod(levels)} codes, more than an int32 index holds (2147483647)"
        )
    if z.dim() < 1 or z.shape[-1] != len(levels):
        raise ValueError(
            f"{op}: the last dimension of {tuple(z.shape)} must be the number of levels, {len(levels)} ({levels})"
        )
    return levels


def fsq(z: Tensor, levels: Sequence[int], *, return_indices: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Bounds each feature by tanh and rounds it to one of its levels; straight-through gradient of the rounding.

    Args:
        z: ``[..., d]``, d = len(levels).
        levels: number of values per feature, each >= 2; their product is the codebook size, below 2^31.
        return_indices: also return the codebook index of every vector, found in the same pass.

    Returns:
        ``[..., d]`` in [-1, 1]: multiples of 1/(L//2); an even L has one value more on the negative side. The level is
        exact: it is decided by comparing with thresholds, not by rounding a tanh. With ``return_indices`` also int32
        ``[...]``, first feature fastest, -1 where a value is NaN.

    Raises:
        ValueError: levels do not fit z or multiply beyond int32.

    Source: Mentzer et al. 2023 (arXiv 2309.15505).
    """
    levels = _levels("fsq", z, levels)
    quantized, indices = FsqFn.apply(z.reshape(-1, len(levels)), levels)
    quantized = quantized.reshape(z.shape)
    return (quantized, indices.reshape(z.shape[:-1])) if return_indices else quantized


def fsq_indices(y: Tensor, levels: Sequence[int]) -> Tensor:
    """The codebook index int64 ``[...]`` of quantized values ``y`` ``[..., d]`` as :func:`fsq` returns them (first
    feature fastest).
    Rows with a non-finite value get -1."""
    levels = _levels("fsq_indices", y, levels)
    width = torch.tensor([v // 2 for v in levels], device=y.device)
    basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], device=y.device)
    finite = y.isfinite().all(-1)
    digit = (y.double().nan_to_num(0.0, 0.0, 0.0) * width).round().long() + width
    return torch.where(finite, (digit * basis).sum(-1), -1)
