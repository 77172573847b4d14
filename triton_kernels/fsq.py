"""fsq: level of every value (Mentzer et al. 2023) and index of every row; fsq_backward: its straight-through gradient.

    program = ROWS rows;  z [ROWS, COLUMNS] --binary search among thresholds--> digits --> y = (digit - width) / width
                                                                                       --> index = sum digit * basis

The level is the number of thresholds atanh((v - 1/2 + offset) / half) - shift that z has passed (csrc/cpu/fsq.cpp): a
threshold in double, rounded up to the next float32, decides as the double does, so every backend agrees on every bit.
Beyond LARGEST levels round(half tanh(z + shift) - offset) is evaluated in double.
Backward: dz = grad half / width / cosh^2(z + shift), 1/cosh = 2h / (1 + h^2) with h = exp(-|z + shift|).

Work and bytes: log2 L comparisons a value (backward: about 25 operations) against 2 (3) element sizes: memory bound.
Numerics: forward exact; backward float32 within about 10 + |z| units in the last place, float64 in float64.
Determinism: rows are independent. The tables of a list of levels are made once per device and kept: the first call
copies them from the host, so it has to come before a CUDA graph is captured.
Run in Triton's interpreter only; tuning is open.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .exponential import exp_negative
from .tuning import config

LARGEST = 1024  # levels up to which there are thresholds


@triton.jit
def _row_tile(N, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    inside = (rows < N)[:, None] & (j < D)[None, :]
    return rows, j, rows[:, None] * D + j[None, :], inside


@triton.jit(do_not_specialize=["N"])
def _fsq_kernel(
    z, quantized, indices, thresholds, integers, reals, N,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, LARGEST: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    rows, j, at, inside = _row_tile(N, D, ROWS, COLUMNS)
    x = tl.load(z + at, mask=inside, other=0.0).to(thresholds.dtype.element_ty)
    levels, basis = tl.load(integers + j)[None, :], tl.load(integers + COLUMNS + j)[None, :]
    low = tl.zeros([ROWS, COLUMNS], tl.int32)  # thresholds below low are passed, those from high on are not
    high = low + tl.where(levels > LARGEST, 1, levels) - 1
    for _ in range(STEPS):
        middle = (low + high) // 2
        searching = low < high
        threshold = tl.load(thresholds + middle * COLUMNS + j[None, :], mask=searching, other=0.0)
        passed = x >= threshold
        low = tl.where(searching & passed, middle + 1, low)
        high = tl.where(searching & ~passed, middle, high)
    nan = x != x
    if LARGE:
        half, offset = tl.load(reals + j)[None, :], tl.load(reals + COLUMNS + j)[None, :]
        shift = tl.load(reals + 2 * COLUMNS + j)[None, :]
        u = tl.where(nan, 0.0, x).to(tl.float64) + shift
        e = tl.exp(-2.0 * tl.abs(u))
        value = half * (tl.where(u < 0, e - 1.0, 1.0 - e) / (1.0 + e)) - offset
        value = (value + 6755399441055744.0) - 6755399441055744.0  # 1.5 * 2^52: to the nearest integer, even on ties
        digit = tl.minimum(tl.maximum(value.to(tl.int64) + levels // 2, 0), levels - 1)
        low = tl.where(levels > LARGEST, digit.to(tl.int32), low)
    width = levels // 2
    if x.dtype == tl.float64:
        y = (low - width).to(tl.float64) / width.to(tl.float64)
    else:
        y = tl.div_rn((low - width).to(tl.float32), width.to(tl.float32))
    tl.store(quantized + at, tl.where(nan, x, y).to(quantized.dtype.element_ty), mask=inside)
    bad = tl.max((nan & inside).to(tl.int32), 1)
    index = tl.sum(tl.where(inside, low * basis, 0), 1)
    tl.store(indices + rows, tl.where(bad > 0, -1, index), mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def _fsq_backward_kernel(
    z, grad, dz, slopes, shifts, N, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    _, j, at, inside = _row_tile(N, D, ROWS, COLUMNS)
    x = tl.load(z + at, mask=inside, other=0.0).to(slopes.dtype.element_ty)
    g = tl.load(grad + at, mask=inside, other=0.0).to(x.dtype)
    u = tl.abs(x + tl.load(shifts + j)[None, :])
    if x.dtype == tl.float64:
        h = tl.exp(-u)
    else:
        h = exp_negative(-u)
    sech = 2.0 * h / (1.0 + h * h)
    value = g * tl.load(slopes + j)[None, :] * sech * sech
    tl.store(dz + at, value.to(dz.dtype.element_ty), mask=inside)


def _rounded_up(value: float) -> float:
    """The smallest float32 that is not below ``value``."""
    nearest = torch.tensor(value, dtype=torch.float32)
    return float(nearest if float(nearest) >= value else torch.nextafter(nearest, torch.tensor(torch.inf)))


@functools.lru_cache(maxsize=256)
def _tables(levels: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    """thresholds [most - 1, COLUMNS], integers [levels, basis], float64 [half, offset, shift], slopes, shifts."""
    columns = triton.next_power_of_2(len(levels))
    few = [count if count <= LARGEST else 1 for count in levels]
    thresholds = torch.full((max(max(few) - 1, 1), columns), torch.inf, dtype=dtype)
    integers = torch.ones(2, columns, dtype=torch.int32)
    reals = torch.zeros(3, columns, dtype=torch.float64)
    slopes = torch.zeros(columns, dtype=dtype)
    for j, count in enumerate(levels):
        half, offset, width = (count - 1) * (1 + 1e-3) / 2, 0.0 if count % 2 else 0.5, count // 2
        shift = math.atanh(offset / half)
        for v in range(1, few[j]):
            exact = math.atanh((v - width - 0.5 + offset) / half) - shift
            thresholds[v - 1, j] = exact if dtype == torch.float64 else _rounded_up(exact)
        integers[0, j], integers[1, j] = count, math.prod(levels[:j])
        reals[0, j], reals[1, j], reals[2, j] = half, offset, shift
        slopes[j] = half / width
    tables = thresholds, integers, reals, slopes, reals[2].to(dtype)
    return *(t.to(device) for t in tables), (max(few) - 1).bit_length()


def _launch(op: str, z: torch.Tensor, levels: list[int]):
    """Tables of ``levels``, binary search steps, grid, and the numbers that both kernels take."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    *tables, steps = _tables(tuple(levels), dtype, z.device)
    columns = triton.next_power_of_2(len(levels))
    tuned = dict(config(op, f"D{columns}"))
    elements = tuned.pop("ELEMENTS") * 4 // dtype.itemsize  # doubles take two registers each
    rows = max(1, elements // columns)
    return (
        tables,
        steps,
        (triton.cdiv(z.shape[0], rows),),
        {"D": len(levels), "ROWS": rows, "COLUMNS": columns, **tuned},
    )


def fsq(z: torch.Tensor, levels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """z [N,d] -> quantized [N,d], indices int32 [N]."""
    z = z.contiguous()
    N = z.shape[0]
    quantized, indices = torch.empty_like(z), torch.empty(N, dtype=torch.int32, device=z.device)
    if N:
        (thresholds, integers, reals, *_), steps, grid, numbers = _launch("fsq", z, levels)
        large = max(levels) > LARGEST
        _fsq_kernel[grid](
            z, quantized, indices, thresholds, integers, reals, N, STEPS=steps, LARGEST=LARGEST, LARGE=large, **numbers
        )
    return quantized, indices


def fsq_backward(z: torch.Tensor, grad: torch.Tensor, levels: list[int]) -> torch.Tensor:
    """z, grad [N,d] -> dz [N,d]."""
    z, grad = z.contiguous(), grad.contiguous()
    dz = torch.empty_like(z)
    if z.shape[0]:
        (*_, slopes, shifts), _, grid, numbers = _launch("fsq_backward", z, levels)
        _fsq_backward_kernel[grid](z, grad, dz, slopes, shifts, z.shape[0], **numbers)
    return dz
