"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505)."""

from __future__ import annotations

import torch
from torch import Tensor

from .nearest_codeword import accumulate_dtype

EPS = 1e-3  # keeps the outermost levels reachable: tanh never attains +-1


def _bound(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per feature: half range, offset (1/2 for an even number of levels), shift, half width; all [d]."""
    count = torch.tensor(levels, dtype=z.dtype, device=z.device)
    half = (count - 1) * (1 + EPS) / 2
    offset = torch.where(count % 2 == 0, 0.5, 0.0).to(z.dtype)
    return half, offset, (offset / half).atanh(), torch.div(count, 2, rounding_mode="floor")


def fsq(z: Tensor, levels: list[int]) -> Tensor:
    """z [N,d] -> round(half tanh(z + shift) - offset) / (L // 2), in [-1, 1]."""
    x = z.to(accumulate_dtype(z))
    half, offset, shift, width = _bound(x, levels)
    return ((half * (x + shift).tanh() - offset).round() / width).to(z.dtype)


def fsq_backward(z: Tensor, grad: Tensor, levels: list[int]) -> Tensor:
    """Straight through the rounding: grad * half (1 - tanh^2(z + shift)) / (L // 2)."""
    x = z.to(accumulate_dtype(z))
    half, _, shift, width = _bound(x, levels)
    return (grad.to(x.dtype) * half * (1 - (x + shift).tanh().square()) / width).to(z.dtype)
