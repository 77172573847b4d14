"""What Hamerly's and Yinyang's bounds would spare Lloyd's iterations: the share of rows that they settle without a
search, and the time left if bounds were free. No kernel has them; the figures say why.

    python bench/kmeans_bounds.py [--data FOLDER]      FOLDER: with the embeddings.npy of a catalogue

Hamerly (2010) keeps, for each row, an upper bound u of the distance to its centroid and a lower bound l of the distance
to any other; a step moves centroid k by p_k, so u grows by p of its own and l shrinks by the largest p. Yinyang (Ding
et al. 2015) keeps a lower bound for each of K/10 groups of centroids, and searches only groups whose bound is below u.
Both are followed here in float64. "skipped" are rows whose bounds settle them, after u was made exact where needed;
"distances" is what Yinyang still computes, as a share of N K. "time" is that of gathering and searching the rows that
Hamerly leaves, with our kernel on one thread, over a search of all rows: bounds that cost nothing, no second distance.
"k-means" is the same over the whole iteration, with the new centroids.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import vqkernels as vq
from vqkernels.ops.kmeans import _fill_empty


def distances(x, c, own, members):
    """Of each row, float64: distance to its own centroid, the nearest one and its distance, the next distance, the
    least distance of each group to a centroid that is not the row's nearest."""
    out = []
    for rows, mine in zip(x.double().split(4096), own.split(4096), strict=True):
        d = torch.cdist(rows, c.double())
        best, where = d.min(1)
        mine = d.gather(1, mine[:, None]).squeeze(1)
        d.scatter_(1, where[:, None], float("inf"))
        groups = torch.stack([d[:, m].amin(1) for m in members], 1)
        out.append((mine, where, best, groups.amin(1), groups))
    return [torch.cat(column) for column in zip(*out, strict=True)]


def fastest(call, repeats=3):
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def follow(x, K, iters):
    """One row of figures for each iteration."""
    centroids = vq.kmeans(x, K, init="random", iters=0).centroids
    group = vq.kmeans(centroids, max(1, K // 10), iters=5).indices
    members = [(group == g).nonzero().squeeze(-1) for g in group.unique()]

    own = vq.nearest_codeword(x, centroids)[0]
    _, own, upper, lower, lowest = distances(x, centroids, own, members)
    for _ in range(iters):
        sums, counts = vq.codeword_sums(x, own, K)
        means = sums / counts.clamp(min=1).unsqueeze(-1)
        new = _fill_empty(x, torch.where(counts.unsqueeze(-1) > 0, means, centroids), counts, upper.square())
        moved = (new.double() - centroids.double()).norm(dim=-1)
        centroids = new
        exact, now, best, second, groups = distances(x, centroids, own, members)
        between = torch.cdist(centroids.double(), centroids.double())
        half = (between + torch.diag(torch.full((K,), float("inf")))).amin(1)[own] / 2
        lower = torch.maximum(lower - moved.max(), half)
        hamerly = (upper + moved[own] <= lower) | (exact <= lower)
        lowest = lowest - torch.stack([moved[m].max() for m in members])
        tight = torch.where(upper + moved[own] <= lowest.amin(1), upper + moved[own], exact)
        searched = lowest < tight[:, None]
        computed = sum(float(searched[:, g].sum()) * len(m) for g, m in enumerate(members)) / len(x) / K
        skipped_yinyang = 1 - float(searched.any(1).double().mean())
        assert torch.equal(own[hamerly], now[hamerly])

        rest = (~hamerly).nonzero().squeeze(-1)
        whole = fastest(lambda c=centroids: vq.nearest_codeword(x, c))
        part = fastest(lambda c=centroids, r=rest: vq.nearest_codeword(x[r], c)) if len(rest) else 0.0
        update = fastest(lambda i=now: vq.codeword_sums(x, i, K))
        yield float(hamerly.double().mean()), skipped_yinyang, computed, part / whole, whole, update, part

        lowest = torch.where(searched | (own != now)[:, None], groups, lowest)
        lower = torch.where(hamerly, lower, second)
        upper = torch.where(hamerly & (upper + moved[own] <= lower), upper + moved[own], best)
        if torch.equal(now, own):
            break
        own = now


def datasets(data):
    g = torch.Generator().manual_seed(0)
    yield "Gaussian", torch.randn(100_000, 32, generator=g), 256
    centres = 2 * torch.randn(256, 32, generator=g)
    x = centres[torch.randint(256, (100_000,), generator=g)] + torch.randn(100_000, 32, generator=g)
    yield "256 clusters", x, 256
    if data:
        x = torch.from_numpy(np.load(Path(data) / "embeddings.npy").astype(np.float32))
        for level in range(3):
            yield f"{Path(data).name}, level {level + 1}", x, 256
            km = vq.kmeans(x, 256)
            x = x - km.centroids[km.indices]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data")
    parser.add_argument("--iters", type=int, default=25)
    args = parser.parse_args()
    print(
        "data, N×K×D | skipped by Hamerly, iterations 1 5 10 15 20 25, mean | by Yinyang | distances | time | k-means"
    )
    torch.set_num_threads(1)  # processor time then counts no waiting
    for name, x, K in datasets(args.data):
        rows = list(follow(x, K, args.iters))
        hamerly, yinyang, computed, _, whole, update, part = (np.array(column) for column in zip(*rows, strict=True))
        shown = " ".join(f"{100 * hamerly[i]:.0f}" for i in (0, 4, 9, 14, 19, 24) if i < len(rows))
        columns = [
            f"{name}, {x.shape[0]}×{K}×{x.shape[1]}",
            f"{shown}, {100 * hamerly.mean():.0f} %",
            *(f"{100 * column.mean():.0f} %" for column in (yinyang, computed)),
            f"{100 * part.sum() / whole.sum():.0f} %",
            f"{100 * (part + update).sum() / (whole + update).sum():.0f} %",
        ]
        print(" | ".join(columns), flush=True)


main()
