"""Gradient through the codeword choice for a codeword that is already there."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import pick
from ..registry import ESTIMATORS
from . import checks
from .autograd import Function


class RotationTrickFn(Function):
    """Value q, gradient to z."""

    @staticmethod
    def forward(z, q, estimator):
        return q.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, q, estimator = inputs
        ctx.save_for_backward(z, q)
        ctx.estimator = estimator

    @staticmethod
    def backward(ctx, grad):
        z, q = ctx.saved_tensors
        return pick("rotation_trick_backward", z.device)(z, q, grad, ctx.estimator), None, None


def rotation_trick(z: Tensor, q: Tensor, kind: str = "rotation") -> Tensor:
    """Returns q bit for bit; the gradient goes to z through the rotation and scaling that carry z onto q.

    Args:
        z: encoder output ``[..., D]``.
        q: its codewords, same shape, dtype and device. No gradient goes to q.
        kind: ``"rotation"``: dz = (|q|/|z|) R^T g with R the rotation in the plane of z and q; ``"reflection"``: R the
            Householder reflection that maps z onto q; ``"ste"``: dz = g.

    Rows where the map is singular (a zero vector, z opposite to q, norms a factor 1e6 apart) fall back to
    straight-through; docs/numerics.md gives the thresholds.

    Raises:
        TypeError, ValueError: dtype, device or shape of z and q differ, unknown kind.

    Source: Fifty et al. 2024 (arXiv 2410.06424).
    """
    op = "rotation_trick"
    checks.floating(op, "z", z)
    checks.floating(op, "q", q)
    checks.same(op, "z", z, "q", q)
    if z.shape != q.shape or z.dim() < 1:
        raise ValueError(
            f"{op}: z is {tuple(z.shape)} and q is {tuple(q.shape)}; both must be [..., D] of the same shape"
        )
    estimator = checks.choice(op, "kind", kind, ESTIMATORS)
    if z.shape[-1] == 0:
        raise ValueError(f"{op}: z is {tuple(z.shape)}; it needs at least one feature")
    D = z.shape[-1]
    return RotationTrickFn.apply(z.reshape(-1, D), q.detach().reshape(-1, D), estimator).reshape(z.shape)
