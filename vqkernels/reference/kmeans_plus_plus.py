"""Greedy k-means++ seeding."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1024  # rows whose squared distances are summed together: the order is part of the result


def _squared_distances(x: Tensor, c: Tensor) -> Tensor:
    """x [N,D], c [L,D] -> [N,L]: eight running sums, lane = d mod 8, combined in one order; every operation rounded."""
    pad = -x.shape[1] % 8
    x, c = (torch.nn.functional.pad(t, (0, pad)).unflatten(1, (-1, 8)) for t in (x, c))
    sums = x.new_zeros(x.shape[0], c.shape[0], 8)
    for step in range(x.shape[1]):
        difference = x[:, None, step] - c[None, :, step]
        sums = sums + difference * difference
    s = sums.unbind(-1)
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))


def _block_sums(values: Tensor) -> Tensor:
    """values [N, ...] -> float64 [blocks, ...], each summed row after row."""
    pad = -values.shape[0] % _BLOCK
    values = torch.cat([values.double(), values.new_zeros(pad, *values.shape[1:], dtype=torch.float64)])
    return values.unflatten(0, (-1, _BLOCK)).cumsum(1)[:, -1]


def _draw(u: float, nearest: Tensor, sums: list[float], total: float) -> int:
    """The row at which the running sum of `nearest` passes u * total."""
    if not total > 0:
        return int(u * nearest.shape[0])
    target, block = u * total, 0
    while block + 1 < len(sums) and target >= sums[block]:
        target -= sums[block]
        block += 1
    last = block * _BLOCK
    for n, have in enumerate(nearest[last : last + _BLOCK].double().tolist(), start=last):
        last = n if have > 0 else last
        if target < have:
            return n
        target -= have
    return last


def kmeans_plus_plus(x: Tensor, draws: Tensor) -> Tensor:
    """x [N,D] float32 or float64, draws [K,L] uniform in [0, 1) -> rows int64 [K]: the first at random, each next one
    the best of L drawn with probability proportional to the squared distance to the nearest centre so far."""
    uniform = draws.tolist()
    rows = [int(uniform[0][0] * x.shape[0])] if uniform else []
    nearest = _squared_distances(x, x[rows])[:, 0] if rows else None
    for step in uniform[1:]:
        sums = _block_sums(nearest).tolist()
        total = 0.0
        for part in sums:
            total += part
        candidates = [_draw(u, nearest, sums, total) for u in step]
        after = torch.minimum(nearest.unsqueeze(1), _squared_distances(x, x[candidates]))
        potential = _block_sums(after).cumsum(0)[-1]
        best = int(potential.argmin())
        rows.append(candidates[best])
        nearest = after[:, best]
    return torch.tensor(rows, dtype=torch.int64, device=x.device)
