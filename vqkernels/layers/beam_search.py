"""Beam search over the levels of a residual code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .search import chunks, least

# z [N, D] and the sum chosen so far [N, D] -> the k best codewords of a level, best first: indices [N, k], codes
# [N, k, D], squared errors [N, k]
Candidates = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def beam_search(z: Tensor, levels: Sequence[Candidates], weights: Tensor, width: int) -> Tensor:
    """The codes of z ``[N, D]`` with the least weighted sum of the levels' squared errors that a beam finds.

    Of every prefix in the beam the best codewords of the next level are tried, and the ``width`` best of all these
    prefixes stay; equal ones in the order of their parents. A beam as wide as the number of prefixes finds the optimum.

    Args:
        levels: one function per level that proposes codewords.
        weights: ``[Q]``, of each level's squared error.

    Returns:
        int64 ``[N, Q]``.
    """
    if not levels:
        raise ValueError("beam_search: levels is empty; at least one is needed")
    parts = chunks(z, width * width * z.shape[-1])
    return torch.cat([_search(part, levels, weights.double(), width) for part in parts])


def _search(z: Tensor, levels: Sequence[Candidates], weights: Tensor, width: int) -> Tensor:
    residual = z.unsqueeze(1)  # [N, beam, D]
    total, score = torch.zeros_like(residual), z.new_zeros(z.shape[0], 1, dtype=torch.float64)
    codes = torch.empty(z.shape[0], 1, 0, dtype=torch.int64, device=z.device)
    for level, candidates in enumerate(levels):
        beam = residual.shape[1]
        index, code, error = candidates(residual.flatten(0, 1), total.flatten(0, 1))
        tried = index.shape[-1]
        index, code = index.unflatten(0, (-1, beam)).flatten(1), code.unflatten(0, (-1, beam)).flatten(1, 2)
        score = score.repeat_interleave(tried, 1) + weights[level] * error.unflatten(0, (-1, beam)).flatten(1)
        kept = min(width if level + 1 < len(levels) else 1, beam * tried)
        best = torch.arange(beam * tried, device=z.device).expand(z.shape[0], -1)
        if kept < beam * tried:
            score, best = least(score, kept)
        parent = best // tried
        code = _rows(code, best)
        residual, total = _rows(residual, parent) - code, _rows(total, parent) + code
        codes = torch.cat([_rows(codes, parent), index.gather(1, best).unsqueeze(-1)], -1)
    return codes[:, 0]


def _rows(t: Tensor, index: Tensor) -> Tensor:
    """t ``[N, beam, *]``, index ``[N, kept]`` -> ``[N, kept, *]``."""
    return t.gather(1, index.unsqueeze(-1).expand(*index.shape, t.shape[-1]))
