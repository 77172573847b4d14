"""Sum of the vectors assigned to each codeword, for EMA updates and k-means."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import pick
from . import checks


def codeword_sums(z: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Deterministic: the same bits for any number of threads and on every run.

    Args:
        z: ``[N, D]``, or ``[H, N, D]`` for separate heads.
        indices: integers ``[N]`` or ``[H, N]``; negative ones are skipped.
        codebook_size: K.

    Returns:
        ``sums`` ``[K, D]`` (``[H, K, D]``), float32 (float64 for float64 input), added in float64; ``counts`` int64
        ``[K]`` (``[H, K]``).

    Raises:
        RuntimeError: an index >= codebook_size (on a GPU Triton kernels skip it instead of synchronising).
        TypeError, ValueError: dtypes or shapes that do not fit.
    """
    op = "codeword_sums"
    checks.floating(op, "z", z)
    checks.integer(op, "indices", indices)
    checks.positive(op, "codebook_size", codebook_size)
    if z.dim() not in (2, 3) or indices.shape != z.shape[:-1] or z.shape[-1] == 0:
        raise ValueError(
            f"{op}: z is {tuple(z.shape)} and indices {tuple(indices.shape)}; "
            f"expected [N, D] with [N], or [H, N, D] with [H, N]"
        )
    if indices.device != z.device:
        raise ValueError(f"{op}: z is on {z.device} and indices on {indices.device}; move one with .to()")
    heads = z if z.dim() == 3 else z.unsqueeze(0)
    sums, counts = pick(op, z.device)(heads.detach(), indices.long().reshape(heads.shape[:2]), codebook_size)
    return (sums, counts) if z.dim() == 3 else (sums[0], counts[0])
