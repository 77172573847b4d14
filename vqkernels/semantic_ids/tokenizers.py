"""Tokenizers without an encoder: random codes, and k-means of residuals, of prefixes and of parts of the features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..data.progress import progress_bar
from ..ops import codebook_usage, kmeans, nearest_codeword, residual_quantize
from .base import CHUNK, DataError, Tokenizer, _fingerprints

SEED_ROWS = 64  # a codeword; more rows than these do not take part in k-means++


class RandomTokenizer(Tokenizer):
    """Codes drawn at random by ``seed``: what semantic IDs must beat. A new item's codes follow from its embedding and
    the seed."""

    kind = "random"

    def _fit(self, z: Tensor, progress) -> Tensor:
        draw = np.random.default_rng(self.seed)
        return torch.from_numpy(draw.integers(self.codebook_size, size=(len(z), self.levels)))

    def _codes(self, z: Tensor) -> Tensor:
        draws = (np.random.default_rng([self.seed, row % 2**64]) for row in _fingerprints(z).tolist())
        return torch.from_numpy(np.array([draw.integers(self.codebook_size, size=self.levels) for draw in draws]))


class KMeansTokenizer(Tokenizer):
    """What the k-means tokenizers share: ``iters``, and a table of centroids a level. k-means++ draws its centroids
    from at most 64 rows a codeword; Lloyd's iterations go over all rows."""

    def __init__(
        self, levels: int = 3, codebook_size: int = 256, seed: int = 0, iters: int = 20, collisions: str = "digit"
    ):
        super().__init__(levels, codebook_size, seed, collisions)
        self.iters = iters

    def _cluster(self, z: Tensor, level: int):
        """k-means of a level's vectors, with at most as many centroids as different vectors."""
        k = distinct(z, self.codebook_size)
        if k < self.codebook_size:
            self.notes.append(
                f"level {level + 1}: {k} codewords instead of {self.codebook_size}, since only so many rows are "
                "different there"
            )
        init, seed = "k-means++", self.seed + level
        if len(z) > SEED_ROWS * k:  # k-means++ reads all its rows k times: on all of them it would outlast the rest
            sample = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[: SEED_ROWS * k]
            init = kmeans(z[sample.to(z.device)], k, iters=0, seed=seed).centroids
        km = kmeans(z, k, init, self.iters, seed)
        self._codebooks.append(km.centroids.cpu())
        return km

    def _record(self, level: int, loss: float, indices: Tensor, size: int) -> None:
        use = codebook_usage(indices, size)
        self.history.append(
            {"step": level + 1, "loss": loss, "usage": float(use.used), "perplexity": float(use.perplexity)}
        )

    def _level_sizes(self) -> list[int]:
        return [len(codebook) for codebook in self._codebooks]

    def _state(self) -> dict[str, Tensor]:
        return {f"codebook{level}": codebook for level, codebook in enumerate(self._codebooks)}

    def _restore(self, state: dict[str, Tensor]) -> None:
        self._codebooks = [state[f"codebook{level}"] for level in range(self.levels)]

    def _config(self) -> dict:
        return super()._config() | {"iters": self.iters}


class ResidualKMeansTokenizer(KMeansTokenizer):
    """k-means, then k-means of what is left of each item, level after level. No training, and published tables have it
    at or above RQ-VAE.

    ``iters``: Lloyd iterations a level, after k-means++. A level has at most as many codewords as different residuals.
    """

    kind = "residual-kmeans"

    def _fit(self, z: Tensor, progress) -> Tensor:
        self._codebooks, codes = [], []
        with progress_bar(progress, "residual k-means", self.levels) as advance:
            for level in range(self.levels):
                km = self._cluster(z, level)
                for rows, own in zip(z.split(CHUNK), km.indices.split(CHUNK), strict=True):
                    rows -= km.centroids[own]
                codes.append(km.indices)
                self._record(level, float(km.inertia / z.numel()), km.indices, len(km.centroids))
                advance()
        return torch.stack(codes, 1)

    def _codes(self, z: Tensor) -> Tensor:
        return residual_quantize(z, [codebook.to(z.device) for codebook in self._codebooks]).indices

    def _decode(self, codes: Tensor) -> Tensor:
        parts = zip(self._codebooks, codes.T, strict=False)
        return sum(codebook.to(codes.device)[column] for codebook, column in parts)


class ProductKMeansTokenizer(KMeansTokenizer):
    """k-means of each part of the features by itself: level l is the code of the l-th of ``levels`` runs of features.
    The levels say different things, none of them coarse to fine, and a prefix describes its features alone.

    ``iters``: Lloyd iterations a level, after k-means++. The embeddings need at least ``levels`` features.

    Source: Jégou et al. 2011, Product Quantization for Nearest Neighbor Search.
    """

    kind = "product-kmeans"

    def _parts(self, z: Tensor) -> list[Tensor]:
        return [part.contiguous() for part in z.tensor_split(self.levels, 1)]

    def _fit(self, z: Tensor, progress) -> Tensor:
        if z.shape[1] < self.levels:
            raise DataError(
                f"embeddings: {z.shape[1]} features do not split into levels={self.levels}. Use fewer levels"
            )
        self._codebooks, codes, loss = [], [], float(z.double().square().mean())
        with progress_bar(progress, "product k-means", self.levels) as advance:
            for level, part in enumerate(self._parts(z)):
                km = self._cluster(part, level)
                loss -= (float(part.double().square().sum()) - float(km.inertia)) / z.numel()
                codes.append(km.indices)
                self._record(level, loss, km.indices, len(km.centroids))
                advance()
        return torch.stack(codes, 1)

    def _codes(self, z: Tensor) -> Tensor:
        parts = zip(self._parts(z), self._codebooks, strict=True)
        return torch.stack([nearest_codeword(part, codebook.to(z.device))[0] for part, codebook in parts], 1)

    def _decode(self, codes: Tensor) -> Tensor:
        # features whose level is not given are at their mean, which standardisation made 0
        known = [book.to(codes.device)[column] for book, column in zip(self._codebooks, codes.T, strict=False)]
        unknown = [
            codes.new_zeros(len(codes), book.shape[1], dtype=book.dtype) for book in self._codebooks[len(known) :]
        ]
        return torch.cat(known + unknown, 1)


class HierarchicalKMeansTokenizer(KMeansTokenizer):
    """A k-means tree: the items of one prefix are clustered among themselves, so a code means something only after its
    prefix.

    A node with n different items and l levels to go gets the l-th root of n children, rounded up, so that all levels
    say about as much, and at most ``codebook_size``; the last level then tells most items apart. ``iters``: Lloyd
    iterations a node.
    """

    kind = "hierarchical-kmeans"

    def _fit(self, z: Tensor, progress) -> Tensor:
        # A level is a table of all its centroids; node i of the level above owns rows starts[i] to starts[i + 1].
        self._codebooks, self._starts, levels = [], [], []
        nodes = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        with progress_bar(progress, "hierarchical k-means", self.levels) as advance:
            for level in range(self.levels):
                centroids, starts, children = [], [0], torch.empty_like(nodes)
                loss = 0.0
                for rows in _groups(nodes):
                    k = self._branches(z[rows], level)
                    km = kmeans(z[rows], k, iters=self.iters, seed=self.seed + level)
                    children[rows] = starts[-1] + km.indices
                    centroids.append(km.centroids.cpu())
                    starts.append(starts[-1] + k)
                    loss += float(km.inertia)
                self._codebooks.append(torch.cat(centroids))
                self._starts.append(torch.tensor(starts))
                codes = children - self._starts[-1].to(z.device)[nodes]
                self._record(level, loss / z.numel(), codes, self._level_size(level))
                levels.append(codes)
                nodes = children
                advance()
        sizes = self._level_sizes()
        if max(sizes) < self.codebook_size:
            self.notes.append(f"children a node at most, level by level: {sizes}; codebook_size allows more")
        return torch.stack(levels, 1)

    def _branches(self, z: Tensor, level: int) -> int:
        different, left = distinct(z, len(z)), self.levels - level
        k = round(different ** (1 / left))
        while k**left < different:  # the root rounded up, whatever its last bit
            k += 1
        return min(k, self.codebook_size)

    def _codes(self, z: Tensor) -> Tensor:
        codes = torch.empty(len(z), self.levels, dtype=torch.int64, device=z.device)
        nodes = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        for level, (centroids, starts) in enumerate(zip(self._codebooks, self._starts, strict=True)):
            centroids, starts = centroids.to(z.device), starts.to(z.device)
            for rows in _groups(nodes):
                first, end = starts[nodes[rows[0]] :][:2].tolist()
                codes[rows, level] = nearest_codeword(z[rows], centroids[first:end])[0]
            nodes = starts[nodes] + codes[:, level]
        return codes

    def _decode(self, codes: Tensor) -> Tensor:
        nodes = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
        exists = torch.ones_like(nodes, dtype=torch.bool)
        for starts, column in zip(self._starts, codes.T, strict=False):
            starts = starts.to(codes.device)
            exists &= column < starts.diff()[nodes]
            nodes = torch.where(exists, starts[nodes] + column, 0)
        centroids = self._codebooks[codes.shape[1] - 1].to(codes.device)[nodes]
        return centroids.masked_fill(~exists.unsqueeze(1), torch.nan)

    def _level_size(self, level: int) -> int:
        return int(self._starts[level].diff().max())

    def _level_sizes(self) -> list[int]:
        return [self._level_size(level) for level in range(self.levels)]

    def _state(self) -> dict[str, Tensor]:
        return super()._state() | {f"starts{level}": starts for level, starts in enumerate(self._starts)}

    def _restore(self, state: dict[str, Tensor]) -> None:
        super()._restore(state)
        self._starts = [state[f"starts{level}"] for level in range(self.levels)]


def distinct(x: Tensor, most: int) -> int:
    """How many rows are different, ``most`` if there are more."""
    seen = set()
    for start in range(0, len(x), 4096):
        seen.update(_fingerprints(x[start : start + 4096]).tolist())
        if len(seen) >= most:
            return most
    return len(seen)


def _groups(nodes: Tensor) -> list[Tensor]:
    """Row numbers of each node that occurs, by ascending node."""
    order = torch.argsort(nodes, stable=True)
    return list(order.split(torch.unique_consecutive(nodes[order], return_counts=True)[1].tolist()))
