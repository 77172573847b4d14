"""The two searches that need more than the nearest codeword: k nearest, and the similarities as logits."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22  # scores held at a time


def chunks(z: Tensor, scores: int) -> tuple[Tensor, ...]:
    """z in chunks of rows, of so many scores each. A compiled graph has one chunk: it must fit every batch size."""
    return (z,) if torch.compiler.is_compiling() else z.split(max(1, _CHUNK // scores))


@torch.no_grad()
def nearest_k(z: Tensor, codebook: Tensor, k: int, metric: str) -> Tensor:
    """The k nearest codewords of every vector, nearest first: z ``[N, D]``, codebook ``[K, D]`` -> int64 ``[N, k]``.

    A coarse float32 pass keeps more than k candidates; these are ordered by their distance in float64, exact ties by
    index.
    """
    K, D = codebook.shape
    pool = min(K, 2 * k + 8)
    found = []
    with torch.autocast(z.device.type, enabled=False):
        for part in chunks(z, max(K, 2 * pool * D)):
            score = part @ codebook.T
            if metric == "l2":
                score = 2.0 * score - codebook.square().sum(-1)
            candidates = score.topk(pool, -1).indices.sort(-1).values
            codes, vector = codebook[candidates].double(), part.unsqueeze(-2).double()
            exact = (codes - vector).square().sum(-1) if metric == "l2" else -(codes * vector).sum(-1)
            found.append(candidates.gather(-1, least(exact, k)[1]))
    return torch.cat(found)


def least(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of the last dimension in ascending order, equal ones by index: values and indices."""
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return scores.topk(k, largest=False)  # ONNX has no stable sort, and its TopK orders equal values by index
    values, indices = scores.sort(dim=-1, stable=True)
    return values[..., :k], indices[..., :k]


def similarities(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """z ``[H, N, D]``, codebook ``[H, K, D]`` -> ``[H, N, K]``: dot product or minus distance. Differentiable."""
    with torch.autocast(z.device.type, enabled=False):
        dot = z @ codebook.mT
        if metric == "dot":
            return dot
        square = z.square().sum(-1, keepdim=True) + codebook.square().sum(-1).unsqueeze(-2) - 2.0 * dot
        return -square.clamp(min=1e-8).sqrt()
