"""Tokenizers without an encoder: random codes, residual k-means, hierarchical k-means."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..data.progress import progress_bar
from ..ops import codebook_usage, kmeans, nearest_codeword, residual_quantize
from .base import Tokenizer, _fingerprints


class RandomTokenizer(Tokenizer):
    """Codes drawn at random by ``seed``: what semantic IDs must beat. A new item's codes follow from its embedding and
    the seed."""

    kind = "random"

    def _fit(self, z: Tensor, progress) -> None:
        self._drawn = np.random.default_rng(self.seed).integers(self.codebook_size, size=(len(z), self.levels))

    def _codes(self, z: Tensor) -> Tensor:
        drawn, self._drawn = getattr(self, "_drawn", None), None
        if drawn is None:  # after fit: new items
            draws = (np.random.default_rng([self.seed, row % 2**64]) for row in _fingerprints(z).tolist())
            drawn = np.array([draw.integers(self.codebook_size, size=self.levels) for draw in draws])
        return torch.from_numpy(drawn)


class ResidualKMeansTokenizer(Tokenizer):
    """k-means, then k-means of what is left of each item, level after level. No training, and published tables have it
    at or above RQ-VAE.

    ``iters``: Lloyd iterations a level, after k-means++. A level has at most as many codewords as different residuals.
    """

    kind = "residual-kmeans"

    def __init__(self, levels: int = 3, codebook_size: int = 256, seed: int = 0, iters: int = 20):
        super().__init__(levels, codebook_size, seed)
        self.iters = iters

    def _fit(self, z: Tensor, progress) -> None:
        self._codebooks, residual = [], z
        with progress_bar(progress, "residual k-means", self.levels) as advance:
            for level in range(self.levels):
                k = distinct(residual, self.codebook_size)
                if k < self.codebook_size:
                    self.notes.append(
                        f"level {level + 1}: {k} codewords instead of {self.codebook_size}, since only so many "
                        "rows are different there"
                    )
                km = kmeans(residual, k, iters=self.iters, seed=self.seed + level)
                residual = residual - km.centroids[km.indices]
                self._codebooks.append(km.centroids.cpu())
                use = codebook_usage(km.indices, k)
                self.history.append(
                    {
                        "step": level + 1,
                        "loss": float(km.inertia / z.numel()),
                        "usage": float(use.used),
                        "perplexity": float(use.perplexity),
                    }
                )
                advance()

    def _quantize(self, z: Tensor):
        return residual_quantize(z, [codebook.to(z.device) for codebook in self._codebooks])

    def _codes(self, z: Tensor) -> Tensor:
        return self._quantize(z).indices

    def _reconstruct(self, z: Tensor) -> Tensor:
        return self._quantize(z).quantized

    def _level_sizes(self) -> list[int]:
        return [len(codebook) for codebook in self._codebooks]

    def _state(self) -> dict[str, Tensor]:
        return {f"codebook{level}": codebook for level, codebook in enumerate(self._codebooks)}

    def _restore(self, state: dict[str, Tensor]) -> None:
        self._codebooks = [state[f"codebook{level}"] for level in range(self.levels)]

    def _config(self) -> dict:
        return super()._config() | {"iters": self.iters}


class HierarchicalKMeansTokenizer(Tokenizer):
    """A k-means tree: the items of one prefix are clustered among themselves, so a code means something only after its
    prefix.

    ``codebook_size`` ** ``levels`` should be near the number of items: a node with fewer different items than
    ``codebook_size`` gets that many children, and deep levels of a wide tree say nothing. ``iters``: Lloyd iterations a
    node.
    """

    kind = "hierarchical-kmeans"

    def __init__(self, levels: int = 3, codebook_size: int = 16, seed: int = 0, iters: int = 20):
        super().__init__(levels, codebook_size, seed)
        self.iters = iters

    def _fit(self, z: Tensor, progress) -> None:
        # A level is a table of all its centroids; node i of the level above owns rows starts[i] to starts[i + 1].
        self._centroids, self._starts = [], []
        nodes = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        with progress_bar(progress, "hierarchical k-means", self.levels) as advance:
            for level in range(self.levels):
                centroids, starts, children = [], [0], torch.empty_like(nodes)
                loss = 0.0
                for rows in _groups(nodes):
                    k = distinct(z[rows], self.codebook_size)
                    km = kmeans(z[rows], k, iters=self.iters, seed=self.seed + level)
                    children[rows] = starts[-1] + km.indices
                    centroids.append(km.centroids.cpu())
                    starts.append(starts[-1] + k)
                    loss += float(km.inertia)
                self._centroids.append(torch.cat(centroids))
                self._starts.append(torch.tensor(starts))
                use = codebook_usage(children - self._starts[-1].to(z.device)[nodes], self._level_size(level))
                self.history.append(
                    {
                        "step": level + 1,
                        "loss": loss / z.numel(),
                        "usage": float(use.used),
                        "perplexity": float(use.perplexity),
                    }
                )
                nodes = children
                advance()
        if any(size < self.codebook_size for size in self._level_sizes()):
            self.notes.append(
                f"codes in use a level: {self._level_sizes()} of {self.codebook_size}: too few different items under "
                "a prefix. Use fewer levels or a smaller codebook_size"
            )

    def _walk(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(codes [N, levels], node of the last level [N])."""
        codes = torch.empty(len(z), self.levels, dtype=torch.int64, device=z.device)
        nodes = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        for level, (centroids, starts) in enumerate(zip(self._centroids, self._starts, strict=True)):
            centroids, starts = centroids.to(z.device), starts.to(z.device)
            for rows in _groups(nodes):
                first, end = starts[nodes[rows[0]] :][:2].tolist()
                codes[rows, level] = nearest_codeword(z[rows], centroids[first:end])[0]
            nodes = starts[nodes] + codes[:, level]
        return codes, nodes

    def _codes(self, z: Tensor) -> Tensor:
        return self._walk(z)[0]

    def _reconstruct(self, z: Tensor) -> Tensor:
        return self._centroids[-1].to(z.device)[self._walk(z)[1]]

    def _level_size(self, level: int) -> int:
        return int(self._starts[level].diff().max())

    def _level_sizes(self) -> list[int]:
        return [self._level_size(level) for level in range(self.levels)]

    def _state(self) -> dict[str, Tensor]:
        return {
            f"{name}{level}": table
            for name, tables in (("centroids", self._centroids), ("starts", self._starts))
            for level, table in enumerate(tables)
        }

    def _restore(self, state: dict[str, Tensor]) -> None:
        self._centroids = [state[f"centroids{level}"] for level in range(self.levels)]
        self._starts = [state[f"starts{level}"] for level in range(self.levels)]

    def _config(self) -> dict:
        return super()._config() | {"iters": self.iters}


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
