"""What codes mean, in words: the items that share a prefix with an item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.catalogue import DataError


def shared_prefixes(codes, titles: Sequence[str], items: Sequence[int], most: int = 3) -> list[dict]:
    """For each of ``items`` (row numbers) the other items whose codes begin like its own.

    ``codes`` int64 [N, L], ``titles`` N strings. Returns for each item ``item``, ``title``, ``codes`` and ``shared``:
    one dict a prefix length, longest first, where other items share exactly that much, with ``levels`` (the length),
    ``count`` (how many items do) and ``titles`` (the first ``most`` of them by row). DataError where codes and titles
    do not fit, or a row number does not exist.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or len(codes) != len(titles):
        raise DataError(
            f"codes of shape {list(codes.shape)} and {len(titles)} titles; give one row and one title an item"
        )
    found = []
    for item in items:
        if not 0 <= item < len(codes):
            raise DataError(f"item row {item} does not exist; rows run from 0 to {len(codes) - 1}")
        length = (codes == codes[item]).cumprod(1).sum(1)
        length[item] = 0
        shared = []
        for levels in range(codes.shape[1], 0, -1):
            rows = np.flatnonzero(length == levels)
            if len(rows):
                some = [titles[row] for row in rows[:most].tolist()]
                shared.append({"levels": levels, "count": len(rows), "titles": some})
        found.append({"item": int(item), "title": titles[item], "codes": codes[item].tolist(), "shared": shared})
    return found
