"""Vector and residual quantization: search, lookup, losses and gradient estimator in one forward and one backward
pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import pick
from ..registry import ESTIMATORS, METRICS
from . import checks
from .autograd import Function


class Quantized(NamedTuple):
    """Result of :func:`vector_quantize` (losses are scalars) and :func:`residual_quantize` (losses are ``[Q]``)."""

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor


class ResidualQuantizeFn(Function):
    """z [H,N,D], codebooks Q x [H,K_l,D]. The gradient of the losses is fused into the estimator's backward pass."""

    @staticmethod
    def forward(*args):
        # where no gradient is wanted, torch.compile hands a context in, too: it counts the named parameters
        z, mask, metric, _, _, beta, *codebooks = args if isinstance(args[0], Tensor) else args[1:]
        indices, quantized, losses, valid = pick("residual_quantize", z.device)(z, list(codebooks), mask, metric)
        return quantized, indices, losses * beta, losses.clone(), valid

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, _, _, estimator, per_level, beta, *codebooks = inputs
        _, indices, _, _, valid = output
        ctx.save_for_backward(z, indices, valid, *codebooks)
        ctx.mark_non_differentiable(indices, valid)
        ctx.estimator, ctx.per_level, ctx.beta = estimator, per_level, beta

    @staticmethod
    def backward(ctx, grad, _, grad_commitment, grad_codebook, __):
        z, indices, valid, *codebooks = ctx.saved_tensors
        scale = 2.0 / (valid.clamp(min=1) * z.shape[-1]).to(grad_commitment.dtype)
        dz = None
        if ctx.needs_input_grad[0]:
            dz = pick("residual_quantize_backward", z.device)(
                z, codebooks, indices, grad, grad_commitment * (ctx.beta * scale), ctx.estimator, ctx.per_level
            )
        return dz, None, None, None, None, None, *_codebook_grads(ctx, z, indices, codebooks, grad_codebook * scale)


def _codebook_grads(ctx, z, indices, codebooks, scale):
    """d codebook_loss / d c_k = scale (count_k c_k - sum of the residuals assigned to k), level by level."""
    grads: list[Tensor | None] = [None] * len(codebooks)
    wanted = [i for i, need in enumerate(ctx.needs_input_grad[6:]) if need]
    if not wanted:
        return grads
    residual = z.to(scale.dtype)
    for level, codebook in enumerate(codebooks[: wanted[-1] + 1]):
        if level in wanted:
            sums, counts = pick("codeword_sums", z.device)(residual, indices[..., level], codebook.shape[1])
            grad = torch.addcmul(sums * -scale[level], codebook, scale[level] * counts.unsqueeze(-1))
            grads[level] = grad.to(codebook.dtype)
        if level < wanted[-1]:
            flat = indices[..., level].clamp(min=0).unsqueeze(-1).expand(-1, -1, z.shape[-1])
            residual = residual - codebook.gather(1, flat)
    return grads


def _quantize(op, z, codebooks, estimator, beta, metric, mask, per_level) -> Quantized:
    if not codebooks:
        raise ValueError(f"{op}: codebooks is empty; at least one level is needed")
    heads = codebooks[0].shape[0] if isinstance(codebooks[0], Tensor) and codebooks[0].dim() == 3 else None
    for level, codebook in enumerate(codebooks):
        name = "codebook" if op == "vector_quantize" else f"codebooks[{level}]"
        checks.vectors_and_codebook(op, z, codebook, name)
        if (codebook.shape[0] if codebook.dim() == 3 else None) != heads:
            raise ValueError(
                f"{op}: {name} is {tuple(codebook.shape)}, codebooks[0] is {tuple(codebooks[0].shape)}: heads differ"
            )
    checks.row_mask(op, mask, z.shape[:-1], z.device)
    estimator_id = checks.choice(op, "estimator", estimator, ESTIMATORS)
    metric_id = checks.choice(op, "metric", metric, METRICS)
    H, D = heads or 1, z.shape[-1]
    quantized, indices, commitment, codebook_loss, _ = ResidualQuantizeFn.apply(
        z.reshape(H, -1, D),
        None if mask is None else mask.reshape(H, -1),
        metric_id,
        estimator_id,
        per_level,
        float(beta),
        *(c.reshape(H, -1, D) for c in codebooks),
    )
    return Quantized(
        quantized.reshape(z.shape), indices.reshape(*z.shape[:-1], len(codebooks)), commitment, codebook_loss
    )


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    estimator: str = "rotation",
    beta: float = 0.25,
    metric: str = "l2",
    mask: Tensor | None = None,
) -> Quantized:
    """Replaces every vector by its nearest codeword; gradients pass through the choice by the estimator.

    Args:
        z: ``[..., D]``; float32, float64, bfloat16 or float16.
        codebook: ``[K, D]``, or ``[H, K, D]`` with z ``[H, ..., D]``.
        estimator: gradient from quantized to z: ``"rotation"`` (the rotation trick, arXiv 2410.06424),
            ``"reflection"`` or ``"ste"`` (straight-through). The codebook gets its gradient from ``codebook_loss``
            alone.
        beta: weight of the commitment loss.
        metric: ``"l2"``, ``"cosine"`` or ``"dot"``, as in :func:`nearest_codeword`.
        mask: bool ``[...]``; False rows get index -1, quantized 0, no loss and no gradient.

    Returns:
        ``quantized`` ``[..., D]`` (the codewords, bit for bit), ``indices`` int64 ``[...]``, and two scalars, averaged
        over valid rows and features: ``commitment_loss`` = beta mean (z - sg(c))^2 and ``codebook_loss`` = mean (sg(z)
        - c)^2.
        Rows with a non-finite value get index -1, a NaN quantized row, and take no part in losses or gradients.

    Raises:
        TypeError, ValueError: as :func:`nearest_codeword`.
    """
    out = _quantize("vector_quantize", z, [codebook], estimator, beta, metric, mask, False)
    return Quantized(
        out.quantized, out.indices.squeeze(-1), out.commitment_loss.squeeze(0), out.codebook_loss.squeeze(0)
    )


def residual_quantize(
    z: Tensor,
    codebooks: Tensor | Sequence[Tensor],
    estimator: str = "rotation",
    beta: float = 0.25,
    metric: str = "l2",
    mask: Tensor | None = None,
    *,
    per_level: bool = False,
) -> Quantized:
    """Quantizes z, then what is left of it, level after level: quantized = c_1 + ... + c_Q.

    Args:
        z: ``[..., D]``.
        codebooks: ``[Q, K, D]``, or a sequence of Q tensors ``[K_l, D]`` (or ``[H, K_l, D]`` with z ``[H, ..., D]``).
        estimator, beta, metric, mask: as in :func:`vector_quantize`. The estimator acts between z and the sum.
        per_level: let the gradient be the sum of the levels' own estimators, each between the level's residual and its
            codeword, instead.

    Returns:
        ``quantized`` ``[..., D]``, ``indices`` int64 ``[..., Q]``, ``commitment_loss`` ``[Q]``, ``codebook_loss``
        ``[Q]``. Residuals are
        subtracted in float32 (float64 for float64), so all levels are the same on every backend.

    Raises:
        TypeError, ValueError: as :func:`nearest_codeword`.

    Source: Zeghidour et al. 2021 (arXiv 2107.03312), Lee et al. 2022 (arXiv 2203.01941).
    """
    if isinstance(codebooks, Tensor):
        if codebooks.dim() != 3:
            raise ValueError(
                f"residual_quantize: codebooks is {tuple(codebooks.shape)}; expected [Q, K, D] or a list of [K, D]"
            )
        codebooks = codebooks.unbind(0)
    return _quantize("residual_quantize", z, list(codebooks), estimator, beta, metric, mask, per_level)
