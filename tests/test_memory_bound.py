"""The memory-bound CPU kernels: the same bits at every SIMD level and thread count, and the values of the reference, on
sizes that take the large-input paths (stores past the cache, many chunks, codewords split by columns)."""

import pytest
import torch

from vqkernels import info
from vqkernels.registry import AVAILABLE, SPECS, _ops

pytestmark = pytest.mark.skipif(
    AVAILABLE["codeword_sums"]["cpu"] is not True, reason=f"no C++ kernels: {AVAILABLE['codeword_sums']['cpu']}"
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def everywhere(name, *args):
    """The kernel's outputs at every SIMD level with 1 and 2 threads."""
    simd_level, threads = _ops.ops.simd_level, torch.get_num_threads()
    try:
        for level in info.simd_levels():
            for count in (1, 2):
                simd_level(info.SIMD.index(level))
                torch.set_num_threads(count)
                out = SPECS[name].op.default(*args)
                yield (level, count), out if isinstance(out, tuple) else (out,)
    finally:
        simd_level(len(info.SIMD))
        torch.set_num_threads(threads)


def same_everywhere(name, *args):
    (_, first), *rest = everywhere(name, *args)
    for where, out in rest:
        for a, b in zip(first, out, strict=True):
            # as bytes: NaN equals NaN, and -0 is not 0
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), where
    return first if len(first) > 1 else first[0]


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got, want, dtype):
    want = want.double()
    scale = want.norm(dim=-1, keepdim=True) + 1e-30
    # the reference is float64 too: near the singular axis both lose digits
    allowed = (4096 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
    assert ((got.double() - want).abs() / scale).max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 7, 36, 130])
def test_rotation_rows(dtype, D):
    z, q, g = (randn(700, D, seed=s, dtype=dtype) for s in range(3))
    z[3], q[5] = 0, 0
    z[6] = -q[6]
    for estimator in (1, 2):
        got = same_everywhere("rotation_trick_backward", z, q, g, estimator)
        close(got, SPECS["rotation_trick_backward"].reference(z.double(), q.double(), g.double(), estimator), dtype)
        assert torch.equal(got[[3, 5]], g[[3, 5]])  # straight-through, bit for bit


def test_rotation_of_a_result_larger_than_the_cache():
    z, q, g = (randn(35_000, 260, seed=s) for s in range(3))  # 36 MB: stored past the caches
    got = same_everywhere("rotation_trick_backward", z, q, g, 1)
    rows = slice(None, None, 97)
    close(got[rows], SPECS["rotation_trick_backward"].reference(z[rows], q[rows], g[rows], 1), torch.float32)
    assert torch.equal(same_everywhere("rotation_trick_backward", z, q, g, 0), g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_level", [False, True])
def test_residual_backward(dtype, per_level):
    generator = torch.Generator().manual_seed(1)
    z, g = randn(2, 900, 21, seed=2, dtype=dtype), randn(2, 900, 21, seed=3, dtype=dtype)
    books = [randn(2, k, 21, seed=k, dtype=dtype) for k in (30, 17, 5)]
    index = torch.stack([torch.randint(k, (2, 900), generator=generator) for k in (30, 17, 5)], -1)
    index[:, ::50] = -1
    scale = torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for estimator in (0, 1, 2):
        got = same_everywhere("residual_quantize_backward", z, books, index, g, scale, estimator, per_level)
        want = SPECS["residual_quantize_backward"].reference(
            z.double(), [b.double() for b in books], index, g.double(), scale.double(), estimator, per_level
        )
        close(got, want, dtype)
        assert not got[:, ::50].any()


def test_residual_backward_names_an_index_out_of_range():
    args = (
        torch.ones(1, 2, 3),
        [torch.ones(1, 4, 3)],
        torch.tensor([[[0], [4]]]),
        torch.ones(1, 2, 3),
        torch.ones(1),
        1,
        False,
    )
    with pytest.raises(RuntimeError, match="index 4 is out of range for codebook_size 4; allowed: -1"):
        SPECS["residual_quantize_backward"].op.default(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.9, 1.0], ids=["even", "skewed", "collapsed"])
def test_sums(dtype, share):
    generator = torch.Generator().manual_seed(4)
    z = randn(2, 20_000, 133, seed=5, dtype=dtype)  # 133 columns: a split codeword ends in a short piece
    index = torch.randint(-1, 300, (2, 20_000), generator=generator)
    index[torch.rand(2, 20_000, generator=generator) < share] = 7
    sums, counts = same_everywhere("codeword_sums", z, index, 300)
    want, want_counts = SPECS["codeword_sums"].reference(z, index, 300)
    assert torch.equal(sums, want) and torch.equal(counts, want_counts)


@pytest.mark.parametrize("N, K", [(20_000, 50), (20_000, 3000), (200, 50)], ids=["runs", "by codeword", "one run"])
def test_sums_name_the_first_index_out_of_range(N, K):
    z, index = torch.ones(2, N, 200), torch.zeros(2, N, dtype=torch.int64)
    index[0, [N * 3 // 4, N - 1]], index[1, 5] = torch.tensor([K, K + 1]), K + 9
    with pytest.raises(RuntimeError, match=f"index {K} is out of range for codebook_size {K}; allowed: -1"):
        SPECS["codeword_sums"].op.default(z, index, K)
    index[0] = 0
    with pytest.raises(RuntimeError, match=f"index {K + 9} is out of range"):
        SPECS["codeword_sums"].op.default(z, index, K)


@pytest.mark.parametrize("size", [1, 300, 5000, 70_000])
def test_usage(size):
    index = torch.randint(-1, size, (3, 300_001), generator=torch.Generator().manual_seed(6))
    assert torch.equal(same_everywhere("codebook_usage", index, size), SPECS["codebook_usage"].reference(index, size))
    index[1, 299_000] = size
    index[2, 5] = size + 9
    with pytest.raises(
        RuntimeError, match=f"index {size} is out of range for codebook_size {size}"
    ):  # the first in row order
        SPECS["codebook_usage"].op.default(index, size)


def test_subnormal_and_extreme_halves():
    # every float16 value through the conversions of both levels
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    z = bits[bits.isfinite()].reshape(1, 1, -1)
    sums, _ = same_everywhere("codeword_sums", z.reshape(1, -1, 1), torch.arange(z.numel()).reshape(1, -1), z.numel())
    assert torch.equal(sums.flatten(), z.flatten().float())
