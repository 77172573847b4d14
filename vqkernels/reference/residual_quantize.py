"""Residual quantization: r_0 = z, k_l = nearest(r_{l-1}), r_l = r_{l-1} - c_l, quantized = c_1 + c_2 + ..."""

from __future__ import annotations

import torch
from torch import Tensor

from .nearest_codeword import accumulate_dtype, nearest_codeword
from .rotation_trick import estimator_backward


def gather(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook [H,K,D], indices [H,N] -> codewords [H,N,D]; index -1 reads codeword 0 (the caller masks the row)."""
    return codebook.gather(1, indices.clamp(min=0).unsqueeze(-1).expand(-1, -1, codebook.shape[-1]))


def residual_quantize(z: Tensor, codebooks: list[Tensor], mask: Tensor | None, metric: int, nearest=nearest_codeword):
    """z [H,N,D], codebooks Q x [H,K_l,D] -> indices [H,N,Q], quantized [H,N,D], losses [Q], valid rows []."""
    dtype = accumulate_dtype(z)
    residual, quantized, indices, squares = z.to(dtype), None, [], []
    for codebook in codebooks:
        index, _ = nearest(residual, codebook.to(dtype), mask, metric, True)
        codeword = gather(codebook, index).to(dtype)
        residual = residual - codeword
        quantized = codeword if quantized is None else quantized + codeword
        indices.append(index)
        squares.append(residual.double().square().sum(-1))
    index = torch.stack(indices, -1)
    valid = (index >= 0).all(-1) & residual.isfinite().all(-1)
    count = valid.sum()
    total = torch.stack([torch.where(valid, s, 0.0).sum() for s in squares])
    losses = total / (count.clamp(min=1) * z.shape[-1])
    empty = torch.full((), float("nan"), dtype=dtype, device=z.device)
    outside = empty if mask is None else torch.where(mask, empty, 0.0).unsqueeze(-1)
    quantized = torch.where(valid.unsqueeze(-1), quantized, outside).to(z.dtype)
    return torch.where(valid.unsqueeze(-1), index, -1), quantized, losses.to(dtype), count


def residual_quantize_backward(
    z: Tensor,
    codebooks: list[Tensor],
    indices: Tensor,
    grad: Tensor,
    commitment_scale: Tensor,
    estimator: int,
    per_level: bool,
) -> Tensor:
    """dz [H,N,D] = J^T grad + sum_l commitment_scale[l] (r_{l-1} - c_l); 0 where the index is -1."""
    dtype = accumulate_dtype(z)
    residual, g = z.to(dtype), grad.to(dtype)
    quantized, dz = None, torch.zeros_like(residual)
    for level, codebook in enumerate(codebooks):
        codeword = gather(codebook, indices[..., level]).to(dtype)
        if per_level:
            dz = dz + estimator_backward(residual, codeword, g, estimator)
        residual = residual - codeword
        quantized = codeword if quantized is None else quantized + codeword
        dz = dz + commitment_scale[level].to(dtype) * residual
    if not per_level:
        dz = dz + estimator_backward(z.to(dtype), quantized, g, estimator)
    valid = (indices >= 0).all(-1, keepdim=True)
    return torch.where(valid, dz, 0.0).to(z.dtype)
