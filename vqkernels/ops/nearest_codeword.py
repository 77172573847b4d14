"""Nearest codeword search."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import pick
from ..registry import METRICS
from . import checks

PRECISIONS = {"exact": 1, "fast": 0}


def nearest_codeword(
    z: Tensor, codebook: Tensor, metric: str = "l2", precision: str = "exact", mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest codeword of every vector, without the N x K matrix.

    Args:
        z: vectors ``[..., D]``; float32, float64, bfloat16 or float16.
        codebook: ``[K, D]``, or ``[H, K, D]`` for one codebook per head, then z is ``[H, ..., D]``.
        metric: ``"l2"`` minimises the squared Euclidean distance; ``"cosine"`` and ``"dot"`` maximise the similarity.
        precision: ``"exact"`` returns the certified nearest codeword: the one whose distance, evaluated in float64 in
            feature order, is smallest, exact ties going to the lowest index. It is the same on every backend, SIMD
            level, thread count and batch size. ``"fast"`` skips the certification (docs/numerics.md bounds the regret).
        mask: bool ``[...]`` like z without its last dimension; False rows are skipped.

    Returns:
        ``indices`` int64 ``[...]`` and ``distances`` ``[...]`` (float32, float64 for float64 input): the squared
        distance, ``1 - similarity`` for cosine, ``-dot`` for dot. Rows with a non-finite value get index -1 and
        distance NaN, masked rows -1 and 0; a codeword with a non-finite value never wins. Neither output carries a
        gradient.

    Raises:
        TypeError, ValueError: dtypes or devices that differ, unknown names, shapes that do not fit.

    Source: the error bound is derived in docs/numerics.md.
    """
    op = "nearest_codeword"
    checks.vectors_and_codebook(op, z, codebook)
    checks.row_mask(op, mask, z.shape[:-1], z.device)
    metric_id = checks.choice(op, "metric", metric, METRICS)
    certified = bool(checks.choice(op, "precision", precision, PRECISIONS))
    heads = codebook.shape[0] if codebook.dim() == 3 else 1
    indices, distances = pick(op, z.device)(
        z.detach().reshape(heads, -1, z.shape[-1]),
        codebook.detach().reshape(heads, -1, z.shape[-1]),
        None if mask is None else mask.reshape(heads, -1),
        metric_id,
        certified,
    )
    return indices.reshape(z.shape[:-1]), distances.reshape(z.shape[:-1])
