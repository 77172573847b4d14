"""What the Triton kernels of the small operators owe beyond the registry's cases; in Triton's interpreter under the
checking layer. Run by test_triton_ops.py, in a process of its own."""

import math

import triton_check  # before triton

# isort: split
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from vqkernels.triton_kernels import codebook_usage, codeword_sums, exponential, fsq, launcher, trie_topk

from vqkernels.registry import SPECS
from vqkernels.semantic_ids.trie import Trie

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def run(op, *args):
    with triton_check.checked(seed=0):
        return launcher(op)(*args)


def test_counts_with_and_without_histogram():
    indices = torch.randint(-2, 3000, (3, 1500))
    indices[1] = 7  # collapsed onto one code
    indices[2, ::2] = 2999
    for size in (1, 31, 2048, 2049, 3000):  # bins, atomics, indices beyond K skipped
        want = SPECS["codebook_usage"].reference(torch.where(indices < size, indices, -1), size)
        assert torch.equal(run("codebook_usage", indices, size), want), size


def sums_in_order(z, indices, K):
    """codeword_sums as documented: lanes of a piece by row, lanes by halves, pieces by lane, float64 throughout."""

    def halves(lanes):
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        return lanes[0]

    def lanes_of(rows):
        lanes = np.zeros((codeword_sums.LANES, rows.shape[-1]))
        for i, row in enumerate(rows):
            lanes[i % codeword_sums.LANES] += row
        return halves(lanes)

    out = torch.zeros(z.shape[0], K, z.shape[2], dtype=torch.float64)
    for h in range(z.shape[0]):
        for k in range(K):
            rows = z[h, indices[h] == k].double().numpy()
            pieces = [lanes_of(rows[i : i + codeword_sums.PIECE]) for i in range(0, len(rows), codeword_sums.PIECE)]
            if pieces:
                out[h, k] = torch.from_numpy(pieces[0] if len(pieces) == 1 else lanes_of(np.stack(pieces)))
    return out.to(torch.float64 if z.dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_added_in_the_documented_order(dtype):
    """Bit for bit, with codewords of many pieces, exactly one, one and a row, and none."""
    z = torch.randn(2, 1500, 5).to(dtype)
    indices = torch.full((2, 1500), 3)
    indices[0, :256], indices[0, 256:513], indices[0, 513:520] = 0, 1, 2
    indices[1] = torch.randint(-1, 5, (1500,))
    indices[1, 5] = 99  # beyond K: skipped
    order = torch.randperm(1500)
    z, indices = z[:, order], indices[:, order]
    sums, counts = run("codeword_sums", z, indices, 6)
    assert torch.equal(sums, sums_in_order(z, indices, 6))
    assert torch.equal(counts, torch.stack([(indices == k).sum(1) for k in range(6)], 1))


def test_results_do_not_depend_on_the_order_of_programs():
    z, indices = torch.randn(1, 600, 7), torch.randint(-1, 3, (1, 600))
    assert triton_check.in_any_order(lambda: codeword_sums.codeword_sums(z, indices, 3))
    assert triton_check.in_any_order(lambda: (codebook_usage.codebook_usage(indices, 3),))


def around(threshold, dtype):
    """A threshold rounded to dtype, with its neighbours."""
    middle = torch.tensor(threshold, dtype=torch.float64).to(dtype)
    infinity = torch.tensor(math.inf, dtype=dtype)
    return [torch.nextafter(middle, -infinity), middle, torch.nextafter(middle, infinity)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_are_exact_at_every_threshold(dtype):
    """Values at and beside each threshold, where a rounded tanh decides wrongly."""
    for count in (2, 3, 5, 8, 16, 17, 200):
        half, offset, width = (count - 1) * (1 + 1e-3) / 2, 0.0 if count % 2 else 0.5, count // 2
        steps = [math.atanh((v - width - 0.5 + offset) / half) - math.atanh(offset / half) for v in range(1, count)]
        z = torch.stack([x for step in steps for x in around(step, dtype)]).unsqueeze(1)
        for got, want in zip(run("fsq", z, [count]), SPECS["fsq"].reference(z, [count]), strict=True):
            assert torch.equal(got, want), count


def test_gradient_keeps_its_digits_where_tanh_saturates():
    z = torch.linspace(-50, 50, 401).unsqueeze(1)
    got, want = (
        run("fsq_backward", z, torch.ones_like(z), [5]),
        SPECS["fsq_backward"].reference(z.double(), torch.ones_like(z).double(), [5]),
    )
    normal = want > 1e-37
    assert ((got.double() / want - 1)[normal].abs() <= (10 + z.abs()[normal]) * 2**-23).all()
    assert (got[~normal].double() - want[~normal]).abs().max() < 1e-37


def test_tables_of_levels_are_made_once():
    fsq._tables.cache_clear()
    for _ in range(3):
        run("fsq", torch.randn(4, 2), [5, 4])
    assert fsq._tables.cache_info().misses == 1


@triton.jit
def _exp_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, exponential.exp_negative(tl.load(x + i)))


def test_exponential_to_two_units_in_the_last_place():
    x = torch.cat([-torch.rand(4000) * 87, -torch.rand(91), torch.tensor([0.0, -87.0, -88.0, -math.inf, math.nan])])
    y = torch.empty_like(x)
    with triton_check.checked():
        _exp_kernel[1,](x, y, 4096)
    want = x[:4093].double().exp()
    assert (y[:4093].double() / want - 1).abs().max() <= 2 * 2**-23
    assert y[4091] == 1 and y[4093] == y[4092] == y[4094] and y[4095] != y[4095]


def a_trie():
    generator = torch.Generator().manual_seed(3)
    return Trie(torch.unique(torch.randint(0, 40, (150, 2), generator=generator), dim=0), (40, 40))


def beam_arguments(dtype, k, B=3, W=4, V=40):
    trie = a_trie()
    states = torch.randint(0, 30, (B, W))
    states[0, 1], states[1, 0], states[2] = -1, 0, 0  # a dead beam, and roots with many children
    scores = torch.randn(B, W, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return torch.randn(B, W, V).to(dtype), scores, states, trie.row_offsets, trie.edge_tokens, trie.edge_children, k


def check_beams(got, args):
    want = SPECS["trie_topk"].reference(*args)
    for g, w in zip(got[1:], want[1:], strict=True):
        assert torch.equal(g, w)
    assert torch.allclose(got[0], want[0], rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_more_children_than_are_kept_at_once(dtype):
    for k in (1, 20, 200) if dtype == torch.float32 else (2, 9):
        args = beam_arguments(dtype, k)
        check_beams(run("trie_topk", *args), args)


def test_many_beams_go_the_way_of_float64(monkeypatch):
    monkeypatch.setattr(trie_topk, "MAX_K", 4)
    args = beam_arguments(torch.float32, 9)
    check_beams(run("trie_topk", *args), args)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_logits_that_are_not_finite(dtype):
    """-inf is no continuation; NaN and +inf make their beam NaN, which comes first, by (beam, token)."""
    logits, *rest = beam_arguments(dtype, 30)
    logits[0, 0, ::3] = -math.inf
    logits[0, 2] = -math.inf
    logits[1, 2, 5], logits[2, 1, 0], logits[2, 3, 39] = math.nan, math.inf, math.nan
    check_beams(run("trie_topk", logits, *rest), (logits, *rest))


def test_long_rows_take_several_blocks():
    logits, scores, states, *trie, k = beam_arguments(torch.float32, 7, V=2500)
    logits[0, 0, :1024] = -math.inf  # a first block without a finite value
    logits[0, 1, 2400] = 60.0
    args = (logits, scores, states, *trie, k)
    check_beams(run("trie_topk", *args), args)


def test_a_trie_that_does_not_fit_is_never_read_outside():
    logits, scores, states, offsets, tokens, children, k = beam_arguments(torch.float32, 12)
    states[0, 0] = 10**6  # no such node: dead
    tokens = torch.where(tokens == 7, 77, tokens)  # no such logit: no child
    for dtype in (torch.float32, torch.float64):
        _, beams, chosen, _ = run("trie_topk", logits.to(dtype), scores.to(dtype), states, offsets, tokens, children, k)
        assert not (beams[0] == 0).any() and not (chosen == 77).any()


@pytest.mark.parametrize("W,V", [(0, 5), (3, 0)])
def test_no_beams_and_no_tokens(W, V):
    trie = a_trie()
    args = torch.empty(2, W, V), torch.empty(2, W), torch.zeros(2, W, dtype=torch.int64)
    scores, *rest = run("trie_topk", *args, trie.row_offsets, trie.edge_tokens, trie.edge_children, 3)
    assert (scores == -math.inf).all() and all((t == -1).all() for t in rest)
