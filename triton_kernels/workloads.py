"""Calls of every operator at the sizes of real models: what the report compiles and `vqkernels tune` measures."""

from __future__ import annotations

import torch

# N vectors, K codewords, D features, Q levels
_SEARCHES = (
    ("image tokenizer", 65536, 1024, 64),
    ("wide codewords", 16384, 8192, 256),
    ("small codewords", 65536, 16384, 8),
)
_RESIDUALS = (("semantic IDs", 65536, 4, 256, 32), ("audio codec", 32768, 8, 1024, 128))


def workloads(op: str, dtype: torch.dtype, device="cuda") -> list[tuple[str, tuple]]:
    """[(label, arguments of the raw operator)]; random data from torch's global generator, sizes only on "meta"."""
    return _WORKLOADS[op](dtype, device)


def _normal(dtype, device, *shape, scale=1.0):
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def _nearest_codeword(dtype, device):
    return [
        (f"{name} {N}×{K}×{D}", (_normal(dtype, device, 1, N, D), _normal(dtype, device, 1, K, D), None, 0, True))
        for name, N, K, D in _SEARCHES
    ]


def _residual(dtype, device):
    for name, N, Q, K, D in _RESIDUALS:
        books = [_normal(dtype, device, 1, K, D, scale=0.7**level) for level in range(Q)]
        yield f"{name} {N}×{Q}×{K}×{D}", _normal(dtype, device, 1, N, D), books


def _residual_quantize(dtype, device):
    return [(label, (z, books, None, 0)) for label, z, books in _residual(dtype, device)]


def _residual_quantize_backward(dtype, device):
    out = []
    for label, z, books in _residual(dtype, device):
        indices = torch.randint(books[0].shape[1], (*z.shape[:2], len(books)), device=device)
        scale = torch.ones(len(books), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
        out.append((label, (z, books, indices, torch.randn_like(z), scale, 1, False)))
    return out


def _rotation_trick_backward(dtype, device):
    return [
        (f"{N}×{D}", (*(_normal(dtype, device, N, D) for _ in range(3)), 1)) for N, D in ((262144, 64), (65536, 512))
    ]


def _codebook_usage(dtype, device):
    return [
        (f"{S} rows of {N}, {K} codes", (torch.randint(K, (S, N), device=device), K))
        for S, N, K in ((1, 1 << 22, 1024), (8, 1 << 18, 16384))
    ]


def _codeword_sums(dtype, device):
    return [
        (f"{N}×{K}×{D}", (_normal(dtype, device, 1, N, D), torch.randint(K, (1, N), device=device), K))
        for N, K, D in ((262144, 1024, 64), (65536, 8192, 256))
    ]


def _kmeans_plus_plus(dtype, device):
    return [
        (f"{N}×{K}×{D}", (_normal(dtype, device, N, D), torch.rand(K, 4, dtype=torch.float64, device=device)))
        for N, K, D in ((100_000, 256, 32),)
    ]


def _fsq(dtype, device):
    return [
        (f"{N}, levels {levels}", (_normal(dtype, device, N, len(levels)), levels))
        for N, levels in ((1 << 20, [8, 5, 5, 5]), (1 << 20, [8, 8, 8, 5, 5, 5]))
    ]


def _fsq_backward(dtype, device):
    return [(label, (z, torch.randn_like(z), levels)) for label, (z, levels) in _fsq(dtype, device)]


def _trie_topk(dtype, device):
    """The second step of three over a full trie: the root has V children, each of them W."""
    out = []
    for B, beams, V, W in ((256, 20, 256, 16), (64, 50, 1024, 8)):
        offsets = torch.cat(
            [
                torch.zeros(1, dtype=torch.int64, device=device),
                V + W * torch.arange(V + 1, device=device),
                torch.full((V * W,), V + V * W, device=device),
            ]
        )
        tokens = torch.cat([torch.arange(V, device=device), torch.arange(V * W, device=device) % W])
        children = torch.arange(1, 1 + V + V * W, device=device)
        scores = torch.zeros(B, beams, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
        states = torch.randint(1, V + 1, (B, beams), device=device)
        args = (_normal(dtype, device, B, beams, V), scores, states, offsets, tokens, children, beams)
        out.append((f"{B}×{beams} beams, {V} tokens", args))
    return out


_WORKLOADS = {
    function.__name__[1:]: function
    for function in (
        _nearest_codeword,
        _residual_quantize,
        _residual_quantize_backward,
        _rotation_trick_backward,
        _codebook_usage,
        _codeword_sums,
        _kmeans_plus_plus,
        _fsq,
        _fsq_backward,
        _trie_topk,
    )
}
