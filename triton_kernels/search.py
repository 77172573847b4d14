"""Pieces of the certified search, shared by nearest_codeword and residual_quantize (proofs: docs/numerics.md).

    codebook --exponent, norms--> coarse codebook --+
                                                    +--> scores = h - ratio (z.c) --> best, second --> decided, or
    z -------own exponent, norm-> coarse rows ------+                                               compared canonically

A coarse score is close to s(c) = |c|^2/2 - z.c (dot, cosine: -z.c) and computed on copies of z and the codebook, each
multiplied by a power of two that brings its largest value to [2^8, 2^9) and rounded to what the arithmetic holds:

    "fp16" "bf16" "tf32"   tl.dot on tensor cores; products are exact, because both factors are rounded beforehand
    "ieee"                 tl.dot in float32
    "fma"                  float32 without tl.dot, feature after feature: for few features

What rounding costs is measured, row by row and for the codebook, and enters the bound; nothing is assumed about it.
Values too small for the arithmetic's products to be normal numbers are set to zero, which is measured likewise: it does
not matter whether the hardware keeps subnormal numbers. Copies are padded with zeros to whole tiles: the hot loop has
no masks, and its rows are aligned whatever D is.

Canonical values are float64, feature after feature, multiplication and addition rounded separately: kernels that
compute them are launched with enable_fp_fusion=False.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

L2, COSINE, DOT = 0, 1, 2
ARITHMETICS = ("fma", "ieee", "tf32", "bf16", "fp16")  # a tuning table names one by its place here
COARSE_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}  # the others: float32
MAX_FEATURES = 1 << 16  # the bounds are proved up to here
_ROWS = 32  # a program of the preparing kernels
_MAX_RATIO = tl.constexpr(60)  # of exponents of row and codebook, beyond which there is no bound


@triton.jit
def exponent(x):
    """floor(log2(x)) of positive float64 values, exactly; 0 where x <= 0."""
    field = (x.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    return tl.where(x > 0, field.to(tl.int32) - 1023, 0)


@triton.jit
def power_of_two(e):
    """2^e as float64, for -1022 <= e <= 1023."""
    return ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def coarse_scale(e):
    """What brings a largest magnitude of exponent e to [2^8, 2^9), or as close as float64 has a number for it."""
    return power_of_two(tl.minimum(8 - e, 1023))


@triton.jit
def round_coarse(x, ARITHMETIC: tl.constexpr):
    """float64 -> the float32 value that stands for it in a coarse pass; |x| < 2^9."""
    y = x.to(tl.float32)
    if ARITHMETIC == "fp16":
        y = y.to(tl.float16).to(tl.float32)
    elif ARITHMETIC == "bf16":
        y = y.to(tl.bfloat16).to(tl.float32)
    elif ARITHMETIC == "tf32":
        y = ((y.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(y) >= (2.0**-14 if ARITHMETIC == "fp16" else 2.0**-60), y, 0.0)


@triton.jit
def score_error_bound(
    D, z_norm, z_error, c_norm, c_error, ratio, L2: tl.constexpr, TENSOR_CORES: tl.constexpr
):  # plain arithmetic: score_error_bound.fn does the same on Python's numbers
    """eps with |coarse - canonical| <= eps for every codeword, in units of the scaled codebook's scores.

    z_norm, c_norm: of the scaled row and the longest scaled codeword; z_error, c_error: what rounding them took away;
    ratio: the power of two with score = half_norm - ratio (z.c). Norms may be off by a relative 2^-20.
    """
    magnitude = ratio * (z_norm + z_error) * (c_norm + c_error)
    half = 0.0
    length = z_norm * c_norm * ratio  # of which canonical rounding takes its share
    if L2:
        half = 0.5 * c_norm * c_norm
        length = 0.5 * (ratio * z_norm + c_norm) * (ratio * z_norm + c_norm)
    units = D + 8.0
    if TENSOR_CORES:
        units = 4.0 * D + 88.0
    n32 = units * 2.0**-24
    n64 = (D + 6.0) * 2.0**-53
    lost = ratio * (z_error * c_norm + (z_norm + z_error) * c_error)
    rounded = n32 * (1.0 + 2.0 * n32) * magnitude + 8 * 2.0**-24 * half
    canonical = n64 * (1.0 + 2.0 * n64) * length
    subnormal = (D + 2.0) * (1.0 + ratio) * 2.0**-126
    return (lost + rounded + canonical + subnormal) * (1.0 + 2.0**-10)


@triton.jit
def largest_magnitude(x, rows, inside, D, BLOCK: tl.constexpr):
    """The largest |x[row, d]| as float64, -1 where a value is not finite. x: pointer to [., D]; rows: int64 [R]."""
    largest = tl.zeros(rows.shape, dtype=tl.float64)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        at = rows[:, None] * D + d[None, :]
        v = tl.abs(tl.load(x + at, mask=inside[:, None] & (d[None, :] < D), other=0.0).to(tl.float64))
        v = tl.where(v < float("inf"), v, float("inf"))  # a NaN must not reach max
        largest = tl.maximum(largest, tl.max(v, 1))
    return tl.where(largest < float("inf"), largest, -1.0)


@triton.jit
def coarse_copy(
    x, coarse, rows, to, inside, inside_copy, scale, D, stride_row, stride_d,
    PADDED_D: tl.constexpr, BLOCK: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """Writes rows of x, scaled and rounded, to coarse; rows outside become zero. Returns |row|^2 and |lost|^2."""
    squares = tl.zeros(rows.shape, dtype=tl.float64)
    lost = tl.zeros(rows.shape, dtype=tl.float64)
    for start in range(0, PADDED_D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        at = rows[:, None] * D + d[None, :]
        v = tl.load(x + at, mask=inside[:, None] & (d[None, :] < D), other=0.0).to(tl.float64) * scale[:, None]
        y = round_coarse(v, ARITHMETIC)
        e = v - y.to(tl.float64)
        squares += tl.sum(v * v, 1)
        lost += tl.sum(e * e, 1)
        at = to[:, None] * stride_row + d[None, :] * stride_d
        tl.store(coarse + at, y.to(coarse.dtype.element_ty), mask=inside_copy[:, None] & (d[None, :] < PADDED_D))
    return squares, lost


@triton.jit
def dots_of_tile(z, codebook, codes, stride_k, ARITHMETIC: tl.constexpr):
    """float32 z.c of a tile of rows in registers, [ROWS, FEATURES] of the coarse type, and whole codewords."""
    d = tl.arange(0, z.shape[1])
    c = tl.load(codebook + codes[None, :] * stride_k + d[:, None])
    return tl.dot(z, c, input_precision="tf32" if ARITHMETIC == "tf32" else "ieee")


@triton.jit
def dots_of_rows(
    z, codebook, rows, codes, D, stride_k, stride_d, FEATURES: tl.constexpr, ARITHMETIC: tl.constexpr
):  # fmt: skip
    """float32 z.c of rows and codewords in memory, FEATURES at a time. rows, codes: int64, inside the padded copies."""
    dots = tl.zeros([rows.shape[0], codes.shape[0]], dtype=tl.float32)
    if ARITHMETIC == "fma":
        for i in range(D):
            dots += tl.load(z + rows * D + i)[:, None] * tl.load(codebook + codes * stride_k + i * stride_d)[None, :]
    else:
        d = tl.arange(0, FEATURES)
        z_at = z + rows[:, None] * D + d[None, :]
        c_at = codebook + codes[None, :] * stride_k + d[:, None]
        for start in range(0, D, FEATURES):
            precision: tl.constexpr = "tf32" if ARITHMETIC == "tf32" else "ieee"
            dots = tl.dot(tl.load(z_at + start), tl.load(c_at + start), dots, input_precision=precision)
    return dots


@triton.jit
def canonical_pairs(z, codebook, rows, codes, valid, D, L2: tl.constexpr):
    """The canonical float64 value of z[row] and codebook[code], lane by lane; the nearest codeword minimises it."""
    total = tl.zeros(rows.shape, dtype=tl.float64)
    for d in range(D):
        a = tl.load(z + rows * D + d, mask=valid, other=0.0).to(tl.float64)
        b = tl.load(codebook + codes * D + d, mask=valid, other=0.0).to(tl.float64)
        if L2:
            total += (a - b) * (a - b)
        else:
            total += a * b
    return total if L2 else -total


@triton.jit
def canonical_tile(z, codebook, rows, codes, row_valid, code_valid, D, L2: tl.constexpr):
    """The same for every pair of rows and codes: float64 [ROWS, CODES]; and which codes are finite: int1 [CODES]."""
    total = tl.zeros([rows.shape[0], codes.shape[0]], dtype=tl.float64)
    finite = code_valid
    for d in range(D):
        a = tl.load(z + rows * D + d, mask=row_valid, other=0.0).to(tl.float64)[:, None]
        b = tl.load(codebook + codes * D + d, mask=code_valid, other=0.0).to(tl.float64)
        finite = finite & (tl.abs(b) < float("inf"))
        b = b[None, :]
        if L2:
            total += (a - b) * (a - b)
        else:
            total += a * b
    return total if L2 else -total, finite


@triton.jit
def keep_lower(value, index, best, best_index):
    """Of two candidates a lane, the lower value, on ties the lower index; index -1 is no candidate."""
    better = (index >= 0) & ((best_index < 0) | (value < best) | ((value == best) & (index < best_index)))
    return tl.where(better, value, best), tl.where(better, index, best_index)


@triton.jit(do_not_specialize=["N"])
def _normalize_kernel(x, out, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    total = tl.zeros([ROWS], dtype=tl.float64)
    finite = inside
    for d in range(D):
        v = tl.load(x + rows * D + d, mask=inside, other=0.0).to(tl.float64)
        finite = finite & (tl.abs(v) < float("inf"))
        total += v * v
    norm = tl.sqrt(total)
    for start in range(0, D, BLOCK):
        features = start + tl.arange(0, BLOCK)
        at = rows[:, None] * D + features[None, :]
        mask = inside[:, None] & (features[None, :] < D)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float64)
        v = tl.where((norm > 0)[:, None], v / tl.where(norm > 0, norm, 1.0)[:, None], 0.0)
        v = tl.where(finite[:, None], v, float("nan"))
        tl.store(out + at, v.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _largest_kernel(x, largest, K, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = tl.program_id(1).to(tl.int64) * K + k
    tl.store(largest + rows, largest_magnitude(x, rows, k < K, D, BLOCK), mask=k < K)


@triton.jit
def _prepare_codebook_kernel(
    codebook, largest, head_largest, coarse, half_norms, norms, errors, K, D, PADDED_K, stride_k, stride_d,
    L2: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    padded = k < PADDED_K
    usable = tl.load(largest + h * K + k, mask=k < K, other=-1.0) >= 0
    scale = coarse_scale(exponent(tl.load(head_largest + h) + tl.zeros([ROWS], dtype=tl.float64)))
    squares, lost = coarse_copy(
        codebook, coarse + h * PADDED_K * PADDED_D, h * K + k, k, usable, padded, scale, D, stride_k, stride_d,
        PADDED_D, BLOCK, ARITHMETIC,
    )  # fmt: skip
    half = (0.5 * squares).to(tl.float32) if L2 else tl.zeros([ROWS], dtype=tl.float32)
    at = h * PADDED_K + k
    tl.store(half_norms + at, tl.where(usable, half, float("inf")), mask=padded)
    tl.store(norms + at, tl.sqrt(squares), mask=padded)
    tl.store(errors + at, tl.sqrt(lost), mask=padded)


@triton.jit(do_not_specialize=["N", "PADDED_N"])
def _prepare_rows_kernel(
    z, mask, head_largest, c_norms, c_errors, coarse, ratios, margins, N, D, PADDED_N, MASKED: tl.constexpr,
    L2: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, padded, rows = n < N, n < PADDED_N, h * N + n
    if MASKED:
        inside = inside & (tl.load(mask + rows, mask=inside, other=0) != 0)
    largest = largest_magnitude(z, rows, inside, D, BLOCK)
    usable = inside & (largest >= 0)
    z_exponent = exponent(largest)
    squares, lost = coarse_copy(
        z, coarse, rows, h * PADDED_N + n, usable, padded, coarse_scale(z_exponent), D, PADDED_D, 1,
        PADDED_D, BLOCK, ARITHMETIC,
    )  # fmt: skip
    ratio, margin = row_margin(
        PADDED_D, z_exponent, largest, squares, lost, tl.load(head_largest + h), tl.load(c_norms + h),
        tl.load(c_errors + h), L2, ARITHMETIC,
    )  # fmt: skip
    tl.store(ratios + h * PADDED_N + n, ratio, mask=padded)
    tl.store(margins + h * PADDED_N + n, tl.where(usable, margin, -1.0), mask=padded)


@triton.jit
def row_margin(
    D, z_exponent, largest, squares, lost, c_largest, c_norm, c_error, L2: tl.constexpr, ARITHMETIC: tl.constexpr
):
    """What coarse_scores needs of a row, and the distance within which scores do not decide: float32, 2 eps, or +inf
    where row and codebook are too unlike for a bound."""
    ratio = tl.full(squares.shape, 1.0, tl.float64)
    bounded = largest >= 0
    if L2:
        apart = tl.where(largest > 0, z_exponent - exponent(c_largest + 0.0 * largest), 0)
        bounded = bounded & (apart <= _MAX_RATIO) & (apart >= -_MAX_RATIO)
        ratio = power_of_two(tl.where(bounded, apart, 0))
    eps = score_error_bound(
        D * 1.0, tl.sqrt(squares), tl.sqrt(lost), c_norm, c_error, ratio, L2,
        ARITHMETIC == "fp16" or ARITHMETIC == "bf16" or ARITHMETIC == "tf32",
    )  # fmt: skip
    return ratio.to(tl.float32), tl.where(bounded, 2.0 * eps * (1.0 + 2.0**-20), float("inf")).to(tl.float32)


@dataclass(frozen=True)
class Codebook:
    """A coarse codebook [H, PADDED_K, PADDED_D] and what its scores and bounds need."""

    coarse: torch.Tensor
    half_norms: torch.Tensor  # float32 [H, PADDED_K]: |c|^2/2, 0 for dot; +inf: never wins
    largest: torch.Tensor  # float64 [H]: magnitude, unscaled; below 0: no codeword is finite
    norm: torch.Tensor  # float64 [H]: of the longest scaled codeword
    error: torch.Tensor  # float64 [H]: what rounding took away at most
    arithmetic: str
    l2: bool
    padded_K: int
    padded_D: int
    strides: tuple[int, int]  # of a codeword, of a feature


def block(D: int, limit: int = 128) -> int:
    """Features a step of the preparing kernels."""
    return min(limit, triton.next_power_of_2(D))


def padded_features(D: int, features: int, arithmetic: str) -> int:
    """D as the coarse copies have it: whole steps of ``features``."""
    return D if arithmetic == "fma" else triton.cdiv(D, features) * features


def normalize(x: torch.Tensor) -> torch.Tensor:
    """l2-normalised rows by the documented rule, float32 (float64 for float64); NaN where a row is not finite."""
    out = torch.empty_like(x, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    rows, D = x.numel() // x.shape[-1], x.shape[-1]
    if rows:
        _normalize_kernel[(triton.cdiv(rows, _ROWS),)](x, out, rows, D, _ROWS, block(D, 32), enable_fp_fusion=False)
    return out


def prepare_codebook(codebook: torch.Tensor, arithmetic: str, l2: bool, codes: int, features: int) -> Codebook:
    """codebook [H,K,D], contiguous -> its coarse copy in whole tiles of ``codes`` x ``features``."""
    H, K, D = codebook.shape
    device, step = codebook.device, block(D, 32)
    padded_K, padded_D = triton.cdiv(K, codes) * codes, padded_features(D, features, arithmetic)
    transposed = arithmetic == "fma"  # neighbours in memory are codewords
    strides = (1, padded_K) if transposed else (padded_D, 1)
    largest = torch.empty(H, K, dtype=torch.float64, device=device)
    _largest_kernel[(triton.cdiv(K, _ROWS), H)](codebook, largest, K, D, _ROWS, step, enable_fp_fusion=False)
    head_largest = largest.amax(-1)
    coarse = torch.empty(H, padded_K * padded_D, dtype=COARSE_DTYPE.get(arithmetic, torch.float32), device=device)
    half_norms = torch.empty(H, padded_K, dtype=torch.float32, device=device)
    norms, errors = torch.empty(2, H, padded_K, dtype=torch.float64, device=device)
    _prepare_codebook_kernel[(triton.cdiv(padded_K, _ROWS), H)](
        codebook, largest, head_largest, coarse, half_norms, norms, errors, K, D, padded_K, *strides,
        l2, padded_D, _ROWS, step, arithmetic, enable_fp_fusion=False,
    )  # fmt: skip
    return Codebook(
        coarse, half_norms, head_largest, norms.amax(-1), errors.amax(-1), arithmetic, l2, padded_K, padded_D, strides
    )


def prepare_rows(z: torch.Tensor, mask: torch.Tensor | None, codebook: Codebook, rows: int):
    """z [H,N,D], contiguous -> its coarse copy [H,PADDED_N,PADDED_D], ratios and margins float32 [H,PADDED_N], in whole
    tiles of ``rows``. A margin is 2 eps; +inf: no bound; -1: the row is masked, not finite or padding."""
    H, N, D = z.shape
    padded_N = triton.cdiv(N, rows) * rows
    coarse = torch.empty(H, padded_N, codebook.padded_D, dtype=codebook.coarse.dtype, device=z.device)
    ratios, margins = torch.empty(2, H, padded_N, dtype=torch.float32, device=z.device)
    _prepare_rows_kernel[(triton.cdiv(padded_N, _ROWS), H)](
        z, z if mask is None else mask, codebook.largest, codebook.norm, codebook.error, coarse, ratios, margins,
        N, D, padded_N, mask is not None, codebook.l2, codebook.padded_D, _ROWS, block(D, 32), codebook.arithmetic,
        enable_fp_fusion=False,
    )  # fmt: skip
    return coarse, ratios, margins
