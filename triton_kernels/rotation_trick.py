"""rotation_trick_backward: dz from z, q, grad; the formulas are in csrc/cpu/estimator_kernel.h and docs/numerics.md.

    program = ROWS rows;  z, q, g [ROWS, BLOCK] --five dots--> a, b, c --> dz = a g + b z + c q

Work and bytes: 16 flops an element against 4 element sizes of traffic: memory bound; rows longer than a block are read
twice, the second time from the caches. Numerics: dots and the final sum in float64, because they cancel where z is
close to -q. Determinism: rows are independent, sums have a fixed order.
Run in Triton's interpreter only; tuning is open.
"""

import torch
import triton
import triton.language as tl

MAX_BLOCK = 1024  # features a step
ELEMENTS = 2048  # of ROWS x BLOCK
STE, ROTATION = 0, 1


@triton.jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["N"])
def _rotation_trick_backward_kernel(z, q, grad, dz, N, D, SIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    zz = tl.zeros([ROWS], dtype=tl.float64)
    qq = tl.zeros([ROWS], dtype=tl.float64)
    zq = tl.zeros([ROWS], dtype=tl.float64)
    zg = tl.zeros([ROWS], dtype=tl.float64)
    qg = tl.zeros([ROWS], dtype=tl.float64)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        at = rows[:, None] * D + d[None, :]
        inside = (rows[:, None] < N) & (d[None, :] < D)
        zv, qv, gv = _load(z, at, inside), _load(q, at, inside), _load(grad, at, inside)
        zz += tl.sum(zv * zv, 1)
        qq += tl.sum(qv * qv, 1)
        zq += tl.sum(zv * qv, 1)
        zg += tl.sum(zv * gv, 1)
        qg += tl.sum(qv * gv, 1)
    # every division below is by 1 where the row is degenerate, and its result is not used
    nz, nq = tl.sqrt(zz), tl.sqrt(qq)
    finite = (zz > 0) & (qq > 0) & (zz < float("inf")) & (qq < float("inf"))
    nz, nq = tl.where(finite, nz, 1.0), tl.where(finite, nq, 1.0)
    gamma = nq / nz
    length2 = 2.0 + 2.0 * SIGN * (zq / (nz * nq))
    regular = finite & (gamma >= 1e-6) & (gamma <= 1e6) & (length2 >= 1e-6)
    zg, qg = zg / nz, qg / nq
    along = 2.0 * (zg + SIGN * qg) / tl.where(regular, length2, 1.0)
    b = gamma * ((1 + SIGN) * qg - along) / nz
    c = -SIGN * gamma * along / nq
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        at = rows[:, None] * D + d[None, :]
        inside = (rows[:, None] < N) & (d[None, :] < D)
        g = _load(grad, at, inside)
        value = gamma[:, None] * g + b[:, None] * _load(z, at, inside) + c[:, None] * _load(q, at, inside)
        value = tl.where(regular[:, None], value, g)
        tl.store(dz + at, value.to(dz.dtype.element_ty), mask=inside)


def rotation_trick_backward(z: torch.Tensor, q: torch.Tensor, grad: torch.Tensor, estimator: int) -> torch.Tensor:
    """z, q, grad [N,D] -> dz [N,D]."""
    if estimator == STE:
        return grad.clone(memory_format=torch.contiguous_format)
    z, q, grad = z.contiguous(), q.contiguous(), grad.contiguous()
    N, D = z.shape
    dz = torch.empty_like(z)
    if dz.numel() == 0:
        return dz
    block = min(MAX_BLOCK, triton.next_power_of_2(D))
    rows = max(1, ELEMENTS // block)
    sign = 1 if estimator == ROTATION else -1
    _rotation_trick_backward_kernel[(triton.cdiv(N, rows),)](z, q, grad, dz, N, D, sign, rows, block)
    return dz
