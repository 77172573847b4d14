"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .nearest_codeword import accumulate_dtype

EPS = 1e-3  # keeps the outermost levels reachable: tanh never attains +-1


def _bound(z: Tensor, levels: list[int]) -> list[Tensor]:
    """Per feature, all [d]: half range, offset (1/2 for an even number of levels), shift, half width. In Python floats
    first: atanh
    near 1 loses most digits in float32."""
    half = [(count - 1) * (1 + EPS) / 2 for count in levels]
    offset = [0.0 if count % 2 else 0.5 for count in levels]
    shift = [math.atanh(o / h) for o, h in zip(offset, half, strict=True)]
    width = [count // 2 for count in levels]
    return [torch.tensor(values, dtype=z.dtype, device=z.device) for values in (half, offset, shift, width)]


def fsq(z: Tensor, levels: list[int]) -> Tensor:
    """z [N,d] -> round(half tanh(z + shift) - offset) / (L // 2), in [-1, 1]."""
    x = z.to(accumulate_dtype(z))
    half, offset, shift, width = _bound(x, levels)
    return ((half * (x + shift).tanh() - offset).round() / width).to(z.dtype)


def fsq_backward(z: Tensor, grad: Tensor, levels: list[int]) -> Tensor:
    """Straight through the rounding: grad * half / cosh^2(z + shift) / (L // 2); 1/cosh^2 keeps its digits where 1 -
    tanh^2 cancels."""
    x = z.to(accumulate_dtype(z))
    half, _, shift, width = _bound(x, levels)
    return (grad.to(x.dtype) * half / (x + shift).cosh().square() / width).to(z.dtype)
