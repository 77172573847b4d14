"""Codebook-usage statistics."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..dispatch import pick
from . import checks


class CodebookUsage(NamedTuple):
    """``counts`` int64 [..., K]; ``used`` fraction of codewords with a count; ``entropy`` in nats of the usage
    distribution; ``perplexity`` = exp(entropy), K when all codewords are used alike; ``dead`` bool [..., K]."""

    counts: Tensor
    used: Tensor
    entropy: Tensor
    perplexity: Tensor
    dead: Tensor


def codebook_usage(indices: Tensor, codebook_size: int, *, dim: int | None = None) -> CodebookUsage:
    """Counts how often each codeword is used.

    Args:
        indices: integers of any shape; negative ones (masked or non-finite rows) are skipped.
        codebook_size: K.
        dim: the dimension of ``indices`` that separates codebooks (levels, heads); each then gets statistics of its
            own, ``counts`` ``[size of dim, K]``. Default: one histogram over everything, ``counts`` ``[K]``.

    Raises:
        RuntimeError: an index >= codebook_size (CUDA and Triton kernels skip it instead of synchronising).
    """
    op = "codebook_usage"
    checks.integer(op, "indices", indices)
    checks.positive(op, "codebook_size", codebook_size)
    if dim is None:
        streams = indices.reshape(1, -1)
    else:
        if not -indices.dim() <= dim < indices.dim():
            raise ValueError(f"{op}: dim={dim} is not a dimension of indices {tuple(indices.shape)}")
        streams = indices.movedim(dim, 0).flatten(1) if indices.dim() > 1 else indices.unsqueeze(1)
    counts = pick(op, indices.device)(streams.long(), codebook_size)
    return usage_from_counts(counts.squeeze(0) if dim is None else counts)


def usage_from_counts(counts: Tensor) -> CodebookUsage:
    """The statistics of counts [..., K] (any number type), for counts accumulated over steps."""
    share = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    entropy = -(share * share.clamp(min=1e-300).log()).sum(-1).float()
    dead = counts == 0
    used = 1.0 - dead.float().mean(-1)
    return CodebookUsage(counts, used, entropy, entropy.exp() * counts.any(-1), dead)
