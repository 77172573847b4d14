"""Gradient estimators through the codeword choice: straight-through, rotation trick, reflection (docs/numerics.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .nearest_codeword import accumulate_dtype

STE, ROTATION, REFLECTION = 0, 1, 2
NORM_RATIO = 1e6  # |q|/|z| outside [1/NORM_RATIO, NORM_RATIO]: straight-through
SINGULAR = 1e-6  # |z^ + q^|^2 (rotation) or |z^ - q^|^2 (reflection) below this: straight-through


def estimator_backward(z: Tensor, q: Tensor, grad: Tensor, estimator: int) -> Tensor:
    """All [...,D], one dtype. Transposed Jacobian of the estimator of z -> q, applied to grad, in float64."""
    if estimator == STE:
        return grad.clone()
    z64, q64, g = z.double(), q.double(), grad.double()
    nz, nq = z64.norm(dim=-1, keepdim=True), q64.norm(dim=-1, keepdim=True)
    ratio = nq / nz
    zh, qh = z64 / nz, q64 / nq
    axis = zh + qh if estimator == ROTATION else zh - qh
    length2 = axis.square().sum(-1, keepdim=True)
    rotated = g - 2 * axis * (axis * g).sum(-1, keepdim=True) / length2
    if estimator == ROTATION:
        rotated = rotated + 2 * zh * (qh * g).sum(-1, keepdim=True)
    regular = (nz > 0) & (nq > 0) & (ratio >= 1 / NORM_RATIO) & (ratio <= NORM_RATIO) & (length2 >= SINGULAR)
    return torch.where(regular, ratio * rotated, g).to(grad.dtype)


def rotation_trick_backward(z: Tensor, q: Tensor, grad: Tensor, estimator: int) -> Tensor:
    """z, q, grad [N,D] -> dz [N,D]."""
    dtype = accumulate_dtype(z)
    return estimator_backward(z.to(dtype), q.to(dtype), grad.to(dtype), estimator).to(z.dtype)
