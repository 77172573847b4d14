"""residual_quantize's Triton kernels under the checking layer: hostile residuals, every way to a decision, many levels.

python tests/interpreted_residual.py [WORD ...]      all checks, or those whose name contains a word
"""

import sys
import time

import triton_check

# isort: split
import torch
from interpreted_search import draw, hostile, same
from vqkernels.triton_kernels import residual_quantize as module
from vqkernels.triton_kernels import tuning
from vqkernels.triton_kernels.residual_quantize import residual_quantize, residual_quantize_backward
from vqkernels.triton_kernels.rotation_trick import rotation_trick_backward

from vqkernels import registry, verify

FORWARD, BACKWARD = registry.SPECS["residual_quantize"], registry.SPECS["residual_quantize_backward"]
TILES = {"ROWS": 32, "CODES": 16, "WHOLE": 64, "FEATURES": 16, "num_warps": 4, "num_stages": 2}
STEPS = TILES | {"ROWS": 16, "WHOLE": 0}  # the features of a row in steps
N, K, D = 20, 24, 19


def agrees(args, *what, tiles=TILES, seeds=(0,)) -> None:
    """Equal to the reference, in every one of these orders of programs: indices, quantized and count to the bit."""
    with tuning.using({"residual_quantize": {"*": tiles}}):
        got = triton_check.in_any_order(lambda: residual_quantize(*args), seeds)
    want = FORWARD.reference(*args)
    same((*got[:2], got[3]), (*want[:2], want[3]), *what)
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=0, equal_nan=True, msg=str(what))


def hostile_books(Q: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Hostile rows and codebooks, one head a kind; the first level's residual of some rows is zero, and further levels
    have duplicates, neighbours in the last place and codewords that nearly fit what is left."""
    z, c = hostile(N, K, D)
    return z, [c, *(c.roll(level, 1) * 0.3**level for level in range(1, Q))]


def hostile_residuals():
    z, books = hostile_books(2)
    agrees((z, books, None, 0))
    some = [2, 3, 5, 8]  # Cauchy, ties, clustered, subnormal
    z, books = z[some], [b[some] for b in books]
    agrees((z, books, None, 1), "cosine")
    agrees((z, books, None, 2), "dot")
    agrees((z, books, None, 0), "steps", tiles=STEPS)


def other_dtypes():
    z, books = hostile_books(2)
    some = [0, 3, 5]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        agrees((z[some].to(dtype), [b[some].to(dtype) for b in books], None, 0), dtype)


def magnitudes_of_float64():
    """Squares that overflow or vanish, subnormal values; a codebook of zeros, so that there is no exponent to scale by."""
    z, books = (
        draw("gaussian", 1, 12, 5, seed=1).double(),
        [draw("gaussian", 1, 20, 5, seed=s).double() for s in (2, 3)],
    )
    for scale in (1e160, 1e300, 1e-160, 1e-305, 1e-310, 1e-320):
        agrees((z * scale, [b * scale for b in books], None, 0), scale)
    agrees((z * 1e-306, [b * 1e200 for b in books], None, 0), "unlike")
    agrees((z, [0 * books[0], books[1]], None, 0), "zeros")


def survivors_hidden_behind_a_lane():
    """Codewords that tie and lie CODES apart share a lane of the coarse pass, which remembers one of them."""
    z = draw("ties", 1, 24, 8, seed=1)
    c = draw("ties", 1, 16, 8, seed=2)
    near = torch.nextafter(c, torch.full_like(c, torch.inf))
    books = [torch.cat([near, c, c, near], 1), torch.cat([c, near, c], 1)]
    agrees((z, books, None, 0))
    agrees((z + 1000, [b + 1000 for b in books], None, 0), "far")
    agrees((z, [c[:, :1].expand(1, 50, 8)] * 2, None, 0), "all equal")


def levels_and_sizes():
    """Levels of unlike size, one shared codebook, one level, K = 1, more levels than a warp has lanes, odd D."""
    z = draw("gaussian", 2, 21, 13, seed=1)
    books = [draw("gaussian", 2, size, 13, seed=2 + size) * 0.5 for size in (1, 40, 3, 17)]
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(3)) < 0.7
    agrees((z, books, mask, 0), "unlike", seeds=(None, 0, 1))
    agrees((z, [books[1]] * 3, mask, 0), "shared")
    agrees((z, books[1:2], None, 0), "one level")
    agrees((z[:, :3, :2], [books[2][..., :2]] * 33, None, 0), "many levels")
    agrees((z[:, :3, :2].bfloat16(), [books[2][..., :2].bfloat16()] * 5, None, 1), "cosine, few features")


def many_features():
    z, books = draw("gaussian", 1, 2, 4096, seed=1), [draw("gaussian", 1, size, 4096, seed=size) for size in (3, 2)]
    agrees((z.bfloat16(), [b.bfloat16() for b in books], None, 0))


def rows_that_stop_being_finite():
    """A level without a usable codeword ends every row, an overflow of the last residual its own; both stay masked."""
    z = draw("gaussian", 1, 20, 4, seed=1)
    book = draw("gaussian", 1, 18, 4, seed=2)
    gone = torch.full_like(book, torch.nan)
    mask = torch.arange(20)[None] % 3 > 0
    for metric in (0, 1, 2):
        agrees((z, [book, gone, book], mask, metric), "no codeword", metric)
    half = torch.where(torch.arange(18)[None, :, None] % 2 > 0, book, torch.inf)
    agrees((z, [half, book], mask, 0), "half the codewords")
    z[0, 4], z[0, 5, 2], z[0, 6, 1] = 3e38, torch.nan, -torch.inf
    agrees((z, [book, torch.full((1, 1, 4), -3e38)], mask, 0), "overflow")
    agrees((z, [torch.full((1, 1, 4), -3e38)], None, 2), "overflow of the only level")


def losses_add_in_one_order():
    """One number whatever the order of programs; many programs, more than a step of the second kernel has lanes."""
    z, book = draw("lognormal", 1, 300, 3, seed=1), draw("gaussian", 1, 5, 3, seed=2)
    agrees((z, [book, book * 0.5], None, 0), seeds=(None, 0, 1))
    sums = torch.rand(2, 2500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts, losses, valid = torch.full((2500,), 3), torch.empty(2), torch.empty((), dtype=torch.int64)
    with triton_check.checked(0):
        module._losses_kernel[(2,)](sums, counts, losses, valid, 2500, 7, 1024)
    assert int(valid) == 7500
    torch.testing.assert_close(losses, (sums.sum(1) / (7500 * 7)).float(), rtol=1e-6, atol=0)


def backward():
    """Rows as long as a program and longer than a warp; degenerate levels: a residual of zero, one opposite to its
    codeword; skipped rows; an index outside its codebook makes its row NaN and no other."""
    for H, n, width, dtype in ((2, 9, 13, torch.float32), (1, 4, 1500, torch.bfloat16), (1, 9, 40, torch.float64)):
        z, grad = draw("gaussian", H, n, width, seed=1), draw("gaussian", H, n, width, seed=2)
        books = [draw("gaussian", H, size, width, seed=3 + size) for size in (7, 4, 9)]
        indices = torch.stack([torch.randint(size, (H, n)) for size in (7, 4, 9)], -1)
        first = books[0].gather(1, indices[:, :, 0, None].expand(-1, -1, width))
        z[:, 0], z[:, 1] = first[:, 0], 0
        z[:, 2] = -first[:, 2]
        indices[:, -1, 1] = -1
        scale = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        z, grad, books = z.to(dtype), grad.to(dtype), [b.to(dtype) for b in books]
        for estimator in (0, 1, 2):
            for per_level in (False, True):
                args = (z, books, indices, grad, scale, estimator, per_level)
                got = triton_check.in_any_order(lambda args=args: residual_quantize_backward(*args), (0, 1))
                error = verify._error(got, BACKWARD.reference(*verify._map(args, verify._double)))
                assert error <= BACKWARD.tolerance, (dtype, estimator, per_level, error)
                assert (got[:, -1] == 0).all()
        outside = indices.clone()
        outside[0, 1, 1] = 4
        with triton_check.checked(0):
            got = residual_quantize_backward(z, books, outside, grad, scale, 1, False)
        assert got[0, 1].isnan().all() and int(got.isnan().sum()) == width
        shared = (z, [books[0]] * 2, indices[..., :1].expand(-1, -1, 2), grad, scale[:2], 1, True)
        with triton_check.checked(0):
            got = residual_quantize_backward(*shared)
        assert verify._error(got, BACKWARD.reference(*verify._map(shared, verify._double))) <= BACKWARD.tolerance


def rotation_in_steps():
    """rotation_trick's rows that are longer than a tile."""
    spec = registry.SPECS["rotation_trick_backward"]
    with tuning.using({"rotation_trick_backward": {"*": {"MAX_BLOCK": 16, "ELEMENTS": 256, "num_warps": 4}}}):
        for dtype in (torch.float32, torch.bfloat16):
            for case, args in verify.cases(spec, dtype):
                if args[0].shape[0] * args[0].shape[1] <= 1300:
                    got = triton_check.in_any_order(lambda args=args: rotation_trick_backward(*args), (0,))
                    error = verify._error(got, spec.reference(*verify._map(args, verify._double)))
                    assert error <= spec.tolerance, (dtype, case, error)


CHECKS = [
    hostile_residuals, other_dtypes, magnitudes_of_float64, survivors_hidden_behind_a_lane, levels_and_sizes,
    many_features, rows_that_stop_being_finite, losses_add_in_one_order, backward, rotation_in_steps,
]  # fmt: skip


def main(words: list[str]) -> int:
    for check in CHECKS:
        if not words or any(word in check.__name__ for word in words):
            start = time.process_time()
            check()
            print(f"triton residual_quantize {check.__name__}: ok, {time.process_time() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
