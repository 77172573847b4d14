"""Implicit neural codebooks (QINCo): the codewords of a level depend on what the levels before it chose."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .choice import Sampling, candidate_similarities, gumbel_noise
from .codebook import normalize
from .search import chunks


class ImplicitCodebook(nn.Module):
    """Maps a codeword and a condition, the sum of the codewords chosen so far, to the codeword that is used.

    Args:
        dim: features of a codeword.
        dim_hidden: features of the hidden layers; None: ``dim``.
        depth: residual blocks.
        unit: codewords are unit vectors, compared by their dot product.

    Source: Huijben et al. 2024 (arXiv 2401.14732).
    """

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4, unit: bool = False):
        super().__init__()
        hidden = dim if dim_hidden is None else dim_hidden
        self.unit, self.widest = unit, max(dim, hidden)
        self.proj_in = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)) for _ in range(depth)
        )

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """codes and condition ``[..., D]``, broadcast against each other -> ``[..., D]``, in the dtype of codes."""
        weight = self.proj_in.weight
        for_condition, for_codes = weight.chunk(2, -1)  # each half multiplies its own, unrepeated input
        with torch.autocast(codes.device.type, enabled=False):
            x = F.linear(condition.to(weight.dtype), for_condition)
            x = x + F.linear(codes.to(weight.dtype), for_codes, self.proj_in.bias)
            for layer in self.layers:
                x = layer(x) + x
            x = normalize(x) if self.unit else x
        return x.to(codes.dtype)

    def chosen(self, codebook: Tensor, indices: Tensor, condition: Tensor) -> Tensor:
        """Codebook ``[K, D]``, indices ``[...]`` (negative ones stand for any), condition ``[..., D]`` -> ``[..., D]``:
        only the codewords asked for are computed."""
        return self(F.embedding(indices.clamp(min=0), codebook), condition)

    def candidates(self, condition: Tensor) -> Callable[[Tensor], Tensor]:
        """For ``codebook_transform_fn`` of :class:`VectorQuantize`: condition ``[B, ..., D]`` -> a function from the
        codebook ``[1, K, D]`` to every token's own ``[1, B, N, K, D]``."""
        # a row that is no number has no part in any loss, but 0 times what it makes of the codewords would
        condition = condition.nan_to_num(0.0, 0.0, 0.0)
        shape = 1, condition.shape[0], math.prod(condition.shape[1:-1]), 1, condition.shape[-1]
        return lambda codebook: self(codebook[:, None, None], condition.reshape(shape))

    def similarities(self, z: Tensor, codebook: Tensor, condition: Tensor) -> Tensor:
        """z and condition ``[..., N, D]``, codebook ``[..., K, D]`` -> to all codewords ``[..., N, K]``."""
        codes = self(codebook.unsqueeze(-3), condition.unsqueeze(-2))
        return candidate_similarities(z, codes, "dot" if self.unit else "l2")

    @torch.no_grad()
    def nearest(self, z: Tensor, codebook: Tensor, condition: Tensor, k: int, sampling: Sampling) -> Tensor:
        """The k nearest codewords, or k drawn by their similarities: z and condition ``[N, D]`` -> int64 ``[N, k]``.

        A chunk of vectors at a time, so that the N x K codewords never exist together.
        """
        found, size = [], len(codebook) * self.widest
        for vectors, conditions in zip(chunks(z, size), chunks(condition, size), strict=True):
            score = self.similarities(vectors, codebook, conditions)
            if sampling.noise:
                score = score / sampling.temperature
                score = score + gumbel_noise(score)
            found.append(score.topk(k, -1).indices if k > 1 else score.argmax(-1, keepdim=True))
        return torch.cat(found)
