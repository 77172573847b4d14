"""The canonical nearest codeword (docs/numerics.md): float64, one feature after the other, no fused multiply-add."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

L2, COSINE, DOT = 0, 1, 2
_CHUNK = 1 << 20  # scores held at a time: memory stays O(N + chunk), never N x K


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, as IEEE 754 has it and the compiled kernels do; torch's CPU sqrt calls a vector library that
    is off by a bit."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def normalize(x: Tensor) -> Tensor:
    """l2-normalises the last dimension by the documented rule: the sum of squares is added in float64 in feature
    order; each value is divided in float64 and rounded once. Zero vectors stay zero."""
    total = torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
    for d in range(x.shape[-1]):
        total += x[..., d].double() * x[..., d].double()
    norm = _sqrt(total).unsqueeze(-1)
    return torch.where(norm > 0, x.double() / norm, 0.0).to(accumulate_dtype(x))


def canonical(z: Tensor, codebook: Tensor, metric: int) -> Tensor:
    """[N,D], [K,D] -> float64 [N,K], the value that the nearest codeword minimises."""
    if metric == COSINE:
        z, codebook = normalize(z), normalize(codebook)
    total = torch.zeros(z.shape[0], codebook.shape[0], dtype=torch.float64, device=z.device)
    z, codebook = z.double(), codebook.double()
    for d in range(z.shape[1]):
        if metric == L2:
            difference = z[:, d, None] - codebook[None, :, d]
            total += difference * difference
        else:
            total += z[:, d, None] * codebook[None, :, d]
    return total if metric == L2 else -total


def nearest_codeword(z: Tensor, codebook: Tensor, mask: Tensor | None, metric: int, certified: bool):
    """z [H,N,D], codebook [H,K,D], mask [H,N] -> indices int64 [H,N], distances [H,N] (see the op's docstring)."""
    H, N, K = z.shape[0], z.shape[1], codebook.shape[1]
    indices = torch.full((H, N), -1, dtype=torch.int64, device=z.device)
    distances = torch.full((H, N), float("nan"), dtype=accumulate_dtype(z), device=z.device)
    order = torch.arange(K, device=z.device)
    step = max(1, _CHUNK // max(K, 1))
    for h in range(H):
        usable = codebook[h].isfinite().all(-1)
        for start in range(0, N, step):
            rows = slice(start, min(start + step, N))
            score = canonical(z[h, rows], codebook[h], metric).masked_fill(~usable, float("inf"))
            best = score.amin(-1, keepdim=True)
            # ties go to the lowest index; an unusable codeword never wins
            index = torch.where((score == best) & usable, order, K).amin(-1)
            valid = (index < K) & z[h, rows].isfinite().all(-1)
            value = best.squeeze(-1) + (1.0 if metric == COSINE else 0.0)
            indices[h, rows] = torch.where(valid, index, -1)
            distances[h, rows] = torch.where(valid, value, float("nan")).to(distances.dtype)
    if mask is not None:
        indices.masked_fill_(~mask, -1)
        distances.masked_fill_(~mask, 0.0)
    return indices, distances
