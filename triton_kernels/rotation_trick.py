"""rotation_trick_backward: dz from z, q, grad; the formulas are in csrc/cpu/estimator_kernel.h and docs/numerics.md.

    program = ROWS rows;  z, q, g [ROWS, BLOCK] --five dots--> a, b, c --> dz = a g + b z + c q
    D <= BLOCK: one tile, held in registers between the two steps;  D > BLOCK: a loop each, the second from the caches

Work and bytes: 16 flops an element against 4 element sizes of traffic: memory bound. Rows whose length is a multiple of
16 move in 128-bit accesses. Numerics: dots and the final sum in float64 for every dtype, because they cancel where z is
close to -q; rounded once to the dtype (16-bit ones through float32, as the reference does).
Determinism: rows are independent, sums have a fixed order. Limits: none on N and D.

Float64 on consumer cards, which have one such unit to 64 for float32: an element takes 8 multiply-adds and 4
conversions there, about as long as the card needs to move a float32 element (16 bytes), twice as long as a 16-bit one.
That is accepted. Pairs of float32 (two sums and two products for each) would cost 50 instructions an element and need
a fused multiply-add that the interpreter does not have; plain float32 would be wrong by more than the result near the
singular axis. Data-centre chips have the float64 rate to stay memory bound.
Nothing here has been timed on a GPU.
"""

import torch
import triton
import triton.language as tl

from .inductor import visible
from .tuning import config

STE, ROTATION = 0, 1


@triton.jit
def five_dots(z, q, g):
    """z, q, g [ROWS, BLOCK] -> z.z, q.q, z.q, z.g, q.g, float64 [ROWS]."""
    z64, q64, g64 = z.to(tl.float64), q.to(tl.float64), g.to(tl.float64)
    return tl.sum(z64 * z64, 1), tl.sum(q64 * q64, 1), tl.sum(z64 * q64, 1), tl.sum(z64 * g64, 1), tl.sum(q64 * g64, 1)


@triton.jit
def estimator_weights(zz, qq, zq, zg, qg, SIGN: tl.constexpr):
    """a, b, c of dz = a g + b z + c q, and which rows are regular: the others are straight-through. SIGN: 1 for the
    rotation, -1 for the reflection."""
    # every division below is by 1 where the row is degenerate, and its result is not used
    nz, nq = tl.sqrt(zz), tl.sqrt(qq)
    finite = (zz > 0) & (qq > 0) & (zz < float("inf")) & (qq < float("inf"))
    nz, nq = tl.where(finite, nz, 1.0), tl.where(finite, nq, 1.0)
    gamma = nq / nz
    length2 = 2.0 + 2.0 * SIGN * (zq / (nz * nq))
    regular = finite & (gamma >= 1e-6) & (gamma <= 1e6) & (length2 >= 1e-6)
    zg, qg = zg / nz, qg / nq
    along = 2.0 * (zg + SIGN * qg) / tl.where(regular, length2, 1.0)
    return gamma, gamma * ((1 + SIGN) * qg - along) / nz, -SIGN * gamma * along / nq, regular


@triton.jit
def estimator_apply(z, q, g, a, b, c, regular):
    """dz [ROWS, BLOCK] in float64; g bit for bit in rows that are not regular, also beside a NaN."""
    g64 = g.to(tl.float64)
    value = a[:, None] * g64 + b[:, None] * z.to(tl.float64) + c[:, None] * q.to(tl.float64)
    return tl.where(regular[:, None], value, g64)


@triton.jit
def store_rounded(pointer, value, inside):
    """16-bit values are rounded to float32 first, as the reference does."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        tl.store(pointer, value.to(tl.float32).to(pointer.dtype.element_ty), mask=inside)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _rotation_trick_backward_kernel(
    z, q, grad, dz, N, D, SIGN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    if WHOLE:
        at = rows[:, None] * D + d[None, :]
        inside = (rows[:, None] < N) & (d[None, :] < D)
        zv = tl.load(z + at, mask=inside, other=0.0)
        qv = tl.load(q + at, mask=inside, other=0.0)
        gv = tl.load(grad + at, mask=inside, other=0.0)
        zz, qq, zq, zg, qg = five_dots(zv, qv, gv)
        a, b, c, regular = estimator_weights(zz, qq, zq, zg, qg, SIGN)
        store_rounded(dz + at, estimator_apply(zv, qv, gv, a, b, c, regular), inside)
    else:
        zz = tl.zeros([ROWS], dtype=tl.float64)
        qq, zq, zg, qg = zz, zz, zz, zz
        for start in range(0, D, BLOCK):
            at = rows[:, None] * D + (start + d)[None, :]
            inside = (rows[:, None] < N) & ((start + d)[None, :] < D)
            zv = tl.load(z + at, mask=inside, other=0.0)
            qv = tl.load(q + at, mask=inside, other=0.0)
            gv = tl.load(grad + at, mask=inside, other=0.0)
            zz1, qq1, zq1, zg1, qg1 = five_dots(zv, qv, gv)
            zz, qq, zq, zg, qg = zz + zz1, qq + qq1, zq + zq1, zg + zg1, qg + qg1
        a, b, c, regular = estimator_weights(zz, qq, zq, zg, qg, SIGN)
        for start in range(0, D, BLOCK):
            at = rows[:, None] * D + (start + d)[None, :]
            inside = (rows[:, None] < N) & ((start + d)[None, :] < D)
            zv = tl.load(z + at, mask=inside, other=0.0)
            qv = tl.load(q + at, mask=inside, other=0.0)
            gv = tl.load(grad + at, mask=inside, other=0.0)
            store_rounded(dz + at, estimator_apply(zv, qv, gv, a, b, c, regular), inside)


def rotation_trick_backward(z: torch.Tensor, q: torch.Tensor, grad: torch.Tensor, estimator: int) -> torch.Tensor:
    """z, q, grad [N,D] -> dz [N,D]."""
    if estimator == STE:
        return grad.clone(memory_format=torch.contiguous_format)
    z, q, grad = z.contiguous(), q.contiguous(), grad.contiguous()
    N, D = z.shape
    dz = torch.empty_like(z)
    if dz.numel() == 0:
        return dz
    width = triton.next_power_of_2(D)
    tile = config("rotation_trick_backward", f"{str(z.dtype)[6:]} D{width}")
    block = min(tile["MAX_BLOCK"], width)
    rows = max(1, tile["ELEMENTS"] // block)
    warps = tile["num_warps"] * max(1, block // tile["ELEMENTS"])  # a long row takes more threads, not more registers
    sign = 1 if estimator == ROTATION else -1
    visible(_rotation_trick_backward_kernel)[(triton.cdiv(N, rows),)](
        z, q, grad, dz, N, D, sign, D <= block, rows, block, num_warps=warps, enable_fp_fusion=True
    )
    return dz
