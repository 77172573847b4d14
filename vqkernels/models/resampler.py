"""A few learned queries read a text's token states (the Q-Former of BLIP-2: Li et al. 2023, arXiv 2301.12597), and a
small decoder writes the text again from what they kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _layers(kind, depth: int, width: int, heads: int, dropout: float) -> nn.ModuleList:
    return nn.ModuleList(
        kind(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True) for _ in range(depth)
    )


class Resampler(nn.Module):
    """``queries`` learned vectors, ``depth`` blocks: self-attention among them, cross-attention to the token states,
    MLP. ``features``: of a token state; ``width``: of a query."""

    def __init__(self, features: int, *, width: int, queries: int, depth: int, heads: int, dropout: float):
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(features, elementwise_affine=False), nn.Linear(features, width))
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.blocks = _layers(nn.TransformerDecoderLayer, depth, width, heads, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Token states ``[B, T, features]`` and which are real, bool ``[B, T]`` -> ``[B, queries, width]``."""
        memory, x = self.project(states), self.queries.expand(len(states), -1, -1)
        for block in self.blocks:
            x = block(x, memory, memory_key_padding_mask=~mask)
        return self.norm(x)


class CaptionDecoder(nn.Module):
    """A causal transformer of one block, half as wide as the queries, that has their outputs before it and says each
    next word piece: a weak writer that has to listen.

    ``pieces``: size of the vocabulary, one embedding for input and output; ``longest``: most pieces of a text.
    """

    def __init__(self, pieces: int, *, width: int, queries: int, longest: int, heads: int, dropout: float):
        super().__init__()
        narrow = width // 2
        self.pieces = nn.Embedding(pieces, narrow)
        self.places = nn.Embedding(queries + longest, narrow)
        for table in (self.pieces, self.places):
            nn.init.normal_(table.weight, std=narrow**-0.5)
        self.prefix = nn.Linear(width, narrow)
        self.blocks = _layers(nn.TransformerEncoderLayer, 1, narrow, heads, dropout)
        self.norm = nn.LayerNorm(narrow)

    def forward(self, queries: Tensor, pieces: Tensor, mask: Tensor) -> Tensor:
        """Queries' outputs ``[B, Q, width]``, pieces ``[B, T]`` from the first mark on and which of them are real
        (padding behind) -> logits ``[n, vocabulary]`` of the ``n`` real pieces that follow another, text by text."""
        x = torch.cat([self.prefix(queries), self.pieces(pieces[:, :-1])], 1)
        length = x.shape[1]
        x = x + self.places.weight[:length]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, src_mask=later)
        # no piece sees what comes after it, so padding needs no mask; it is left out before the costly product
        return self.norm(x[:, queries.shape[1] :][mask[:, 1:]]) @ self.pieces.weight.T
