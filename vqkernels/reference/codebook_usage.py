"""Histogram of codebook indices."""

from __future__ import annotations

import torch
from torch import Tensor


def check_range(op: str, indices: Tensor, codebook_size: int) -> None:
    """Raises where an index is >= codebook_size. Synchronises with the device; compiled kernels check as they count."""
    if indices.numel() and (bad := int(indices.max())) >= codebook_size:
        raise RuntimeError(
            f"{op}: index {bad} is out of range for codebook_size {codebook_size}; "
            f"allowed: -1 (skipped) .. {codebook_size - 1}"
        )


def codebook_usage(indices: Tensor, codebook_size: int) -> Tensor:
    """indices [S,N] -> counts int64 [S,K]; negative indices are skipped."""
    check_range("codebook_usage", indices, codebook_size)
    counts = torch.zeros(indices.shape[0], codebook_size + 1, dtype=torch.int64, device=indices.device)
    slot = torch.where(indices < 0, codebook_size, indices)  # skipped indices fall into a last slot, cut off below
    counts.scatter_add_(1, slot, torch.ones_like(slot))
    return counts[:, :codebook_size].contiguous()
