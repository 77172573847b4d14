"""Items that get the same codes: counted, and told apart by one more digit."""

from __future__ import annotations

import numpy as np


def add_digit(codes: np.ndarray) -> np.ndarray:
    """Append a column that makes the rows unique: int64 [N, L] -> int64 [N, L + 1].

    The first row of a group with equal codes gets 0, the next 1 and so on, in row order (TIGER, arXiv 2305.05065,
    section 3.1).
    """
    codes = np.asarray(codes, np.int64)
    group = _groups(codes)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    digit = np.empty(len(codes), np.int64)
    digit[order] = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    return np.concatenate([codes, digit[:, None]], axis=1)


def collision_report(codes: np.ndarray) -> dict:
    """Of codes [N, L]: ``unique_fraction`` (different codes / items), ``collision_rate`` (share of the items whose
    codes another item has too) and ``largest_group`` (most items with the same codes)."""
    sizes = np.bincount(_groups(np.asarray(codes)))
    return {
        "unique_fraction": float(len(sizes) / len(codes)),
        "collision_rate": float(sizes[sizes > 1].sum() / len(codes)),
        "largest_group": int(sizes.max()),
    }


def _groups(codes: np.ndarray) -> np.ndarray:
    return np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)
