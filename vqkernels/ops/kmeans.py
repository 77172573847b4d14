"""k-means on the nearest-codeword and codeword-sums kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import pick
from . import checks
from .codeword_sums import codeword_sums
from .nearest_codeword import nearest_codeword


class KMeans(NamedTuple):
    """``centroids`` [K,D]; ``indices`` int64 [N], nearest centroid of each row (-1: non-finite row); ``inertia``
    float64 []:
    sum of squared distances."""

    centroids: Tensor
    indices: Tensor
    inertia: Tensor


def _plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: each next centre is the best of 2 + ln k rows drawn with probability proportional to the
    squared distance to the nearest centre so far (Arthur and Vassilvitskii 2007, section 6)."""
    draws = torch.rand(k, 2 + int(math.log(k)), generator=generator, dtype=torch.float64).to(x.device)
    values = x if x.dtype == torch.float64 else x.float()
    # a power of two, which changes no digit: squares must not leave the range
    largest = float(values.abs().max())
    values = values * 2.0 ** -math.frexp(largest)[1] if largest > 0 else values
    return x[pick("kmeans_plus_plus", x.device)(values, draws)]


def _fill_empty(x: Tensor, centroids: Tensor, counts: Tensor, distances: Tensor) -> Tensor:
    """Empty clusters move onto the rows that are farthest from their centroid (lowest row first among equals)."""
    empty = (counts == 0).nonzero().squeeze(-1)
    if len(empty):
        far = distances.double().sort(descending=True, stable=True).indices[: len(empty)]
        centroids[empty[: len(far)]] = x[far].to(centroids.dtype)
    return centroids


def kmeans(x: Tensor, k: int, init: str | Tensor = "k-means++", iters: int = 20, seed: int = 0) -> KMeans:
    """Lloyd's algorithm with exact assignments. The same seed gives the same result for any number of threads.

    Args:
        x: ``[N, D]``; rows with a non-finite value take no part.
        k: number of centroids, at most the number of finite rows.
        init: ``"k-means++"``, ``"random"`` (k rows without replacement) or the first centroids ``[k, D]``.
        iters: most Lloyd iterations; stops early when no assignment changes.
        seed: seed of the draws.

    Raises:
        ValueError: fewer finite rows than k, unknown init, iters < 0.
    """
    op = "kmeans"
    checks.floating(op, "x", x)
    checks.positive(op, "k", k)
    if x.dim() != 2 or iters < 0:
        raise ValueError(f"{op}: x is {tuple(x.shape)} and iters={iters}; expected [N, D] and iters >= 0")
    x = x.detach()
    finite = checks.finite_rows(x)
    rows = x if finite.all() else x[finite]
    if rows.shape[0] < k:
        raise ValueError(f"{op}: k={k} centroids need at least {k} finite rows, x has {rows.shape[0]} of {x.shape[0]}")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(init, Tensor):
        if init.shape != (k, x.shape[1]):
            raise ValueError(f"{op}: init is {tuple(init.shape)}; expected [k, D] = {(k, x.shape[1])}")
        centroids = init.detach().to(x).clone()
    elif init == "k-means++":
        centroids = _plus_plus(rows, k, generator)
    elif init == "random":
        centroids = rows[torch.randperm(rows.shape[0], generator=generator)[:k].to(x.device)].clone()
    else:
        raise ValueError(f"{op}: init={init!r} is unknown; allowed: 'k-means++', 'random' or a tensor [k, D]")
    indices, distances = nearest_codeword(rows, centroids)
    for _ in range(iters):
        sums, counts = codeword_sums(rows, indices, k)
        means = (sums / counts.clamp(min=1).unsqueeze(-1)).to(x.dtype)
        centroids = _fill_empty(rows, torch.where(counts.unsqueeze(-1) > 0, means, centroids), counts, distances)
        previous = indices
        indices, distances = nearest_codeword(rows, centroids)
        if torch.equal(indices, previous):
            break
    full = torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)
    full[finite] = indices
    return KMeans(centroids, full, distances.double().sum())
