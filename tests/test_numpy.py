"""vqkernels.numpy: the same answers as the torch functions, without torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import vqkernels as vq
import vqkernels.numpy as vqn

DTYPES = ("float32", "float64", "float16")


def draw(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def test_imports_no_torch():
    code = "import vqkernels.numpy, sys; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ("l2", "cosine", "dot"))
def test_nearest_codeword(dtype, metric):
    z, codebook = draw(300, 24, dtype=dtype), draw(70, 24, seed=1, dtype=dtype)
    z[7, 3], codebook[5, 0] = np.nan, np.inf
    mask = np.random.default_rng(2).random(300) < 0.8
    with vq.use_backend("reference"):
        want = vq.nearest_codeword(*map(torch.from_numpy, (z, codebook)), metric=metric, mask=torch.from_numpy(mask))
    for threads in (1, 2):
        indices, distances = vqn.nearest_codeword(z, codebook, metric=metric, mask=mask, threads=threads)
        np.testing.assert_array_equal(indices, want[0].numpy())
        # the last bit of a float64 cosine may differ: the norms are then not exact
        np.testing.assert_allclose(distances, want[1].numpy(), rtol=1e-15 if dtype == "float64" else 0, atol=1e-15)
    assert indices.dtype == np.int64 and distances.dtype == ("float64" if dtype == "float64" else "float32")


def test_nearest_codeword_shapes():
    z, codebook = draw(3, 4, 5, 8), draw(3, 16, 8, seed=1)
    indices, distances = vqn.nearest_codeword(z, codebook)
    assert indices.shape == distances.shape == (3, 4, 5)
    for h in range(3):
        np.testing.assert_array_equal(indices[h], vqn.nearest_codeword(z[h], codebook[h])[0])
    strided = vqn.nearest_codeword(z[0, :, ::2, ::-1], codebook[0, :, ::-1])[0]
    np.testing.assert_array_equal(strided, indices[0, :, ::2])
    assert vqn.nearest_codeword(z[:, :0], codebook)[0].shape == (3, 0, 5)
    assert vqn.nearest_codeword(z[0, 0, 0], codebook[0])[0] == indices[0, 0, 0]
    assert vqn.nearest_codeword(z[0].tolist(), codebook[0].tolist())[0].tolist() == indices[0].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_quantize(dtype):
    z, codebooks = draw(200, 12, dtype=dtype), [draw(k, 12, seed=k, dtype=dtype) for k in (32, 20, 8)]
    z[11, 0] = np.nan
    with vq.use_backend("reference"):
        want = vq.residual_quantize(torch.from_numpy(z), [torch.from_numpy(c) for c in codebooks], beta=1.0)
    one = vqn.residual_quantize(z, codebooks, threads=1)
    two = vqn.residual_quantize(z, codebooks, threads=2)
    np.testing.assert_array_equal(one.indices, want.indices.numpy())
    np.testing.assert_array_equal(one.quantized, want.quantized.numpy())
    np.testing.assert_allclose(one.losses, want.commitment_loss.numpy(), rtol=1e-6)
    for a, b in zip(one, two, strict=True):
        assert a.tobytes() == b.tobytes()


def test_residual_quantize_accepts_one_array():
    z, codebooks = draw(2, 30, 12), draw(3, 16, 12, seed=1)
    out = vqn.residual_quantize(z, codebooks)
    assert out.indices.shape == (2, 30, 3) and out.quantized.shape == z.shape and out.losses.shape == (3,)
    np.testing.assert_array_equal(out.indices, vqn.residual_quantize(z, list(codebooks)).indices)


def test_codebook_usage():
    indices = np.random.default_rng(0).integers(-1, 50, (40, 30))
    out, want = vqn.codebook_usage(indices, 64), vq.codebook_usage(torch.from_numpy(indices), 64)
    np.testing.assert_array_equal(out.counts, want.counts.numpy())
    np.testing.assert_array_equal(out.dead, want.dead.numpy())
    assert out.used == pytest.approx(float(want.used)) and out.entropy == pytest.approx(float(want.entropy))
    assert out.perplexity == pytest.approx(float(want.perplexity))
    nothing = vqn.codebook_usage(np.array([-1, -1]), 4)
    assert nothing.counts.sum() == 0 and nothing.perplexity == 0 and nothing.dead.all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_codeword_sums(dtype):
    z, indices = draw(2, 5000, 9, dtype=dtype), np.random.default_rng(3).integers(-1, 40, (2, 5000))
    want = vq.codeword_sums(torch.from_numpy(z), torch.from_numpy(indices), 40)
    with vq.use_backend("reference"):
        torch.testing.assert_close(want[0], vq.codeword_sums(torch.from_numpy(z), torch.from_numpy(indices), 40)[0])
    for threads in (1, 2):
        sums, counts = vqn.codeword_sums(z, indices, 40, threads=threads)
        np.testing.assert_array_equal(sums, want[0].numpy())
        np.testing.assert_array_equal(counts, want[1].numpy())
    np.testing.assert_array_equal(vqn.codeword_sums(z[1], indices[1].astype(np.int32), 40)[0], sums[1])


Z, C = draw(6, 8), draw(4, 8, seed=1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vqn.nearest_codeword(Z, C[:, :7]), ValueError, r"last dimensions \(features\) differ, 8 against 7"),
        (lambda: vqn.nearest_codeword(Z, C[:0]), ValueError, r"codebook is \(0, 8\); it needs at least one codeword"),
        (
            lambda: vqn.nearest_codeword(Z.astype(int), C),
            TypeError,
            "z has dtype int64; allowed: float32, float64, float16",
        ),
        (lambda: vqn.nearest_codeword(Z, C.astype("float64")), TypeError, "z is float32 and codebook is float64"),
        (
            lambda: vqn.nearest_codeword(Z, C, metric="l1"),
            ValueError,
            "metric='l1' is unknown; allowed: 'l2', 'cosine', 'dot'",
        ),
        (lambda: vqn.nearest_codeword(Z, C, precision="bf16"), ValueError, "precision='bf16' is unknown"),
        (
            lambda: vqn.nearest_codeword(Z, C, mask=np.ones(5, bool)),
            ValueError,
            r"mask is bool \(5,\); expected bool \(6,\)",
        ),
        (lambda: vqn.nearest_codeword(Z, C, threads=0), ValueError, "threads=0; a positive integer is expected"),
        (lambda: vqn.nearest_codeword(Z, np.stack([C, C])), ValueError, r"2 heads, so z must be \[2, ..., D\]"),
        (lambda: vqn.residual_quantize(Z, []), ValueError, "codebooks is empty; at least one level is needed"),
        (lambda: vqn.residual_quantize(Z, C), ValueError, r"codebooks is \(4, 8\); expected \[Q, K, D\]"),
        (
            lambda: vqn.residual_quantize(Z, [C, C[:, :3]]),
            ValueError,
            r"codebooks\[1\] is \(4, 3\): the last dimensions",
        ),
        (
            lambda: vqn.codebook_usage([1, 300], 256),
            ValueError,
            r"index 300 is out of range for codebook_size 256; allowed: -1",
        ),
        (lambda: vqn.codebook_usage([0.5], 4), TypeError, "indices has dtype float64; integer indices"),
        (lambda: vqn.codebook_usage([0], 0), ValueError, "codebook_size=0; a positive integer is expected"),
        (lambda: vqn.codeword_sums(Z, [0, 1], 4), ValueError, r"z is \(6, 8\) and indices \(2,\); expected \[N, D\]"),
        (
            lambda: vqn.codeword_sums(Z, [0, 1, 2, 3, 4, 5], 4),
            ValueError,
            "index 4 is out of range for codebook_size 4",
        ),
        (lambda: vqn.simd_level("sse9"), ValueError, "unknown SIMD level 'sse9'"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_thread_count_from_the_environment(monkeypatch):
    monkeypatch.setenv("VQK_NUM_THREADS", "2")
    vqn.nearest_codeword(Z, C)
    monkeypatch.setenv("VQK_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="VQK_NUM_THREADS='many'; a positive integer is expected"):
        vqn.nearest_codeword(Z, C)


def test_simd_levels_agree():
    best = vqn.simd_level("auto")
    z, codebook = draw(500, 33), draw(90, 33, seed=1)
    want = vqn.nearest_codeword(z, codebook)
    try:
        assert vqn.simd_level("portable") == "portable"
        for a, b in zip(want, vqn.nearest_codeword(z, codebook), strict=True):
            assert a.tobytes() == b.tobytes()
    finally:
        assert vqn.simd_level("auto") == best
