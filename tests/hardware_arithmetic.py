"""What triton_arithmetic makes of the interpreter, number by number, against torch or against exact values.

python tests/hardware_arithmetic.py       one line a case; exit code 1 if one is wrong
"""

import sys
import traceback

from triton_check import KernelError, checked

# isort: split
import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, y, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(y + n, tl.load(x + n).to(y.dtype.element_ty))


@triton.jit
def binary(x, y, out, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    a, b = tl.load(x + n), tl.load(y + n)
    tl.store(out + n, a + b)
    tl.store(out + BLOCK + n, a - b)
    tl.store(out + 2 * BLOCK + n, a * b)
    tl.store(out + 3 * BLOCK + n, tl.maximum(a, b))
    tl.store(out + 4 * BLOCK + n, tl.where((a < b) & (a != 0), a, -b))
    tl.store(out + 5 * BLOCK + n, tl.abs(a) * 2.0 + 0.5)


@triton.jit
def reduce(x, out, index, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    v = tl.load(x + r[:, None] * C + c[None, :])
    tl.store(out + c, tl.max(v, 0))
    tl.store(out + C + r, tl.min(v, 1))
    tl.store(out + C + R, tl.max(v))
    tl.store(index + c, tl.argmin(v, 0))
    tl.store(index + C + r, tl.argmax(v, 1))
    value, at = tl.min(v, 1, return_indices=True)
    tl.store(out + C + R + 1 + r, value)
    tl.store(index + C + R + r, at)


@triton.jit
def total(x, out, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    v = tl.load(x + r[:, None] * C + c[None, :])
    tl.store(out + c, tl.sum(v, 0))
    tl.store(out + C + r, tl.sum(v, 1))
    tl.store(out + C + R, tl.sum(v))
    tl.store(out + C + R + 1 + c[None, :], tl.sum(v, 0, keep_dims=True))


@triton.jit
def _least_two(a, b, i, c, d, j):
    """(least, second, index of the least) of two such triples; ties to the lower index."""
    first = (a < c) | ((a == c) & (i < j))
    return tl.where(first, a, c), tl.minimum(tl.where(first, c, a), tl.minimum(b, d)), tl.where(first, i, j)


@triton.jit
def least_two(x, out, index, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    v = tl.load(x + r[:, None] * C + c[None, :])
    inf = tl.full([R, C], float("inf"), v.dtype)
    i = tl.broadcast_to(c[None, :], [R, C])
    a, b, at = tl.reduce((v, inf, i), 1, _least_two)
    tl.store(out + r, a)
    tl.store(out + R + r, b)
    tl.store(index + r, at)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def scan(x, out, N: tl.constexpr):
    n = tl.arange(0, N)
    v = tl.load(x + n)
    tl.store(out + n, tl.cumsum(v, 0))
    tl.store(out + N + n, tl.cumsum(v, 0, reverse=True))
    tl.store(out + 2 * N + n, tl.associative_scan(v, 0, _add))
    tl.store(out + 3 * N + n, tl.sort(v))


@triton.jit
def dot(x, y, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(x + m[:, None] * K + k[None, :]), tl.load(y + n[None, :] * K + k[:, None])
    if HALF:
        v = tl.dot(a, b, out_dtype=tl.float16)
    else:
        v = tl.dot(a, b, input_precision=P)
    tl.store(out + m[:, None] * N + n[None, :], v)


@triton.jit
def add_atomically(x, out, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.atomic_add(out + n % 4, tl.load(x + n), sem="relaxed")


@triton.jit
def approximate(x, y, out, N: tl.constexpr):
    n = tl.arange(0, N)
    a, b = tl.load(x + n), tl.load(y + n)
    tl.store(out + n, a / b)
    tl.store(out + N + n, tl.sqrt(a))
    tl.store(out + 2 * N + n, tl.div_rn(a, b))
    tl.store(out + 3 * N + n, tl.sqrt_rn(a))


@triton.jit
def argument(out, value):
    tl.store(out, value.to(tl.float64))


@triton.jit
def tail(x, out, N, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + n, mask=n < N), 0))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def equal(got, want, what=""):
    assert got.dtype == want.dtype and got.shape == want.shape, f"{what}: {got.dtype} {got.shape}"
    differ = (got != want) & ~(got.isnan() & want.isnan()) if got.is_floating_point() else got != want
    assert not differ.any(), f"{what}: {int(differ.sum())} of {got.numel()} differ"


def casts_to_bfloat16():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 65536  # every bfloat16, and what lies between
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (every + low).view(torch.float32)
        y = torch.empty(x.shape, dtype=torch.bfloat16)
        cast[(1,)](x, y, x.numel())
        equal(y, x.bfloat16(), f"low bits {low:x}")
        back = torch.empty_like(x)
        cast[(1,)](y, back, x.numel())
        equal(back, y.float(), "widened")
    whole = torch.arange(-(2**16), 2**16, dtype=torch.int32)
    y = torch.empty(whole.shape, dtype=torch.bfloat16)
    cast[(1,)](whole, y, whole.numel())
    equal(y, whole.float().bfloat16(), "integers")


def casts_of_float64_round_once():
    for near, below, above in ((1 + 2**-8, 1.0, 1 + 2**-7), (-1 - 3 * 2**-8, -1 - 2**-7, -1 - 2**-6)):
        x = torch.tensor([near * (1 - 2**-40), near, near * (1 + 2**-40), float("inf")] * 4, dtype=torch.float64)
        y = torch.empty(16, dtype=torch.bfloat16)
        cast[(1,)](x, y, 16)
        tie = above if near == 1 + 3 * 2**-8 or near < 0 else below
        equal(y[:4], torch.tensor([below, tie, above, float("inf")]).bfloat16(), str(near))


def bfloat16_arithmetic():
    a, b = randn(4096, dtype=torch.bfloat16), randn(4096, seed=1, dtype=torch.bfloat16)
    a[::7] = 0
    b[5::11] = float("inf")
    out = torch.empty(6, 4096, dtype=torch.bfloat16)
    binary[(1,)](a, b, out, 4096, enable_fp_fusion=False)
    want = [a + b, a - b, a * b, torch.maximum(a, b), torch.where((a < b) & (a != 0), a, -b), a.abs() * 2 + 0.5]
    for i, w in enumerate(want):
        equal(out[i], w, f"operation {i}")


def extremes():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = randn(16, 32, dtype=dtype)
        x[:, 3] = x[:, 7] = x.amin() - 1  # ties
        out, index = torch.empty(65, dtype=dtype), torch.empty(64, dtype=torch.int32)
        reduce[(1,)](x, out, index, 16, 32)
        least = x.float().argmin(1).int()
        equal(out, torch.cat([x.amax(0), x.amin(1), x.max().reshape(1), x.amin(1)]), f"{dtype}")
        equal(index, torch.cat([x.float().argmin(0).int(), x.float().argmax(1).int(), least]), f"{dtype} indices")
        assert (least == 3).all()


def sums_are_trees():
    for dtype, allowed in ((torch.float32, 1e-6), (torch.bfloat16, 0.1), (torch.float64, 1e-14)):
        x = randn(16, 32, dtype=dtype)
        out = torch.empty(81, dtype=dtype)
        total[(1,)](x, out, 16, 32)
        d = x.double()
        want = torch.cat([d.sum(0), d.sum(1), d.sum().reshape(1), d.sum(0)])
        assert (out.double() - want).abs().max() <= allowed * 8, dtype
    x = torch.zeros(8, 2)
    x[:, 0] = torch.tensor([1e8, 1, -1e8, 1, 1, 1, 1, 1])  # left to right: 6; as a tree: another value
    out = torch.empty(13)
    total[(1,)](x, out, 8, 2)
    assert out[0] != 6, "added from left to right"
    whole = torch.arange(512).reshape(16, 32)
    out = torch.empty(81, dtype=torch.int64)
    total[(1,)](whole, out, 16, 32)
    equal(out, torch.cat([whole.sum(0), whole.sum(1), whole.sum().reshape(1), whole.sum(0)]), "integers")


def reductions_with_a_function_of_their_own():
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(16, 64, dtype=dtype)
        x[4, 9] = x[4, 50] = -100.0
        out, index = torch.empty(32, dtype=dtype), torch.empty(16, dtype=torch.int32)
        least_two[(1,)](x, out, index, 16, 64)
        two = x.float().sort(1).values[:, :2].to(dtype)
        equal(out, torch.cat([two[:, 0], two[:, 1]]), f"{dtype}")
        equal(index, x.float().argmin(1).int(), f"{dtype} index")


def scans_and_sorts():
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        x = (randn(64) * 8).to(dtype)
        out = torch.empty(4, 64, dtype=dtype)
        scan[(1,)](x, out, 64)
        up, down = x.double().cumsum(0), x.double().flip(0).cumsum(0).flip(0)
        allowed = {torch.float32: 1e-4, torch.bfloat16: 2.0, torch.int32: 0}[dtype]
        for got, want in zip(out, (up, down, up)):
            assert (got.double() - want).abs().max() <= allowed, dtype
        equal(out[3], x.sort().values, f"{dtype} sorted")


def dots():
    def run(x, y, precision=None, half=False, out=torch.float32):
        out = torch.empty(x.shape[0], y.shape[0], dtype=out)
        dot[(1,)](x, y, out, *out.shape, x.shape[1], precision, half)
        return out

    x, y = randn(16, 64), randn(32, 64, seed=1)
    exact = x.double() @ y.double().T
    for dtype in (torch.bfloat16, torch.float16):
        got = run(x.to(dtype), y.to(dtype))
        assert (got.double() - x.to(dtype).double() @ y.to(dtype).double().T).abs().max() < 5e-4, dtype
    cut = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for t in (x, y)]
    assert (run(x, y, "tf32").double() - cut[0] @ cut[1].T).abs().max() < 5e-4
    error = {p: float((run(x, y, p).double() - exact).abs().max()) for p in ("tf32", "ieee", "tf32x3", "bf16x3")}
    assert error["tf32"] > 5e-3 and 1e-6 < min(error.values()), error
    assert max(error[p] for p in ("ieee", "tf32x3", "bf16x3")) < 6e-4, error
    equal(run(x.double(), y.double(), out=torch.float64).float(), exact.float(), "float64")
    whole = torch.arange(16 * 64).reshape(16, 64).half() % 7
    assert (run(whole, whole) != whole.float() @ whole.float().T).any(), "as exact as no tensor core need be"
    refused = [
        (lambda: run(x.half(), y.half(), half=True), "float16 accumulator"),
        (lambda: run(x[:, :8].bfloat16().contiguous(), y[:, :8].bfloat16().contiguous()), "k >= 16"),
    ]
    for call, why in refused:
        try:
            call()
        except (KernelError, triton.runtime.errors.InterpreterError) as error:
            assert why in str(error).lower(), error
        else:
            raise AssertionError(f"not refused: {why}")


def atomic_add_of_bfloat16():
    x, out = randn(64, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16)
    add_atomically[(1,)](x, out, 64)
    want = torch.zeros(4, dtype=torch.bfloat16)
    for i, value in enumerate(x):
        want[i % 4] += value
    equal(out, want)


def approximations_are_off():
    x, y = randn(1024).abs(), randn(1024, seed=1).abs()
    out = torch.empty(4, 1024)
    approximate[(1,)](x, y, out, 1024)
    root = torch.from_numpy(x.numpy() ** 0.5)
    for got, want in zip(out[:2], (x / y, root)):
        assert 100 < int((got != want).sum()) < 900 and ((got - want).abs() <= want * 2**-22).all()
    equal(out[2], x / y, "div_rn")
    equal(out[3], root, "sqrt_rn")


def float_arguments_are_float32():
    out = torch.empty(1, dtype=torch.float64)
    argument[(1,)](out, 0.1)
    assert out.item() == torch.tensor(0.1).double().item() != 0.1


def masked_off_lanes_are_garbage():
    out = torch.empty(1)
    tail[(1,)](torch.ones(5), out, 5, 8)
    assert out.isnan().all()


CASES = (
    casts_to_bfloat16,
    casts_of_float64_round_once,
    bfloat16_arithmetic,
    extremes,
    sums_are_trees,
    reductions_with_a_function_of_their_own,
    scans_and_sorts,
    dots,
    atomic_add_of_bfloat16,
    approximations_are_off,
    float_arguments_are_float32,
    masked_off_lanes_are_garbage,
)


def main() -> int:
    wrong = 0
    for case in CASES:
        try:
            with checked():
                case()
            said = ""
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}: {error!r}"
        wrong += bool(said)
        print(f"{'WRONG' if said else 'ok'} | {case.__name__} | {said}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
