"""Inputs for the emulated CUDA kernels beside the registry's: those that reach every kernel and every branch of a launcher.

{operator: a function of the dtype that returns [(label, args)]}; samples.py has the tools.
"""

from __future__ import annotations

import math

import torch
from hostile_search import hostile_search

from vqkernels.samples import _integers, _misaligned, _randn


def rotation_trick_backward(dtype):
    """One and two pieces a lane, and rows that are read again; the whole number of pieces and not."""
    width = 16 // dtype.itemsize
    z, q, g = (_randn(9, 24, seed=110 + i, dtype=dtype) for i in range(3))
    apart = (
        []
        if dtype == torch.float16
        else [("lengths too far apart", (z, q * 2.0**24, g, 1)), ("and the other way", (z * 2.0**24, q, g, 2))]
    )
    return apart + [
        (f"N{N} D{D} estimator{e}", (*(_randn(N, D, seed=51 + i, dtype=dtype) for i in range(3)), e))
        for N, D, e in ((9, 32 * width, 1), (9, 33 * width, 2), (3, 64 * width, 1), (3, 65 * width, 2), (30, 4096, 1))
    ]


def codebook_usage(dtype):
    return [
        ("more columns than a block counts", (_integers(5, 1, 9000, seed=52, low=-1), 5)),
        ("too many codes for shared memory", (_integers(13000, 1, 900, seed=53, low=-1), 13000)),
        ("misaligned", (_misaligned(_integers(9, 2, 33, seed=54)), 9)),
        ("codes of K and more", (_integers(14, 2, 200, seed=96, low=-2), 9)),
    ]


def codeword_sums(dtype):
    """Several tiles and passes of the sort; codewords of one piece, of two and of more than there are lanes."""
    z = _integers(9, 1, 5000, 3, seed=55, low=-9).to(dtype)  # exact sums, whatever the order
    codes = _integers(70, 1, 5000, seed=56, low=-3).clamp(min=-1)
    few = torch.where(_integers(9, 1, 700, seed=57) > 0, 2, 0)
    many = _integers(300, 2, 900, seed=58)
    piece = torch.tensor([0] * 256 + [1] * 257 + [3] * 256)[_integers(2**40, 769, seed=109).argsort()][None]
    out = [
        ("several tiles", (z, codes, 70)),
        ("a piece and two places", (_randn(1, 700, 40, seed=59, dtype=dtype), few, 3)),
        ("two passes", (_randn(2, 900, 9, seed=60, dtype=dtype), many, 300)),
        ("just a piece, and a row more", (_integers(9, 1, 769, 8, seed=101, low=-9).to(dtype), piece, 4)),
        ("misaligned", (_misaligned(_randn(1, 70, 16, seed=61, dtype=dtype)), codes[:, :70], 70)),
        ("more columns than a block", (_randn(1, 20, 300, seed=62, dtype=dtype), codes[:, :20] % 3, 3)),
        ("codes of K and more", (_randn(2, 90, 4, seed=97, dtype=dtype), _integers(14, 2, 90, seed=98, low=-2), 9)),
    ]
    if dtype == torch.float32:
        out.append(("collapsed", (z[..., :2].contiguous(), torch.full((1, 5000), 1), 2)))
        most = _integers(9, 1, 67000, 1, seed=94, low=-9).float()  # more tiles than a warp has lanes
        out.append(("33 tiles", (most, _integers(200, 1, 67000, seed=95), 200)))
        out.append(("three passes", (z[:, :60, :1].contiguous(), codes[:, :60] * 1000, 70000)))
        out.append(("D0", (z[..., :0], codes, 70)))
    return out


def fsq(dtype):
    """One feature and thirty, more thresholds than fit into small arguments, several tiles."""
    cases = [(600, [5] * 2), (300, [2] * 30), (70, [1000, 700]), (40, [1025, 3, 1024]), (33, [4] * 8)]
    out = [(f"N{N} levels {levels}", (_randn(N, len(levels), seed=63, dtype=dtype), levels)) for N, levels in cases]
    z = _randn(50, 8, seed=64, dtype=dtype)
    out.append(("misaligned", (_misaligned(z), [4] * 8)))
    steps = torch.tensor([-1.0, 0.0, 1.0]).to(dtype)  # values on both sides of a threshold and on it
    on = torch.tensor([math.atanh(v / (1 + 1e-3)) for v in (-0.75, -0.25, 0.25, 0.75)]).to(dtype)
    out.append(("near thresholds", (torch.nextafter(on[:, None], on[:, None] + steps).reshape(-1, 1), [5])))
    return out


def fsq_backward(dtype):
    return [
        (label, (z, _misaligned(_randn(*z.shape, seed=65, dtype=dtype)), levels)) for label, (z, levels) in fsq(dtype)
    ]


def residual_quantize_backward(dtype):
    """Few rows; rows that sixteen warps share, of whole pieces and not; one codebook for all levels; many levels."""
    scale, out = torch.tensor([0.5, 0.25], dtype=torch.float64 if dtype == torch.float64 else torch.float32), []
    rows = (
        (200, 1, False),
        (208, 1, True),
        (264, 1, False),
        (515, 2, True),
        (1024, 1, True),
        (4096, 1, False),
        (257, 0, False),
    )
    for D, e, per_level in rows:
        N, K = (3, 10) if D < 256 else (2, 4)
        z, g = (_randn(1, N, D, seed=66 + i, dtype=dtype) for i in range(2))
        books = [_randn(1, K, D, seed=68 + i, dtype=dtype) for i in range(2)]
        indices = _integers(K, 1, N, 2, seed=70)
        indices[0, 1, 0] = -(D % 2)  # a row that is skipped, or not
        out.append((f"D{D} estimator{e} per_level{per_level}", (z, books, indices, g, scale, e, per_level)))
    indices = torch.tensor([[[0, 1], [4, 0], [1, 4], [-1, 5], [2, 3]]])  # of five rows and four codewords
    z, book = _randn(1, 5, 12, seed=99, dtype=dtype), _randn(1, 4, 12, seed=100, dtype=dtype)
    out.append(("indices of K and more", (z, [book] * 2, indices, z.flip(1), scale, 1, False)))
    z, book = _randn(2, 9, 12, seed=71, dtype=dtype), _randn(2, 7, 12, seed=72, dtype=dtype, scale=0.2)
    indices, levels = _integers(7, 2, 9, 20, seed=73), scale[:1].repeat(20) * 0.1
    out.append(("one codebook, 20 levels", (z, [book] * 20, indices, z.flip(1), levels, 1, False)))
    z, book = _misaligned(z[..., :8].contiguous()), _misaligned(book[..., :8].contiguous())
    out.append(("misaligned", (z, [book], indices[..., :1].contiguous(), z.flip(1), scale[:1], 1, True)))
    return out


def _wide_trie(tokens: int, depth: int):
    """A trie whose first nodes have many children, ascending and with gaps."""
    counts = [tokens, tokens // 2, 1, 0] + [3] * depth
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    draw = lambda n: torch.randperm(tokens, generator=torch.Generator().manual_seed(n))[:n].sort().values  # noqa: E731
    edges = torch.cat([draw(n) for n in counts])
    return offsets, edges, torch.arange(len(edges)) % (len(counts) - 1)


def trie_topk(dtype):
    """Thousands of candidates, all keys alike in their upper part, NaN and infinite logits, more results than children."""
    trie = _wide_trie(301, 6)
    S = trie[0].shape[0] - 1
    logits, scores = _randn(2, 9, 301, seed=74, dtype=dtype), _randn(2, 9, seed=75, dtype=torch.float64)
    scores = scores if dtype == torch.float64 else scores.float()
    states = _integers(S, 2, 9, seed=76, low=-1)
    states[:, :3] = torch.tensor([0, 1, 0])
    hostile = logits.clone()
    hostile[0, 0, 5], hostile[0, 1, 7], hostile[1, 0, :200], hostile[1, 1] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.inf,
    )
    flat = torch.zeros_like(logits), torch.zeros_like(scores)
    return [
        *((f"k{k}", (logits, scores, states, *trie, k)) for k in (1, 40, 700)),
        ("one beam", (_misaligned(logits[:, :1].contiguous()), scores[:, :1], states[:, :1], *trie, 17)),
        ("300 alike", (*flat, torch.zeros_like(states), *trie, 300)),
        ("hostile logits", (hostile, scores, states, *trie, 500)),
        ("more results than finite ones", (hostile[:, :1].contiguous(), scores[:, :1], states[:, :1], *trie, 400)),
        (
            "hostile scores",
            (
                logits,
                torch.where(scores > 1, torch.inf, torch.where(scores < -1, -torch.inf, scores)),
                states,
                *trie,
                60,
            ),
        ),
        ("whole pieces", (logits[..., :288].contiguous(), scores, states, *trie[:1], trie[1] % 288, trie[2], 9)),
    ]


def unlike(N: int, D: int, dtype):
    """Rows too large, too small and of a size to be compared with codewords around one."""
    scales = torch.tensor([2.0**63, 2.0**-70, 1.0, 1.0] if dtype != torch.float16 else [1.0], dtype=torch.float64)
    return (_randn(1, N, D, seed=103, dtype=torch.float64) * scales.repeat(N)[:N, None]).to(dtype)


def nearest_codeword(dtype):
    """Rows of one, two and more chunks, several heads and tiles, a codebook in parts, more listed rows than a block;
    the same for few features."""
    out = []
    for label, H, N, K, D, metric in (
        ("three chunks", 1, 20, 300, 160, 0),
        ("four chunks", 1, 50, 140, 200, 0),
        ("two chunks", 1, 20, 260, 72, 2),
        ("heads", 3, 20, 140, 40, 0),
        ("unit rows", 2, 30, 130, 33, 1),
        ("few features", 2, 130, 140, 5, 0),
        ("few features, dot", 1, 600, 30, 12, 2),
    ):
        z, c = _randn(H, N, D, seed=77, dtype=dtype), _randn(H, K, D, seed=78, dtype=dtype)
        out.append((label, (z, c, None, metric, True)))
    c = _randn(1, 1, 24, seed=79) + _randn(1, 40, 24, seed=80, scale=2.0**-7)
    z = c[:, _integers(40, 150, seed=81)] + _randn(1, 150, 24, seed=82, scale=2.0**-8)
    out.append(("many alike", (z.to(dtype), c.to(dtype), None, 0, True)))
    c, z = c[..., :11].contiguous(), z[..., :11].contiguous()
    out.append(("few features, many alike", (z.repeat(1, 2, 1).to(dtype), c.to(dtype), None, 0, True)))
    c = _randn(1, 1, 11, seed=79) + _randn(1, 40, 11, seed=80, scale=2.0**-20)
    out.append(("few features, nearly equal", (z.repeat(1, 2, 1).to(dtype), c.to(dtype), None, 0, True)))
    for D in (32, 11):
        z, c = unlike(60, D, dtype), _randn(1, 140, D, seed=102, dtype=dtype)
        c[0, 0, 3], c[0, 100, 0] = torch.nan, torch.inf
        out.append((f"D{D}, rows out of scale", (z, c, None, 0, True)))
        out.append((f"D{D}, rows out of scale, fast", (z, c, None, 0, False)))
        if dtype == torch.float64:  # squares that no bound covers; sums of infinities
            out.append((f"D{D}, beyond safe exponents", (z * 1e140, c * 1e140, None, 0, True)))
            out.append((f"D{D}, sums that are not numbers", (z * 1e200, c * 1e200, None, 2, True)))
    for D, apart in ((24, 2.0**-16), (11, 2.0**-22)):  # codewords 2 k and 2 k + 1, whose scores one thread keeps
        c = _randn(1, 80, D, seed=106, dtype=torch.float64)
        c = torch.stack([c, c + _randn(1, 80, D, seed=107, dtype=torch.float64) * apart], 2).flatten(1, 2)
        out.append((f"D{D}, twins", (_randn(1, 70, D, seed=108, dtype=dtype), c.to(dtype), None, 0, True)))
    c = _randn(1, 150, 20, seed=83, dtype=dtype)
    out.append(("fast", (c[:, ::3].contiguous() * 1.25, c, None, 0, False)))
    return out


def residual_quantize(dtype):
    """Rows of one, two, three and more chunks, more levels than a launch sets, two blocks of rows, codewords all alike."""
    z, books = _randn(1, 40, 200, seed=84, dtype=dtype), [_randn(1, K, 200, seed=K, dtype=dtype) for K in (130, 20)]
    out = [("four chunks", (z, books, None, 0))]
    z, books = _randn(1, 30, 160, seed=88, dtype=dtype), [_randn(1, K, 160, seed=K, dtype=dtype) for K in (30, 60)]
    out.append(("three chunks", (z, books, None, 0)))
    z, books = _randn(2, 20, 72, seed=85, dtype=dtype), [_randn(2, K, 72, seed=K, dtype=dtype) for K in (60, 20)]
    out.append(("two chunks", (z, books, None, 1)))
    z, book = _randn(1, 140, 18, seed=86, dtype=dtype), _randn(1, 9, 18, seed=87, dtype=dtype, scale=0.3)
    out.append(("ten levels", (z, [book] * 9 + [book[:, :7]], None, 0)))
    book = book[:, :1].expand(1, 30, 18)
    out.append(("all alike", (z, [book, book], None, 2)))
    books = [_randn(1, K, 24, seed=K, dtype=dtype) for K in (70, 20)]
    books[0][0, 0, 3] = torch.nan
    z = unlike(40, 24, dtype)
    out.append(("rows out of scale", (z, books, None, 0)))
    if dtype == torch.float64:
        # rows of the second head end in its second level, with residuals above the largest number
        far = [torch.full((1, K, 24), x, dtype=dtype) for K, x in ((60, -6e307), (40, -1.2e308))]
        ends = [torch.cat([_randn(1, x.shape[1], 24, seed=105, dtype=dtype), x]) for x in far]
        last = torch.cat([_randn(1, 40, 24, seed=104, dtype=dtype), torch.full((1, 40, 24), 6e307, dtype=dtype)])
        for n in (40, 3):
            out.append(("sums that are not numbers", (z[:, :n] * 1e200, [b * 1e200 for b in books], None, 2)))
            out.append(("residuals that overflow", (last[:, :n], ends, None, 0)))
    return out


TILES_MATTER = ("three chunks", "four chunks")  # these run on one device of each kind

CASES = {
    "nearest_codeword": nearest_codeword,
    "residual_quantize": residual_quantize,
    "rotation_trick_backward": rotation_trick_backward,
    "codebook_usage": codebook_usage,
    "codeword_sums": codeword_sums,
    "fsq": fsq,
    "fsq_backward": fsq_backward,
    "residual_quantize_backward": residual_quantize_backward,
    "trie_topk": trie_topk,
}


def more_cases(op: str, dtype) -> list:
    return CASES.get(op, lambda dtype: [])(dtype) + hostile_search(dtype).get(op, [])
