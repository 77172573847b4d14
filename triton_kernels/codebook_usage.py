"""codebook_usage: counts[s,k] = number of n with indices[s,n] == k.

    program (stripe, s):  BLOCKS blocks of row s --> histogram in registers and shared memory --> one atomic add a bin
    K above BINS:         --> an atomic add of every index; those equal to their block's first are added up before

Work and bytes: one read of the indices, 8 S N bytes: memory bound. Expected limit: without a histogram, atomics on one
bin where the codebook has nearly collapsed onto several codes.
Determinism: integer sums, any order is the same.
Indices < 0 and >= K are skipped: the host would have to wait for the device to report one.
Run in Triton's interpreter only; tuning is open.
"""

import torch
import triton
import triton.language as tl

from .inductor import visible
from .tuning import config

MAX_BINS = 2048  # of a histogram


@triton.jit(do_not_specialize=["stripes"])  # N by 16 or not: two variants, one with 128-bit loads
def _codebook_usage_kernel(
    indices, counts, N, stripes, K, BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # one dimension: the others end at 65535
    s = program // stripes
    start = program % stripes * (BLOCK * BLOCKS)
    indices += s * N
    counts += s * K
    bins = tl.zeros([BINS], dtype=tl.int32)
    for step in range(BLOCKS):
        n = start + step * BLOCK + tl.arange(0, BLOCK)
        k = tl.load(indices + n, mask=n < N, other=-1)
        valid = (k >= 0) & (k < K)
        k = tl.where(valid, k, 0)
        if BINS > 1:
            bins += tl.histogram(k.to(tl.int32), BINS, mask=valid)
        else:
            leader = tl.max(tl.where(n == start + step * BLOCK, tl.where(valid, k, -1), -1), 0)
            same = valid & (k == leader)
            tl.atomic_add(counts + k, tl.full([BLOCK], 1, tl.int64), mask=valid & (k != leader), sem="relaxed")
            tl.atomic_add(counts + leader, tl.sum(same.to(tl.int64), 0), mask=leader >= 0, sem="relaxed")
    if BINS > 1:
        k = tl.arange(0, BINS)
        tl.atomic_add(counts + k, bins.to(tl.int64), mask=(k < K) & (bins > 0), sem="relaxed")


def codebook_usage(indices: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """indices int64 [S,N] -> counts int64 [S,K]."""
    indices = indices.contiguous()
    S, N = indices.shape
    counts = torch.zeros(S, codebook_size, dtype=torch.int64, device=indices.device)
    if S and N:
        bins = max(32, triton.next_power_of_2(codebook_size)) if codebook_size <= MAX_BINS else 1
        tuned = config("codebook_usage", f"K{bins}")
        stripes = triton.cdiv(N, tuned["BLOCK"] * tuned["BLOCKS"])
        visible(_codebook_usage_kernel)[S * stripes,](indices, counts, N, stripes, codebook_size, bins, **tuned)
    return counts
