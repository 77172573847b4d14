"""What only nearest_codeword owes: the same answer however it is asked for, and plain errors."""

import threading
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vqkernels as vq
from vqkernels import info
from vqkernels.reference.nearest_codeword import nearest_codeword as reference
from vqkernels.registry import AVAILABLE

KERNEL = AVAILABLE["nearest_codeword"]["cpu"] is True
needs_kernel = pytest.mark.skipif(not KERNEL, reason="the C++ kernels are not built")


def draw(kind: str, *shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    if kind == "clustered":
        x = x * 1e-3 + torch.randint(-5, 6, shape, generator=g)
    elif kind == "lognormal":
        x = (3 * x).exp()
    elif kind == "cauchy":
        x = x / torch.randn(*shape, generator=g, dtype=torch.float64)
    elif kind == "ties":
        x = torch.randint(-2, 3, shape, generator=g).double()
    elif kind == "far":
        x = x + 4096
    return x.float()


KINDS = ("gaussian", "clustered", "lognormal", "cauchy", "ties", "far")


def test_against_exact_rational_arithmetic():
    """Independent of every implementation of ours: Fractions have no rounding at all."""
    z, c = draw("gaussian", 12, 5), draw("gaussian", 9, 5, seed=1)
    c[7] = c[2]
    exact = [
        min(range(9), key=lambda k: (sum((Fraction(float(a)) - Fraction(float(b))) ** 2 for a, b in zip(row, c[k])), k))
        for row in z
    ]
    indices, distances = vq.nearest_codeword(z, c)
    assert indices.tolist() == exact
    assert torch.allclose(distances, (z - c[indices]).square().sum(-1))


def test_ties_go_to_the_lowest_index_across_tiles():
    c = torch.zeros(1000, 8)
    assert vq.nearest_codeword(torch.zeros(70, 8), c)[0].unique().tolist() == [0]
    c[:640] = 1.0
    assert vq.nearest_codeword(torch.zeros(70, 8), c)[0].unique().tolist() == [640]
    c[:] = draw("gaussian", 1, 8)
    c[-1] = 0
    assert vq.nearest_codeword(torch.zeros(70, 8), c)[0].unique().tolist() == [999]


@pytest.mark.parametrize("K", [4, 300])
def test_distances_are_of_the_sum_in_order(K):
    """Added in order, the first rows' small terms vanish one by one beside 1 + 2^-24, which rounds down; the last rows'
    are added first and lift it above the middle of two floats."""
    z = torch.full((2048, 64), 2.0**-27)
    z[:1024, 0] = z[1024:, -1] = 1
    z[:1024, 1] = z[1024:, -2] = 2.0**-12
    c = torch.full((K, 64), 10.0)
    c[K // 2] = 0
    indices, distances = vq.nearest_codeword(z, c)
    assert (indices == K // 2).all()
    assert (distances[:1024] == 1).all() and (distances[1024:] == 1 + 2.0**-23).all()
    z = torch.full((1024, 64), 2.0**-27)  # no row between two floats, but their mean
    z[:, 0] = 1
    z[::2, 1:3] = z[1::2, 1:7] = 2.0**-13
    assert vq.residual_quantize(z, c[None]).codebook_loss * 64 == 1


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", [0, 1, 2])
def test_distributions_against_reference(kind, metric):
    z, c = draw(kind, 1, 1500, 20), draw(kind, 1, 700, 20, seed=1)
    c[0, 300:350] = c[0, 100:150]
    got = torch.ops.vqkernels.nearest_codeword(z, c, None, metric, True)
    want = reference(z, c, None, metric, True)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("metric", [0, 1, 2])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("K", [160, 1100])
def test_closer_than_integers_can_tell(dtype, metric, offset, K):
    """Rows between two codewords, nearer to one by far less than coarse scores resolve, in 16 bits or (K = 1100) in
    bytes; far from the origin, where they resolve nothing, the fp32 pass must take over."""
    N, D = 3000, 33
    c = draw("gaussian", 1, K, D, seed=5) + offset
    first, second = torch.randint(K, (2, N), generator=torch.Generator().manual_seed(6))
    tilt = torch.linspace(-1e-4, 1e-4, N).unsqueeze(-1)
    z = ((c[0, first] + c[0, second]) / 2 + tilt * (c[0, first] - c[0, second]))[None]
    z, c = z.to(dtype), c.to(dtype)
    got, want = torch.ops.vqkernels.nearest_codeword(z, c, None, metric, True), reference(z, c, None, metric, True)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 70), K=st.integers(1, 300), D=st.integers(1, 70), kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6),
    scale=st.sampled_from([1.0, 1e-30, 1e30, 1e-42]),
)  # fmt: skip
def test_any_shape(N, K, D, kind, seed, scale):
    z, c = draw(kind, 1, N, D, seed=seed) * scale, draw(kind, 1, K, D, seed=seed + 1) * scale
    got, want = torch.ops.vqkernels.nearest_codeword(z, c, None, 0, True), reference(z, c, None, 0, True)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].nan_to_num(nan=-1), want[1].nan_to_num(nan=-1))


@needs_kernel
def test_more_than_two_to_the_31_pairs():
    N, K = 70_000, 32_768
    z, codebook = draw("gaussian", N, 8), draw("gaussian", K, 8, seed=1)
    indices, distances = vq.nearest_codeword(z, codebook)
    assert N * K > 2**31
    ends = torch.cat([torch.arange(40), torch.arange(N - 40, N)])
    want = reference(z[None, ends], codebook[None], None, 0, True)
    assert torch.equal(indices[ends], want[0][0])
    assert torch.equal(distances[ends], want[1][0])


class TestReproducible:
    """One million rows with ties and duplicated codewords: bit equal however they are computed."""

    N, K, D = 1_000_000, 96, 8

    @pytest.fixture(scope="class")
    @classmethod
    def data(cls):
        z = draw("gaussian", cls.N, cls.D)
        z[::3] = draw("ties", (cls.N + 2) // 3, cls.D)
        c = torch.cat([draw("ties", 48, cls.D, seed=2), draw("gaussian", 24, cls.D, seed=3)])
        c = torch.cat([c, c[20:44]])
        torch.set_num_threads(2)
        return z, c, vq.nearest_codeword(z, c)

    @staticmethod
    def assert_same(got, want):
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1].view(torch.int32), want[1].view(torch.int32))

    def test_reference_on_a_sample(self, data):
        z, c, (indices, distances) = data
        rows = torch.arange(0, self.N, 97)
        want = reference(z[rows][None], c[None], None, 0, True)
        self.assert_same((indices[rows][None], distances[rows][None]), want)

    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_threads(self, data, threads):
        z, c, want = data
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            self.assert_same(vq.nearest_codeword(z, c), want)
        finally:
            torch.set_num_threads(before)

    @needs_kernel
    def test_simd_levels(self, data):
        z, c, want = data
        before = torch.ops.vqkernels.simd_level(-1)
        try:
            for level in info.simd_levels():
                torch.ops.vqkernels.simd_level(info.SIMD.index(level))
                self.assert_same(vq.nearest_codeword(z, c), want)
        finally:
            torch.ops.vqkernels.simd_level(before)

    def test_ragged_batches(self, data):
        z, c, want = data
        sizes = [1, 2, 3, 5, 7, 64, 95, 97, 1023, 4099]
        pieces, start, i = [], 0, 0
        while start < self.N:
            stop = min(self.N, start + sizes[i % len(sizes)] * (1 + 40 * (i % 7 == 6)))
            pieces.append(vq.nearest_codeword(z[start:stop], c))
            start, i = stop, i + 1
        self.assert_same((torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])), want)

    @needs_kernel
    @pytest.mark.parametrize("rows", [100_000, pytest.param(N, marks=pytest.mark.slow)])
    def test_row_by_row(self, data, rows):
        z, c, want = data
        z, want = z[:rows], [w[:rows] for w in want]
        op, codebook = torch.ops.vqkernels.nearest_codeword.default, c[None]
        pieces = [op(row, codebook, None, 0, True) for row in z.unsqueeze(1).unsqueeze(1).unbind(0)]
        self.assert_same(
            (torch.cat([p[0] for p in pieces]).squeeze(1), torch.cat([p[1] for p in pieces]).squeeze(1)), want
        )

    def test_codebook_shards(self, data):
        """A codebook split over shards: the best of the shards' distances is the whole codebook's answer."""
        z, c, (indices, _) = data
        z, indices = z[:20000].double(), indices[:20000]
        parts = [vq.nearest_codeword(z, c[s : s + 32].double()) for s in (0, 32, 64)]
        d = torch.stack([p[1] for p in parts])
        first = (d == d.amin(0)).int().argmax(0)
        best = torch.stack([p[0] + s for p, s in zip(parts, (0, 32, 64))])
        assert torch.equal(best.gather(0, first[None])[0], indices)


def test_fast_precision_keeps_its_bound():
    z, c = draw("gaussian", 4000, 32), draw("gaussian", 500, 32, seed=1)
    fast, exact = vq.nearest_codeword(z, c, precision="fast"), vq.nearest_codeword(z, c)
    regret = (z.double() - c[fast[0]].double()).square().sum(-1) - (z.double() - c[exact[0]].double()).square().sum(-1)
    bound = 4 * 40 * 2.0**-24 * (z.norm(dim=-1) + c.norm(dim=-1).max()).square()
    assert (regret >= -1e-12).all() and (regret <= bound).all()


def test_leading_shapes_heads_and_mask():
    z, c = draw("gaussian", 2, 3, 5, 8), draw("gaussian", 4, 8, seed=1)
    indices, distances = vq.nearest_codeword(z, c)
    assert indices.shape == distances.shape == (2, 3, 5)
    assert torch.equal(indices.flatten(), vq.nearest_codeword(z.reshape(-1, 8), c)[0])
    heads = draw("gaussian", 2, 4, 8, seed=2)
    per_head = vq.nearest_codeword(z, heads)[0]
    assert torch.equal(per_head[1], vq.nearest_codeword(z[1], heads[1])[0])
    mask = torch.rand(2, 3, 5) < 0.5
    masked = vq.nearest_codeword(z, c, mask=mask)
    assert torch.equal(masked[0], torch.where(mask, indices, -1))
    assert torch.equal(masked[1], torch.where(mask, distances, 0.0))
    assert vq.nearest_codeword(z[0, 0, 0], c)[0].shape == ()
    assert vq.nearest_codeword(z[:, :0], c)[0].shape == (2, 0, 5)


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("N", [2, 300])
def test_finite_doubles_whose_sums_overflow(metric, N):
    """Sums that overflow tie at infinity; infinities of both signs, which only products have, leave a row undecided."""
    z, c = draw("gaussian", N, 8).double(), draw("gaussian", 40, 8, seed=1).double()
    z[::2] *= 1e200
    c[5:] *= 1e200
    want = reference(z[None], c[None], None, {"l2": 0, "dot": 2}[metric], True)
    index, distance = vq.nearest_codeword(z, c, metric=metric)
    assert torch.equal(index, want[0][0]) and torch.equal(distance.nan_to_num(-7.0), want[1][0].nan_to_num(-7.0))
    assert (index[::2] < 0).any() == (metric == "dot") and (index[1::2] >= 0).all()


def test_non_finite_rows_and_codewords():
    z, c = draw("gaussian", 6, 8), draw("gaussian", 5, 8, seed=1)
    z[1, 3], z[4, 0] = float("nan"), float("inf")
    c[vq.nearest_codeword(z[0], c)[0]] = float("nan")
    indices, distances = vq.nearest_codeword(z, c)
    assert indices[[1, 4]].tolist() == [-1, -1] and distances[[1, 4]].isnan().all()
    assert distances[[0, 2, 3, 5]].isfinite().all()
    assert not c[indices[[0, 2, 3, 5]]].isnan().any()


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: vq.nearest_codeword(torch.zeros(8, 64), torch.zeros(512, 63)), ValueError, "last dimensions .* differ, 64 against 63"),
        (lambda: vq.nearest_codeword(torch.zeros(8, 4), torch.zeros(0, 4)), ValueError, "at least one codeword"),
        (lambda: vq.nearest_codeword(torch.zeros(8, 0), torch.zeros(3, 0)), ValueError, "at least one codeword and one feature"),
        (lambda: vq.nearest_codeword(torch.zeros(8, 4), torch.zeros(4)), ValueError, r"expected z \[..., D\]"),
        (lambda: vq.nearest_codeword(torch.zeros(3, 8, 4), torch.zeros(2, 5, 4)), ValueError, "holds 2 heads"),
        (lambda: vq.nearest_codeword(torch.zeros(8, 4, dtype=torch.int32), torch.zeros(3, 4)), TypeError, "int32; allowed: float32"),
        (lambda: vq.nearest_codeword(torch.zeros(8, 4), torch.zeros(3, 4).double()), TypeError, "convert one with"),
        (lambda: vq.nearest_codeword(torch.zeros(8, 4), torch.zeros(3, 4, device="meta")), ValueError, "move one with"),
        (lambda: vq.nearest_codeword([[1.0]], torch.zeros(3, 1)), TypeError, "must be a torch.Tensor, got list"),
        (lambda: vq.nearest_codeword(torch.zeros(8, 4), torch.zeros(3, 4), metric="l1"), ValueError, "metric='l1' is unknown; allowed: 'l2', 'cosine'"),
        (lambda: vq.nearest_codeword(torch.zeros(8, 4), torch.zeros(3, 4), precision="max"), ValueError, "allowed: 'exact', 'fast'"),
        (lambda: vq.nearest_codeword(torch.zeros(8, 4), torch.zeros(3, 4), mask=torch.ones(8)), ValueError, "expected torch.bool"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def rows_and_nearest(codebook, seed, metric="l2"):
    """What the kernels say of a few rows, beside the reference; few enough for codebooks to be kept packed."""
    z = draw("gaussian", 40, codebook.shape[1], seed=seed)
    code = {"l2": 0, "cosine": 1, "dot": 2}[metric]
    return vq.nearest_codeword(z, codebook, metric=metric)[0], reference(z[None], codebook[None], None, code, True)[0][
        0
    ]


@needs_kernel
@pytest.mark.parametrize("K, D", [(64, 5), (300, 32), (3, 7)])
def test_a_codebook_written_in_place_is_seen(K, D):
    c = draw("gaussian", K, D)
    for step in range(24):
        for repeat in range(3):  # the second call keeps it packed, the third finds it
            found, nearest = rows_and_nearest(c, step)
            assert torch.equal(found, nearest), (step, repeat)
        at = (step * 7919) % (K * D) if step % 2 else K * D - 1  # first, last and other bytes, behind PyTorch's back
        c.detach().numpy().reshape(-1)[at] += 3.0


@needs_kernel
def test_kept_codebooks_are_told_apart():
    """The same bytes under other metrics, shapes and precisions, and more codebooks than are kept."""
    c = draw("gaussian", 96, 8)
    books = [c, c.reshape(48, 16), c.reshape(192, 4), *(draw("gaussian", 96, 8, seed=i) for i in range(1, 7))]
    for _ in range(4):
        for i, book in enumerate(books):
            for metric in ("l2", "dot", "cosine"):
                found, nearest = rows_and_nearest(book, i, metric)
                assert torch.equal(found, nearest), (i, metric)
    z = draw("gaussian", 40, 8)
    ordinary, double = vq.nearest_codeword(z, c), vq.nearest_codeword(z.double(), c.double())
    assert torch.equal(ordinary[0], double[0]) and double[1].dtype == torch.float64


@needs_kernel
def test_threads_with_codebooks_of_their_own():
    books = [draw("gaussian", 128, 16, seed=i) for i in range(8)]
    wrong = []

    def work(first):
        for step in range(60):
            i = (first + step // 3) % len(books)
            found, nearest = rows_and_nearest(books[i], step)
            if not torch.equal(found, nearest):
                wrong.append((first, step))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_kernel
def test_memory_is_linear_in_n():
    """Peak memory of a call, measured in a process of its own: nothing of the size N x K (here 2 GB) appears."""
    import subprocess
    import sys

    code = (
        "import torch, resource, vqkernels as vq\n"
        "z, c = torch.randn(65536, 32), torch.randn(8192, 32)\n"
        "vq.nearest_codeword(z[:64], c[:64])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "vq.nearest_codeword(z, c)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    kib = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert kib < 16 * 1024  # outputs take 0.75 MB, the packed codebook 1 MB
