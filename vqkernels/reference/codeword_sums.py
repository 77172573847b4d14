"""Sum of the vectors assigned to each codeword."""

from __future__ import annotations

import torch
from torch import Tensor

from .codebook_usage import check_range, codebook_usage
from .nearest_codeword import accumulate_dtype


def codeword_sums(z: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """z [H,N,D], indices [H,N] -> sums [H,K,D] (added in float64, rounded once), counts int64 [H,K]."""
    check_range("codeword_sums", indices, codebook_size)
    H, _, D = z.shape
    sums = torch.zeros(H, codebook_size, D, dtype=torch.float64, device=z.device)
    for h in range(H):
        rows = indices[h] >= 0
        # index_put with accumulate is deterministic where index_add is not (CUDA), and adds in row order on CPU
        sums[h].index_put_((indices[h][rows],), z[h][rows].double(), accumulate=True)
    return sums.to(accumulate_dtype(z)), codebook_usage(indices, codebook_size)
