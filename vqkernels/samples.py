"""Inputs of the raw operators for tests and ``vqkernels verify``: ordinary samples, and edges where kernels break.

Every function takes a dtype and returns ``[(label, args)]``; drawn from a fixed seed, so they never change.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def _integers(high: int, *shape: int, seed: int = 0, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def _mask(*shape: int, seed: int = 7) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.7


def _misaligned(x: Tensor) -> Tensor:
    """The same values, contiguous, but starting one element into their storage."""
    storage = x.new_empty(x.numel() + 1)
    out = storage[1:].view(x.shape)
    out.copy_(x)
    return out


def nearest_codeword(dtype):
    out = []
    for metric in (0, 1, 2):
        for H, N, K, D in ((1, 300, 256, 32), (2, 65, 100, 17), (1, 40, 33, 130)):
            z, c = _randn(H, N, D, seed=1, dtype=dtype), _randn(H, K, D, seed=2, dtype=dtype)
            out.append((f"H{H} N{N} K{K} D{D} metric{metric}", (z, c, None, metric, True)))
    return out


def nearest_codeword_edges(dtype):
    out = []
    for N, K, D in ((0, 4, 3), (1, 1, 1), (1, 5, 7), (5, 1, 3), (7, 3, 1), (13, 17, 33), (97, 15, 16), (6, 4096, 2)):
        out.append(
            (
                f"N{N} K{K} D{D}",
                (_randn(1, N, D, seed=3, dtype=dtype), _randn(1, K, D, seed=4, dtype=dtype), None, 0, True),
            )
        )
    z, c = _randn(1, 50, 24, seed=5, dtype=dtype), _randn(1, 40, 24, seed=6, dtype=dtype)
    out.append(("misaligned", (_misaligned(z), _misaligned(c), None, 0, True)))
    out.append(("strided", (z[:, ::2, ::3], c[:, ::2, ::3], None, 0, True)))
    out.append(("expanded", (z[:, :1].expand(1, 9, 24), c, None, 0, True)))
    out.append(
        (
            "transposed",
            (_randn(1, 24, 50, seed=5, dtype=dtype).mT, _randn(1, 24, 40, seed=6, dtype=dtype).mT, None, 0, True),
        )
    )
    out.append(("mask", (z, c, _mask(1, 50), 0, True)))
    out.append(("all masked", (z, c, torch.zeros(1, 50, dtype=torch.bool), 0, True)))
    out.append(
        (
            "ties",
            (
                _integers(3, 1, 200, 4, low=-2).to(dtype),
                _integers(3, 1, 70, 4, seed=1, low=-2).to(dtype),
                None,
                0,
                True,
            ),
        )
    )
    out.append(("duplicated codewords", (z, c[:, :5].repeat(1, 9, 1), None, 0, True)))
    out.append(("all codewords equal", (z, c[:, :1].expand(1, 37, 24), None, 0, True)))
    hostile_z, hostile_c = z.clone(), c.clone()
    hostile_z[0, 3, 5], hostile_z[0, 4, 0], hostile_z[0, 9, 23] = float("nan"), float("inf"), float("-inf")
    hostile_c[0, 0, 0], hostile_c[0, 21, 7] = float("nan"), float("inf")
    for metric in (0, 1, 2):
        out.append((f"non-finite metric{metric}", (hostile_z, hostile_c, None, metric, True)))
    out.append(("no finite codeword", (z, torch.full_like(c, float("nan")), None, 0, True)))
    out.append(("zero vectors", (torch.zeros_like(z), torch.cat([c, torch.zeros_like(c[:, :1])], 1), None, 1, True)))
    if dtype in (torch.float32, torch.float64):
        out.append(("far from the origin", (z + 1000, c + 1000, None, 0, True)))
        for scale in (1e-38, 1e-30, 1e18, 1e30):
            out.append((f"scale {scale}", (z * scale, c * scale, None, 0, True)))
        out.append(("z and codebook of unlike scale", (z * 1e25, c * 1e-20, None, 0, True)))
        near = c[:, :1].expand(1, 16, 24).clone()
        near[0, torch.arange(16), torch.arange(16)] = torch.nextafter(near[0, 0, :16], torch.tensor(9e9, dtype=dtype))
        out.append(("one-ulp gaps", (z, near, None, 0, True)))
    return out


def _codebooks(dtype, H: int, sizes, D: int) -> list[Tensor]:
    return [_randn(H, K, D, seed=20 + i, dtype=dtype, scale=0.7**i) for i, K in enumerate(sizes)]


def residual_quantize(dtype):
    return [
        (
            f"H{H} N{N} K{sizes} D{D} metric{metric}",
            (_randn(H, N, D, seed=8, dtype=dtype), _codebooks(dtype, H, sizes, D), None, metric),
        )
        for metric, H, N, sizes, D in (
            (0, 1, 300, (64, 64, 64), 32), (0, 2, 65, (5, 130, 17), 9), (1, 1, 50, (33, 20), 16), (2, 1, 50, (33,), 16)
        )
    ]  # fmt: skip


def residual_quantize_edges(dtype):
    z, books = _randn(1, 50, 24, seed=9, dtype=dtype), _codebooks(dtype, 1, (16, 7), 24)
    hostile = z.clone()
    hostile[0, 2, 1], hostile[0, 30, 0] = float("nan"), float("inf")
    return [
        ("N0", (z[:, :0], books, None, 0)),
        ("N1 K1 D1", (z[:, :1, :1], [books[0][:, :1, :1]], None, 0)),
        ("shared codebook", (z, [books[0]] * 4, None, 0)),
        ("mask", (z, books, _mask(1, 50), 0)),
        ("all masked", (z, books, torch.zeros(1, 50, dtype=torch.bool), 0)),
        ("non-finite rows", (hostile, books, None, 0)),
        ("strided", (z[:, ::3, ::2], [b[:, :, ::2] for b in books], None, 0)),
        ("misaligned", (_misaligned(z), [_misaligned(b) for b in books], None, 0)),
    ]


def residual_quantize_backward(dtype):
    out = []
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for estimator in (0, 1, 2):
        for per_level in (False, True):
            z, books = _randn(2, 70, 19, seed=10, dtype=dtype), _codebooks(dtype, 2, (31, 8, 12), 19)
            indices = torch.stack([_integers(K, 2, 70, seed=K) for K in (31, 8, 12)], -1)
            indices[0, 5] = -1
            args = (
                z,
                books,
                indices,
                _randn(2, 70, 19, seed=11, dtype=dtype),
                torch.tensor([0.5, 0.0, 2.0], dtype=scale_dtype),
            )
            out.append((f"estimator{estimator} per_level{per_level}", (*args, estimator, per_level)))
    return out


def residual_quantize_backward_edges(dtype):
    _, (z, books, indices, grad, scale, *_) = residual_quantize_backward(dtype)[0]
    return [
        ("N0", (z[:, :0], books, indices[:, :0], grad[:, :0], scale, 1, False)),
        # one level and no commitment: with D=1 the parts of a sum cancel, and its error is large against the row
        ("D1", (z[:, :, :1], [books[0][:, :, :1]], indices[:, :, :1], grad[:, :, :1], 0 * scale[:1], 1, True)),
        ("all rows skipped", (z, books, torch.full_like(indices, -1), grad, scale, 1, False)),
        ("strided", (z[:, ::2], books, indices[:, ::2], grad[:, ::2], scale, 1, False)),
        ("expanded grad", (z, books, indices, grad[:, :1].expand_as(z), scale, 1, True)),
    ]


def rotation_trick_backward(dtype):
    return [
        (f"N{N} D{D} estimator{e}", (*(_randn(N, D, seed=12 + i, dtype=dtype) for i in range(3)), e))
        for e in (0, 1, 2)
        for N, D in ((100, 64), (37, 33), (5, 1), (3, 1000))
    ]


def rotation_trick_backward_edges(dtype):
    z, q, g = (_randn(40, 24, seed=15 + i, dtype=dtype) for i in range(3))
    zero, out = torch.zeros_like(z), []
    for e in (1, 2):
        out += [
            (f"N0 estimator{e}", (z[:0], q[:0], g[:0], e)),
            (f"zero z estimator{e}", (zero, q, g, e)),
            (f"zero q estimator{e}", (z, zero, g, e)),
            (f"z = q estimator{e}", (z, z, g, e)),
            (f"z = -q estimator{e}", (z, -z, g, e)),
            (f"strided estimator{e}", (z[::2, ::3], q[::2, ::3], g[::2, ::3], e)),
            (f"misaligned estimator{e}", (_misaligned(z), _misaligned(q), _misaligned(g), e)),
            (f"expanded grad estimator{e}", (z, q, g[:1].expand_as(z), e)),
        ]
    return out


def codebook_usage(dtype):
    return [
        (f"S{S} N{N} K{K}", (_integers(K, S, N, low=-1), K))
        for S, N, K in ((1, 1000, 256), (3, 777, 10), (2, 50000, 70000))
    ]


def codebook_usage_edges(dtype):
    indices = _integers(9, 4, 60, low=-1)
    return [
        ("N0", (indices[:, :0], 9)),
        ("K1", (torch.zeros(1, 5, dtype=torch.int64), 1)),
        ("all skipped", (torch.full((2, 33), -1), 4)),
        ("strided", (indices[::2, ::3], 9)),
        ("expanded", (indices[:1].expand(5, 60), 9)),
        ("one code only", (torch.full((1, 4097), 3), 9)),
    ]


def codeword_sums(dtype):
    return [
        (f"H{H} N{N} K{K} D{D}", (_randn(H, N, D, seed=18, dtype=dtype), _integers(K, H, N, low=-1), K))
        for H, N, K, D in ((1, 1000, 64, 32), (3, 200, 10, 17), (1, 30, 500, 5))
    ]


def codeword_sums_edges(dtype):
    z, indices = _randn(2, 64, 12, seed=19, dtype=dtype), _integers(6, 2, 64, low=-1)
    return [
        ("N0", (z[:, :0], indices[:, :0], 6)),
        ("K1 D1", (z[:, :, :1], torch.zeros_like(indices), 1)),
        ("all skipped", (z, torch.full_like(indices, -1), 6)),
        ("strided", (z[:, ::3, ::2], indices[:, ::3], 6)),
        ("expanded", (z[:, :1].expand(2, 64, 12), indices, 6)),
        ("misaligned", (_misaligned(z), indices, 6)),
    ]


def _uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kmeans_plus_plus(dtype):
    centres = _randn(40, 19, seed=31, dtype=dtype, scale=4.0)
    clustered = centres[_integers(40, 1300, seed=32)] + _randn(1300, 19, seed=33, dtype=dtype)
    return [
        (f"L{L}", (x, _uniform(25, L, seed=34)))
        for L, x in ((1, clustered), (6, clustered), (3, _randn(400, 8, seed=35, dtype=dtype)))
    ]


def kmeans_plus_plus_edges(dtype):
    x = _randn(30, 6, seed=36, dtype=dtype)
    return [
        ("K0", (x, _uniform(0, 2, seed=37))),
        ("N1", (x[:1], _uniform(3, 2, seed=37))),
        ("all rows", (x[:12], _uniform(12, 2, seed=37))),
        ("few distinct rows", (x[:3].repeat(10, 1), _uniform(8, 3, seed=37))),
        ("strided", (x[::2, ::3], _uniform(5, 2, seed=37))),
        ("misaligned", (_misaligned(x), _uniform(5, 2, seed=37))),
    ]


_LEVELS = ([8, 5, 5, 5], [3, 3, 3], [2], [7, 4], [17, 3], [2000, 2])  # few, many and too many levels to compare


def fsq(dtype):
    return [
        (f"levels {levels}", (_randn(200, len(levels), seed=21, dtype=dtype, scale=2.0), levels)) for levels in _LEVELS
    ]


def fsq_edges(dtype):
    z = _randn(60, 8, seed=22, dtype=dtype)
    return [
        ("N0", (z[:0, :2], [3, 4])),
        ("strided", (z[::2, ::4], [3, 4])),
        ("saturated", (torch.tensor([[-1e4, 1e4], [0.0, 0.0]], dtype=dtype), [5, 4])),
        ("infinite", (torch.tensor([[-torch.inf, torch.inf], [0.0, torch.inf]], dtype=dtype), [5, 4])),
        ("NaN", (torch.where(z[:, :3] > 1, torch.nan, z[:, :3]), [5, 4, 3])),
    ]


def fsq_backward(dtype):
    return [(label, (z, _randn(*z.shape, seed=23, dtype=dtype), levels)) for label, (z, levels) in fsq(dtype)]


def fsq_backward_edges(dtype):
    return [(label, (z, _randn(*z.shape, seed=24, dtype=dtype), levels)) for label, (z, levels) in fsq_edges(dtype)]


def _trie():
    """The trie of (0,1) (0,3) (2,0) (2,1) (2,4), tokens 0..4: root 0, then {0: 1, 2: 2}, then leaves 3..7."""
    offsets = torch.tensor([0, 2, 4, 7, 7, 7, 7, 7, 7])
    return offsets, torch.tensor([0, 2, 1, 3, 0, 1, 4]), torch.tensor([1, 2, 3, 4, 5, 6, 7])


def trie_topk(dtype):
    logits, scores = _randn(3, 2, 5, seed=25, dtype=dtype), _randn(3, 2, seed=26, dtype=torch.float32)
    scores = scores.to(torch.float64) if dtype == torch.float64 else scores
    states = torch.tensor([[1, 2], [2, 2], [0, 1]])
    return [(f"k{k}", (logits, scores, states, *_trie(), k)) for k in (1, 3, 20)]


def trie_topk_edges(dtype):
    _, (logits, scores, states, *trie, _) = trie_topk(dtype)[0]
    hostile = logits.clone()
    hostile[0, 0, 1], hostile[0, 1], hostile[1, 0, 4], hostile[2, 1, 2] = -torch.inf, -torch.inf, torch.inf, torch.nan
    V = 605
    wide, flat = _randn(3, 2, V, seed=27, dtype=dtype), torch.zeros(V + 2, dtype=torch.int64)
    flat[1:] = V
    flat = flat, torch.arange(V), torch.arange(1, V + 1)
    return [
        ("B0", (logits[:0], scores[:0], states[:0], *trie, 2)),
        ("dead beams", (logits, scores, torch.tensor([[-1, 2], [-1, -1], [3, 1]]), *trie, 4)),
        ("ties", (torch.zeros_like(logits), torch.zeros_like(scores), states, *trie, 4)),
        ("no such node", (logits, scores, torch.tensor([[8, 2], [99, 1], [0, 7]]), *trie, 3)),
        ("masked children", (logits, scores, states, trie[0], torch.tensor([0, -1, -1, 3, -1, 1, 4]), trie[2], 5)),
        ("non-finite logits", (hostile, scores, torch.tensor([[2, 2], [2, 1], [0, 2]]), *trie, 6)),
        ("every token a child", (wide, scores, torch.zeros_like(states), *flat, 40)),
    ]
