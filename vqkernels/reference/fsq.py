"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .nearest_codeword import accumulate_dtype

EPS = 1e-3  # keeps the outermost levels reachable: tanh never attains +-1


LARGEST = 1024  # levels up to which values are compared with thresholds instead of evaluating tanh


def bounds(levels: list[int]) -> list[tuple[float, float, float, int]]:
    """Per feature: half range, offset (1/2 for an even number of levels), shift, half width."""
    result = []
    for count in levels:
        half, offset = (count - 1) * (1 + EPS) / 2, 0.0 if count % 2 else 0.5
        result.append((half, offset, math.atanh(offset / half), count // 2))
    return result


def _digits(x: Tensor, count: int) -> Tensor:
    """Level 0 .. count - 1 of every value of x, float64 [N]. tanh is monotonic: the level is the number of
    thresholds that x has passed, which every backend can decide exactly."""
    (half, offset, shift, width) = bounds([count])[0]
    if count > LARGEST:
        return ((half * (x + shift).tanh() - offset).round() + width).clamp(0, count - 1)
    steps = [math.atanh((v - width - 0.5 + offset) / half) - shift for v in range(1, count)]
    return (x.unsqueeze(-1) >= torch.tensor(steps, dtype=x.dtype, device=x.device)).sum(-1).to(x.dtype)


def fsq(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    """z [N,d] -> round(half tanh(z + shift) - offset) / (L // 2), in [-1, 1], and the codebook indices int32 [N] (first
    feature fastest; -1 where a value is NaN)."""
    x, dtype = z.double(), accumulate_dtype(z)
    digits = torch.stack([_digits(x[:, j], count) for j, count in enumerate(levels)], -1)
    width = torch.tensor([count // 2 for count in levels], dtype=dtype, device=z.device)
    basis = torch.tensor([math.prod(levels[:j]) for j in range(len(levels))], device=z.device)
    value = (digits.nan_to_num(0.0).to(dtype) - width) / width
    value = torch.where(z.isnan(), torch.nan, value).to(z.dtype)
    index = (digits.nan_to_num(0.0).long() * basis).sum(-1)
    return value, torch.where(z.isnan().any(-1), -1, index).to(torch.int32)


def fsq_backward(z: Tensor, grad: Tensor, levels: list[int]) -> Tensor:
    """Straight through the rounding: grad * half / cosh^2(z + shift) / (L // 2); 1/cosh^2 keeps its digits where 1 -
    tanh^2 cancels."""
    x = z.to(accumulate_dtype(z))
    # in Python floats first: atanh near 1 loses most digits in float32
    half, _, shift, width = (torch.tensor(v, dtype=x.dtype, device=z.device) for v in zip(*bounds(levels), strict=True))
    return (grad.to(x.dtype) * half / (x + shift).cosh().square() / width).to(z.dtype)
