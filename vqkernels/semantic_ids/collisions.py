"""Items that get the same codes: counted, told apart by one more digit, or moved to free codes of the last level."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

COLLISIONS = ("digit", "sinkhorn", "none")
SINKHORN_ROUNDS = 50
SINKHORN_TEMPERATURE = 0.02  # of the transport, in units of what a row's best code saves against its mean one


def add_digit(codes: np.ndarray) -> np.ndarray:
    """Append a column that makes the rows unique: int64 [N, L] -> int64 [N, L + 1].

    The first row of a group with equal codes gets 0, the next 1 and so on, in row order (TIGER, arXiv 2305.05065,
    section 3.1).
    """
    codes = np.asarray(codes, np.int64)
    order, starts = _sorted(codes)
    digit = np.empty(len(codes), np.int64)
    digit[order] = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    return np.concatenate([codes, digit[:, None]], axis=1)


def collision_report(codes: np.ndarray) -> dict:
    """Of codes [N, L]: ``unique_fraction`` (different codes / items), ``collision_rate`` (share of the items whose
    codes another item has too), ``largest_group`` (most items with the same codes) and ``group_sizes``, pairs [size,
    number of groups of that size]."""
    sizes = np.diff(_sorted(codes)[1], append=len(codes))
    return {
        "unique_fraction": float(len(sizes) / len(codes)),
        "collision_rate": float(sizes[sizes > 1].sum() / len(codes)),
        "largest_group": int(sizes.max()),
        "group_sizes": np.stack(np.unique(sizes, return_counts=True), 1).tolist(),
    }


def reassign(codes: np.ndarray, costs: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Give items that collide other codes of the last level: int64 [N, L] -> int64 [N, L], prefixes kept.

    Under each prefix with a collision all items are assigned anew by :func:`transport`, so that no two share a code
    where there are codes for all, and as few as possible where there are not. ``costs(rows)`` says what each code of
    the last level costs each of these items, [len(rows), K], infinite where a code does not exist.

    Source: the last level's optimal transport of LC-Rec (arXiv 2311.09049), here under each prefix by itself.
    """
    codes = np.array(codes, np.int64)
    for rows in groups(codes[:, :-1]):
        if len(np.unique(codes[rows, -1])) < len(rows):
            codes[rows, -1] = transport(costs(rows))
    return codes


def transport(cost: np.ndarray) -> np.ndarray:
    """Assign n rows to K columns at little cost, each column at most ceil(n / K) times: [n, K] -> int64 [n].

    Sinkhorn's iteration makes the entropic transport plan, with one more row of no cost that takes what the columns
    have left; then the largest entries of the plan are made good first. Columns with an infinite entry are not used.
    """
    columns = np.flatnonzero(np.isfinite(cost).all(0))
    cost = np.asarray(cost, np.float64)[:, columns]
    rows, k = cost.shape
    capacity = -(-rows // k)
    cost = cost - cost.min(1, keepdims=True)
    plan, row_mass = -cost / (SINKHORN_TEMPERATURE * (cost.mean() or 1.0)), np.ones((rows, 1))
    if slack := k * capacity - rows:
        plan, row_mass = np.concatenate([plan, np.zeros((1, k))]), np.append(row_mass, [[slack]], 0)
    for _ in range(SINKHORN_ROUNDS):
        plan = plan - np.logaddexp.reduce(plan, 1, keepdims=True) + np.log(row_mass)
        plan = plan - np.logaddexp.reduce(plan, 0, keepdims=True) + np.log(capacity)
    assigned, free = np.full(rows, -1), np.full(k, capacity)
    for entry in np.argsort(-plan[:rows], axis=None, kind="stable").tolist():
        row, column = divmod(entry, k)
        if assigned[row] < 0 and free[column]:
            assigned[row] = column
            free[column] -= 1
    return columns[assigned]


def place(codes: np.ndarray, taken: np.ndarray, costs: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Codes for new items beside those that are ``taken``, in row order: a new item whose codes are taken gets the
    cheapest free code of the last level, and keeps its own where none is free. ``costs`` as in :func:`reassign`."""
    codes, used = np.array(codes, np.int64), set(map(tuple, taken.tolist()))
    for row, code in enumerate(codes.tolist()):
        *prefix, last = code
        if tuple(code) in used:
            [cost] = costs(np.array([row]))
            order = (k for k in np.argsort(cost, kind="stable").tolist() if np.isfinite(cost[k]))
            last = next((k for k in order if (*prefix, k) not in used), last)
        codes[row, -1] = last
        used.add((*prefix, last))
    return codes


def groups(codes: np.ndarray) -> list[np.ndarray]:
    """Row numbers, ascending, of each different row of codes."""
    order, starts = _sorted(codes)
    return np.split(order, starts[1:]) if len(order) else []


def _sorted(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers sorted by codes, equal rows in their order, and where in them each group of equal rows starts."""
    codes = np.asarray(codes)
    order = np.lexsort(codes.T[::-1]) if codes.shape[1] else np.arange(len(codes))
    different = (np.diff(codes[order], axis=0) != 0).any(1)
    return order, np.flatnonzero(np.concatenate([np.ones(min(len(codes), 1), bool), different]))
