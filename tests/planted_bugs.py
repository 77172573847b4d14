"""Kernels with one bug each, and their clean twins: does triton_check report the first and pass the second?

python tests/planted_bugs.py       one line a kernel; exit code 1 if a bug was missed or a clean kernel was blamed
"""

import sys

from triton_check import KernelError, checked, in_any_order

# isort: split
import torch
import triton
import triton.language as tl

N, BLOCK = 100, 32
GRID = (triton.cdiv(N, BLOCK),)


@triton.jit
def scale(x, y, N, BLOCK: tl.constexpr, BUG: tl.constexpr):
    """y = 2 x, in tiles."""
    step = BLOCK + 1 if BUG == "off-by-one tile" else BLOCK
    n = tl.program_id(0) * step + tl.arange(0, BLOCK)
    inside = n < N
    if BUG == "off-by-one mask":
        inside = n <= N
    if BUG == "no mask on the load":
        value = tl.load(x + n)
    else:
        value = tl.load(x + n, mask=inside)
    if BUG == "wrong pointer":
        tl.store(x + N + n, 2 * value, mask=inside)
    elif BUG == "no mask on the store":
        tl.store(y + n, 2 * value)
    elif BUG == "duplicate store":
        tl.store(y + n // 2, 2 * value, mask=inside)
    elif BUG == "racy store":
        tl.store(y + n % BLOCK, 2 * value, mask=inside)
    else:
        tl.store(y + n, 2 * value, mask=inside)


@triton.jit
def histogram(codes, counts, N, BLOCK: tl.constexpr, BUG: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.load(codes + n, mask=n < N, other=0)
    one = tl.full([BLOCK], 1, tl.int32)
    if BUG == "racy read-modify-write":
        bins = tl.histogram(k, 8, mask=n < N)
        at = counts + tl.arange(0, 8)
        tl.store(at, tl.load(at) + bins)
    elif BUG == "atomics with the default semantics":
        tl.atomic_add(counts + k, one, mask=n < N)
    elif BUG == "a plain store beside atomics":
        tl.atomic_add(counts + k, one, mask=n < N, sem="relaxed")
        tl.store(counts + 7, 0)
    elif BUG == "arrival decides":
        ticket = tl.atomic_add(counts, 1, sem="relaxed")
        tl.store(counts + 1 + tl.program_id(0), ticket)
    else:
        tl.atomic_add(counts + k, one, mask=n < N, sem="relaxed")


@triton.jit
def bytes_and_words(words, small, BUG: tl.constexpr):
    """Program 0 writes a word, program 1 one byte: of the same word, or of the next."""
    if tl.program_id(0) == 0:
        tl.store(words, 1)
    else:
        tl.store(small + (3 if BUG == "race between widths" else 4), 2)


@triton.jit
def messages(x, y, BUG: tl.constexpr):
    """Program 0 stores, program 1 loads: the same element, or another."""
    if tl.program_id(0) == 0:
        tl.store(x, 1.0)
    else:
        tl.store(y, tl.load(x + (0 if BUG == "load of another program's result" else 1)))


@triton.jit
def two_steps(x, y, BLOCK: tl.constexpr, BUG: tl.constexpr):
    """y = x reversed twice, through y."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    back = tl.program_id(0) * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK)
    tl.store(y + n, tl.load(x + back))
    if BUG != "no barrier":
        tl.debug_barrier()
    again = tl.load(y + back)
    if BUG != "no barrier":
        tl.debug_barrier()
    tl.store(y + n, again)


@triton.jit
def accumulate(x, total, N, BLOCK: tl.constexpr):
    """Adds to whatever ``total`` holds."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(total + n, tl.load(total + n, mask=n < N) + tl.load(x + n, mask=n < N), mask=n < N)


@triton.jit
def nearest(c, out, K, KEEP: tl.constexpr, BLOCK: tl.constexpr, BUG: tl.constexpr):
    """The index of the least value, tile after tile; ties to the lowest index."""
    best = float("inf")
    index = -1
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(c + k, mask=k < K, other=float("nan") if BUG == "NaN in argmin" else float("inf"))
        least = tl.min(value, 0)
        at = start + tl.argmin(value, 0, tie_break_left=BUG != "any of the ties")
        better = least <= best if BUG == "ties to the last tile" else least < best
        index = tl.where(better, at, index)
        best = tl.where(better, least, best)
    tl.store(out, index)


@triton.jit
def rotate(z, q, g, dz, D: tl.constexpr, BUG: tl.constexpr):
    """dz = R' g for R = I - 2 r r' + 2 b a', which carries a = z/|z| to b = q/|q|; r = (a + b)/|a + b|."""
    d = tl.arange(0, D)
    at = tl.program_id(0) * D + d
    a, b, v = tl.load(z + at), tl.load(q + at), tl.load(g + at)
    a = a / tl.sqrt(tl.sum(a * a))
    b = b / tl.sqrt(tl.sum(b * b))
    r = a + b
    r = r / tl.sqrt(tl.sum(r * r))
    if BUG == "R for its transpose":
        a, b = b, a
    tl.store(dz + at, v - 2 * r * tl.sum(r * v) + 2 * a * tl.sum(b * v))


@triton.jit
def canonical(x, y, out, BLOCK: tl.constexpr):
    """x^2 + y^2, each product rounded: exact only where the launch forbids fusing."""
    n = tl.arange(0, BLOCK)
    a, b = tl.load(x + n), tl.load(y + n)
    tl.store(out + n, a * a + b * b)


@triton.jit
def reduce_bf16(x, out, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    v = tl.load(x + n)
    tl.store(out, tl.sum(v, 0))
    tl.store(out + 1, tl.max(v, 0))
    tl.store(out + 2, tl.argmin(v, 0).to(tl.bfloat16))
    tl.store(out + 4 + n, tl.where(v > 0, v * v + 1.0, -v).to(tl.bfloat16))


def ramp(n=N, dtype=torch.float32):
    return torch.arange(1, n + 1).to(dtype)


def run_scale(bug):
    x, y = ramp(), torch.empty(N)
    scale[GRID](x, y, N, BLOCK, bug)
    assert torch.equal(y, 2 * x)


def run_scale_of_view(bug):
    """A view that owns every second element of its storage."""
    whole, y = ramp(2 * N), torch.empty(N)
    x = whole[::2] if bug == "the gaps of a view" else whole[::2].contiguous()
    scale[GRID](x, y, N, BLOCK, "")
    assert torch.equal(y, 2 * whole[::2])


def run_scale_beside(bug):
    """Half of a storage: the other half is no part of the argument."""
    whole = ramp(2 * N)
    y = torch.empty(N)
    scale[GRID](whole[:50] if bug == "beyond the view" else whole, y, N, BLOCK, "")


def run_misaligned(bug):
    raw = torch.zeros(4 * N + 4, dtype=torch.uint8)
    x = torch.empty(0)
    x.set_(torch.zeros(N + 1).untyped_storage(), 1, (N,), (1,))
    y = torch.empty(N)
    if bug:
        start = raw[1:]
        bits = triton.reinterpret(start, tl.float32)
        scale[(1,)](bits, y, 8, BLOCK, "")
    else:
        scale[GRID](x, y, N, BLOCK, "")


def run_histogram(bug):
    codes = torch.arange(N, dtype=torch.int32) % 7
    counts = torch.zeros(8, dtype=torch.int32)
    histogram[GRID](codes, counts, N, BLOCK, bug)
    assert torch.equal(counts, torch.bincount(codes, minlength=8).int())


def run_arrival(bug):
    def run():
        counts = torch.zeros(8, dtype=torch.int32)
        if bug:
            histogram[GRID](counts, counts, 0, BLOCK, bug)
        return counts[1:]

    return in_any_order(run)


def run_widths(bug):
    raw = torch.zeros(8, dtype=torch.uint8)
    bytes_and_words[(2,)](raw.view(torch.int32), raw, bug)


def run_messages(bug):
    with checked(seed=None):
        messages[(2,)](torch.zeros(2), torch.zeros(1), bug)


def run_two_steps(bug):
    x, y = ramp(64), torch.empty(64)
    two_steps[(2,)](x, y, BLOCK, bug)
    assert torch.equal(x, y)


def run_accumulate(bug):
    total = torch.empty(N) if bug == "uninitialised output" else torch.zeros(N)
    accumulate[GRID](ramp(), total, N, BLOCK)


def run_filled(bug):
    """torch operators may fill torch.empty memory."""
    total = torch.empty(N)
    total[: N // 2 if bug else N].zero_()
    accumulate[GRID](ramp(), total, N, BLOCK)


def run_nearest(bug):
    c = torch.tensor([3.0, 1.0, 2.0, 1.0] * 20)
    out = torch.empty((), dtype=torch.int32)
    nearest[(1,)](c, out, 75, 0, BLOCK, bug)
    assert out.item() == 1, f"index {out.item()} instead of 1"


def run_rotate(bug):
    z, q, g = (torch.randn(3, 16, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3))
    dz = torch.empty_like(z)
    rotate[(3,)](z, q, g, dz, 16, bug)
    # R is orthogonal and carries the direction of z to that of q
    a, b = torch.nn.functional.normalize(z), torch.nn.functional.normalize(q)
    r = torch.nn.functional.normalize(a + b)
    R = torch.eye(16).double() - 2 * r[:, :, None] * r[:, None] + 2 * b[:, :, None] * a[:, None]
    assert torch.allclose((R @ a[..., None])[..., 0], b)
    assert torch.allclose(dz, (R.mT @ g[..., None])[..., 0]), "the gradient is not R' g"


def run_fusion(bug):
    x, y, out = torch.rand(64), torch.rand(64), torch.empty(64)
    canonical[(1,)](x, y, out, 64, enable_fp_fusion=bool(bug))
    assert torch.equal(out, x * x + y * y), "the sum of two rounded products was fused"


def run_bf16(bug):
    """The stock interpreter would compute with the bits; truncation would differ in half of the values."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(68, dtype=torch.bfloat16)
    reduce_bf16[(1,)](x, out, 64)
    square = (x * x).bfloat16()
    want = torch.where(x > 0, (square + 1).bfloat16(), -x)
    if bug:  # what truncation gives
        want = ((x.float() * x.float() + 1).view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()
    assert torch.equal(out[4:], want), "bfloat16 results differ"
    assert out[1] == x.max() and out[2] == x.argmin() and abs(out[0] - x.float().sum()) < 0.1


def run_option(bug):
    scale[GRID](ramp(), torch.empty(N), N, BLOCK, "", **({"num_warp": 4} if bug else {"num_warps": 4, "num_stages": 2}))


def run_grid(bug):
    x, y = ramp(1), torch.empty(1)
    scale[(1, 70000 if bug else 1)](x, y, 1, BLOCK, "")


# what runs -> {the bug: a piece of what must be reported}; "" is the clean twin
BUGS = {
    run_scale: {
        "no mask on the load": "load of x [100] float32: 28 of 32 unmasked addresses are outside",
        "no mask on the store": "store of y",
        "off-by-one mask": "outside; the first is element 100",
        "off-by-one tile": "",
        "wrong pointer": "store of x",
        "duplicate store": "one store writes an address twice",
        "racy store": "race",
    },
    run_scale_of_view: {"the gaps of a view": "a gap of the view"},
    run_scale_beside: {"beyond the view": "are outside; the first is element 64"},
    run_misaligned: {"misaligned": "not a multiple of its 4 bytes"},
    run_histogram: {
        "racy read-modify-write": "race",
        "atomics with the default semantics": 'pass sem="relaxed"',
        "a plain store beside atomics": "race",
    },
    run_arrival: {"arrival decides": "order of the programs"},
    run_widths: {"race between widths": "race"},
    run_messages: {"load of another program's result": "race: program (0, 0, 0) stores element 0 too"},
    run_two_steps: {"no barrier": "debug_barrier"},
    run_accumulate: {"uninitialised output": "nothing has written"},
    run_filled: {"half of it filled": "nothing has written, element 64"},
    run_nearest: {
        "ties to the last tile": "instead of 1",
        "any of the ties": "tie_break_left",
        "NaN in argmin": "NaN reaches an argmin",
    },
    run_rotate: {"R for its transpose": "not R' g"},
    run_fusion: {"fused": "was fused"},
    run_bf16: {"truncation": "bfloat16 results differ"},
    run_option: {"mistyped launch option": "num_warp"},
    run_grid: {"grid beyond CUDA": "refuses the grid"},
}


def report(run, bug: str):
    """What was said about a kernel, or None."""
    try:
        with checked(seed=0):
            run(bug)
    except KernelError as error:
        return str(error)
    except AssertionError as error:
        return f"wrong result: {error}"
    return None


def main() -> int:
    wrong = 0
    for run, bugs in BUGS.items():
        for bug, expected in [("", None), *bugs.items()]:
            said = report(run, bug)
            good = said is None if expected is None else said is not None and expected in said
            wrong += not good
            name = bug or f"clean {run.__name__.removeprefix('run_')}"
            print(f"{'ok' if good else 'WRONG'} | {name} | {said or 'nothing reported'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
