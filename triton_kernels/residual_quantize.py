"""residual_quantize: r_0 = z; k_l = nearest(r_{l-1}); r_l = r_{l-1} - c_l; quantized = (c_1 + c_2) + ...; its backward.

    program = ROWS rows of one head, all levels:

      z --> residual --+--> scaled, rounded to fp16 --> scores against CODES codewords a step --> best, second a lane
            ^          |                                                                             |
            |          +--> survivors compared canonically (only where the bound does not decide) <--+
            +-- residual - c <-- index <---------------------------------------------------------------+
      after the last level:  indices --> quantized, valid rows, sums of the squared residuals --> losses (second kernel)

    backward: program = ROWS whole rows: residuals again from z and the indices, the estimator's Jacobian, commitment

The fp16 copy of the residuals, which the hot loop multiplies, stays in registers or shared memory while the level's
codebook streams by (D <= WHOLE, from the tuning table; longer rows are cut in steps of FEATURES, as in a matrix
product). The float32 residual itself lies in memory that no other program touches, 4 D bytes a row (float32, float64:
in the output's own place): held in registers it would cost as many of them as the scores do. A program writes and
reads it once a level, so it stays in the caches.

Work: 2NKD flops a level on tensor cores. fp16 for every dtype: a residual is float32 after one level, and scaled to
its own exponent it keeps 11 bits in fp16, as many as in tf32, at twice the speed. Bytes: z once, quantized once, 8Q a
row of indices and 8Q of squares. Codebooks: once a program, from the second-level cache. The backward is memory bound:
z, grad, indices and dz once, the codewords of each row from the caches.
Numerics: a level's index is the certified nearest codeword of its residual (search.py, docs/numerics.md). Where several
codewords survive the coarse pass, a lane's best ones are compared at once; a lane that hides a second survivor, or a
row without a bound, has the level's scores computed again. Subtractions and additions are one IEEE operation an element
in float32 (float64 for float64).
Determinism: no atomics; losses add rows within a program, then programs in order.
Limits: codebooks of one call are padded to the largest K in memory, not in work. An index outside its codebook makes
the row's gradient NaN: the host would have to wait for the device to report it.
Nothing here has been timed on a GPU.
"""

import torch
import triton
import triton.language as tl

from .rotation_trick import estimator_apply, estimator_weights, five_dots, store_rounded
from .search import (
    COSINE,
    L2,
    MAX_FEATURES,
    block,
    canonical_pairs,
    coarse_copy,
    coarse_scale,
    dots_of_rows,
    dots_of_tile,
    exponent,
    keep_lower,
    largest_magnitude,
    normalize,
    prepare_codebook,
    row_margin,
)
from .tuning import config

STE, ROTATION = 0, 1
ARITHMETIC = "fp16"
_NONE: tl.constexpr = tl.constexpr(2147483647)  # above every index
_SAFE_EXPONENT: tl.constexpr = tl.constexpr(400)  # of float64 values whose squares neither overflow nor vanish


@triton.jit
def _normalize_rows(x, out, rows, inside, D, BLOCK: tl.constexpr):
    """search.normalize for the rows of one program."""
    total = tl.zeros(rows.shape, dtype=tl.float64)
    for i in range(D):
        v = tl.load(x + rows * D + i, mask=inside, other=0.0).to(tl.float64)
        total += v * v
    norm = tl.sqrt(total)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        at = rows[:, None] * D + d[None, :]
        within = inside[:, None] & (d[None, :] < D)
        v = tl.load(x + at, mask=within, other=0.0).to(tl.float64)
        v = tl.where((norm > 0)[:, None], v / tl.where(norm > 0, norm, 1.0)[:, None], 0.0)
        tl.store(out + at, v.to(out.dtype.element_ty), mask=within)


@triton.jit
def _scores(
    operand, coarse_rows, coarse_book, half_norms, t, ratio, D: tl.constexpr, CODES: tl.constexpr,
    FEATURES: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """Coarse scores of the t-th tile of codewords, [ROWS, CODES]. operand: the tile of coarse rows where it is whole,
    else which rows of coarse_rows."""
    codes = tl.cast(t, tl.int64) * CODES + tl.arange(0, CODES)
    if FEATURES == D:
        dots = dots_of_tile(operand, coarse_book, codes, D, ARITHMETIC)
    else:
        dots = dots_of_rows(coarse_rows, coarse_book, operand, codes, D, D, 1, FEATURES, ARITHMETIC)
    return tl.load(half_norms + codes)[None, :] - ratio[:, None] * dots


@triton.jit
def _compare(x, codewords, rows, codes, value, index, D, L2: tl.constexpr):
    """Canonical comparison of every row with its codes [ROWS, CODES], one code of each row at a time; _NONE: no code.
    value, index: the lowest so far."""
    code = tl.min(codes, 1)
    while tl.min(code, 0) < _NONE:
        some = code < _NONE
        this = canonical_pairs(x, codewords, rows, tl.where(some, code, 0).to(tl.int64), some, D, L2)
        value, index = keep_lower(this, tl.where(some, code, -1), value, index)
        codes = tl.where(codes > code[:, None], codes, _NONE)
        code = tl.min(codes, 1)
    return value, index


@triton.jit(do_not_specialize=["N", "Q", "STEP"])
def _residual_quantize_kernel(
    z, mask, codebooks, units, coarse_books, half_norms, largest, norms, errors, sizes, residual, unit_rows,
    coarse_rows, indices, squares, quantized, sums, counts, N, D, K, PADDED_K, Q, STEP, MASKED: tl.constexpr,
    L2: tl.constexpr, COSINE: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    h, H = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, rows, lanes = n < N, h * N + n, tl.arange(0, CODES)
    to = h * tl.num_programs(0) * ROWS + n  # rows of the coarse copy, which has whole tiles
    everywhere = n >= 0
    wanted = inside
    if MASKED:
        wanted = inside & (tl.load(mask + rows, mask=inside, other=0) != 0)
    alive = wanted  # rows that have been finite so far
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        at = rows[:, None] * D + d[None, :]
        within = alive[:, None] & (d[None, :] < D)
        tl.store(residual + at, tl.load(z + at, mask=within, other=0.0).to(residual.dtype.element_ty), mask=within)
    for level in range(Q):
        book = (level * STEP * H + h).to(tl.int64)
        tl.debug_barrier()  # what the rows' last step wrote is read by other threads from here on
        x = residual
        if COSINE:
            alive = alive & (largest_magnitude(residual, rows, alive, D, BLOCK) >= 0)
            _normalize_rows(residual, unit_rows, rows, alive, D, BLOCK)
            tl.debug_barrier()
            x = unit_rows
        magnitude = largest_magnitude(x, rows, alive, D, BLOCK)
        alive = alive & (magnitude >= 0)
        row_exponent = exponent(magnitude)
        norm2, lost2 = coarse_copy(
            x, coarse_rows, rows, to, alive, everywhere, coarse_scale(row_exponent), D, PADDED_D, 1, PADDED_D, BLOCK,
            ARITHMETIC,
        )  # fmt: skip
        c_largest = tl.load(largest + book)
        ratio, margin = row_margin(
            PADDED_D, row_exponent, magnitude, norm2, lost2, c_largest, tl.load(norms + book), tl.load(errors + book),
            L2, ARITHMETIC,
        )  # fmt: skip
        if x.dtype.element_ty == tl.float64:
            outer = tl.maximum(tl.abs(row_exponent), tl.abs(exponent(c_largest + 0.0 * magnitude)))
            margin = tl.where(outer <= _SAFE_EXPONENT, margin, float("inf"))
        tl.debug_barrier()

        # the coarse pass: every lane keeps its lowest score, the tile that had it and its second lowest
        tiles = ((tl.load(sizes + level) + CODES - 1) // CODES).to(tl.int32)
        best = tl.full([ROWS, CODES], float("inf"), tl.float32)
        second = best
        tile = tl.zeros([ROWS, CODES], dtype=tl.int32)
        coarse_book, halves = coarse_books + book * PADDED_K * PADDED_D, half_norms + book * PADDED_K
        operand = to  # the rows in memory
        if FEATURES == PADDED_D:  # the tile itself
            operand = tl.load(coarse_rows + to[:, None] * PADDED_D + tl.arange(0, FEATURES)[None, :])
        for t in range(tiles):
            scores = _scores(operand, coarse_rows, coarse_book, halves, t, ratio, PADDED_D, CODES, FEATURES, ARITHMETIC)
            second = tl.minimum(second, tl.maximum(best, scores))
            tile = tl.where(scores < best, t, tile)
            best = tl.minimum(best, scores)
        lowest = tl.min(best, 1)
        alive = alive & (lowest < float("inf"))
        near = alive[:, None] & (best < float("inf")) & (best - lowest[:, None] <= margin[:, None])
        codes = tl.where(near, tile * CODES + lanes[None, :], _NONE)
        index = tl.min(codes, 1)
        behind = tl.min(second, 1)
        hidden = alive & (behind < float("inf")) & (behind - lowest <= margin)
        # minima and maxima of numbers: for a count of booleans some compilers reserve a stack frame
        unsure = hidden | (tl.max(tl.where(near, codes, -1), 1) > index)

        if tl.max(unsure.to(tl.int32), 0) > 0:
            codewords = units + book * K * D
            value = tl.full([ROWS], float("inf"), tl.float64)
            choice = tl.full([ROWS], -1, tl.int32)
            codes = tl.where((unsure & ~hidden)[:, None], codes, _NONE)
            value, choice = _compare(x, codewords, rows, codes, value, choice, D, L2)
            if tl.max(hidden.to(tl.int32), 0) > 0:
                for t in range(tiles):
                    scores = _scores(
                        operand, coarse_rows, coarse_book, halves, t, ratio, PADDED_D, CODES, FEATURES, ARITHMETIC
                    )
                    near = hidden[:, None] & (scores < float("inf")) & (scores - lowest[:, None] <= margin[:, None])
                    codes = tl.where(near, t * CODES + lanes[None, :], _NONE)
                    value, choice = _compare(x, codewords, rows, codes, value, choice, D, L2)
            index = tl.where(unsure, choice, index)

        index = tl.where(alive, index, 0).to(tl.int64)
        tl.store(indices + rows * Q + level, index, mask=inside)
        tl.debug_barrier()  # comparisons have read the residual
        square = tl.zeros([ROWS], dtype=tl.float64)
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            at = rows[:, None] * D + d[None, :]
            within = alive[:, None] & (d[None, :] < D)
            c = tl.load(codebooks + (book * K + index)[:, None] * D + d[None, :], mask=within, other=0.0)
            r = tl.load(residual + at, mask=within, other=0.0) - c.to(residual.dtype.element_ty)
            tl.store(residual + at, r, mask=within)
            square += tl.sum(r.to(tl.float64) * r.to(tl.float64), 1)
        tl.store(squares + level * H * N + rows, square, mask=inside)

    tl.debug_barrier()
    alive = alive & (largest_magnitude(residual, rows, alive, D, BLOCK) >= 0)
    tl.debug_barrier()  # the residual's place may be that of quantized
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        within = alive[:, None] & (d[None, :] < D)
        index = tl.load(indices + rows * Q, mask=alive, other=0)
        total = tl.load(codebooks + (h * K + index)[:, None] * D + d[None, :], mask=within, other=0.0)
        total = total.to(residual.dtype.element_ty)
        for level in range(1, Q):
            index = tl.load(indices + rows * Q + level, mask=alive, other=0) + (level * STEP * H + h) * K
            c = tl.load(codebooks + index[:, None] * D + d[None, :], mask=within, other=0.0)
            total += c.to(residual.dtype.element_ty)
        total = tl.where(alive[:, None], total, tl.where(wanted, float("nan"), 0.0)[:, None])
        at = rows[:, None] * D + d[None, :]
        tl.store(quantized + at, total.to(quantized.dtype.element_ty), mask=inside[:, None] & (d[None, :] < D))
    program = h * tl.num_programs(0) + tl.program_id(0)
    for level in range(Q):
        tl.store(indices + rows * Q + level, tl.full([ROWS], -1, tl.int64), mask=inside & ~alive)
        square = tl.load(squares + level * H * N + rows, mask=alive, other=0.0)
        tl.store(sums + level * H * tl.num_programs(0) + program, tl.sum(square, 0))
    tl.store(counts + program, tl.sum(alive.to(tl.int64), 0))


@triton.jit(do_not_specialize=["PROGRAMS"])
def _losses_kernel(sums, counts, losses, valid, PROGRAMS, D, BLOCK: tl.constexpr):
    """One program a level: losses[level] = sum of its sums / (valid rows x D); valid = sum of counts."""
    level = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    count = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, PROGRAMS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(sums + level.to(tl.int64) * PROGRAMS + at, mask=at < PROGRAMS, other=0.0)
        count += tl.load(counts + at, mask=at < PROGRAMS, other=0)
    rows = tl.sum(count, 0)
    loss = tl.sum(total, 0) / (tl.maximum(rows, 1) * D).to(tl.float64)
    tl.store(losses + level, loss.to(losses.dtype.element_ty))
    if level == 0:
        tl.store(valid, rows)


@triton.jit(do_not_specialize=["N", "Q", "STEP"])
def _residual_quantize_backward_kernel(
    z, codebooks, sizes, indices, grad, scales, dz, N, D, K, Q, STEP, SIGN: tl.constexpr, PER_LEVEL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SIGN: 1 rotation, -1 reflection, 0 straight-through."""
    h, H = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, rows, d = n < N, h * N + n, tl.arange(0, BLOCK)
    valid, known = inside, inside
    for level in range(Q):
        index = tl.load(indices + rows * Q + level, mask=inside, other=0)
        valid = valid & (index >= 0)
        known = known & (index < tl.load(sizes + level))
    at = rows[:, None] * D + d[None, :]
    written = inside[:, None] & (d[None, :] < D)
    within = (valid & known)[:, None] & (d[None, :] < D)
    first = tl.load(z + at, mask=within, other=0.0)
    g = tl.load(grad + at, mask=within, other=0.0)
    residual = first.to(scales.dtype.element_ty)
    total = tl.zeros([ROWS, BLOCK], dtype=scales.dtype.element_ty)
    quantized = total
    for level in range(Q):
        index = tl.load(indices + rows * Q + level, mask=valid & known, other=0) + (level * STEP * H + h) * K
        c = tl.load(codebooks + index[:, None] * D + d[None, :], mask=within, other=0.0).to(scales.dtype.element_ty)
        if PER_LEVEL:
            if SIGN == 0:
                total += g.to(scales.dtype.element_ty)
            else:
                zz, qq, zq, zg, qg = five_dots(residual, c, g)
                wa, wb, wc, regular = estimator_weights(zz, qq, zq, zg, qg, SIGN)
                total += estimator_apply(residual, c, g, wa, wb, wc, regular).to(scales.dtype.element_ty)
        residual -= c
        quantized += c
        total += tl.load(scales + level) * residual
    result = total.to(tl.float64)
    if not PER_LEVEL:
        if SIGN == 0:
            result += g.to(tl.float64)
        else:
            zz, qq, zq, zg, qg = five_dots(first, quantized, g)
            wa, wb, wc, regular = estimator_weights(zz, qq, zq, zg, qg, SIGN)
            result += estimator_apply(first, quantized, g, wa, wb, wc, regular)
    result = tl.where(valid[:, None], tl.where(known[:, None], result, float("nan")), 0.0)
    store_rounded(dz + at, result, written)


def pack(codebooks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Q x [H,K_l,D] -> [L*H,K,D], K the largest, padded with NaN; int64 [Q], each level's K; and from one level to the
    next, in codebooks of [H,K,D]: 0 where all levels share one codebook (L = 1), else 1 (L = Q).

    The sizes are written by fills, not copied from the host: a CUDA graph can capture them.
    """
    first, levels = codebooks[0], len(codebooks)
    H, K, D = first.shape
    sizes = torch.full((levels,), K, dtype=torch.int64, device=first.device)
    if all((c.data_ptr(), c.shape, c.stride()) == (first.data_ptr(), first.shape, first.stride()) for c in codebooks):
        return first.contiguous(), sizes, 0
    if all(c.shape == first.shape for c in codebooks):
        return torch.cat(codebooks).contiguous(), sizes, 1
    packed = first.new_full((levels, H, max(c.shape[1] for c in codebooks), D), float("nan"))
    for level, codebook in enumerate(codebooks):
        packed[level, :, : codebook.shape[1]] = codebook
        sizes[level].fill_(codebook.shape[1])
    return packed.flatten(0, 1), sizes, 1


def residual_quantize(z: torch.Tensor, codebooks: list[torch.Tensor], mask: torch.Tensor | None, metric: int):
    """z [H,N,D], codebooks Q x [H,K_l,D] -> indices [H,N,Q], quantized [H,N,D], losses [Q], valid rows []."""
    z = z.contiguous()
    H, N, D = z.shape
    levels, device = len(codebooks), z.device
    if D > MAX_FEATURES:
        raise ValueError(f"residual_quantize: z has {D} features; its Triton kernel takes at most {MAX_FEATURES}")
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    indices = torch.empty(H, N, levels, dtype=torch.int64, device=device)
    quantized = torch.empty_like(z)
    if H * N == 0:
        return indices, quantized, torch.zeros(levels, dtype=dtype, device=device), indices.new_zeros(())
    width = max(16, triton.next_power_of_2(D))
    tile = config("residual_quantize", f"{str(z.dtype)[6:]} D{width}")
    features = width if width <= tile["WHOLE"] else tile["FEATURES"]
    packed, sizes, step = pack(codebooks)
    units = normalize(packed) if metric == COSINE else packed
    books = prepare_codebook(units, ARITHMETIC, metric == L2, tile["CODES"], features)
    programs = triton.cdiv(N, tile["ROWS"])
    residual = quantized if z.dtype == dtype else torch.empty_like(z, dtype=dtype)
    unit_rows = torch.empty_like(z, dtype=dtype) if metric == COSINE else residual
    coarse_rows = torch.empty(H, programs * tile["ROWS"], books.padded_D, dtype=books.coarse.dtype, device=device)
    squares = torch.empty(levels, H, N, dtype=torch.float64, device=device)
    sums = torch.empty(levels, H, programs, dtype=torch.float64, device=device)
    counts = torch.empty(H, programs, dtype=torch.int64, device=device)
    _residual_quantize_kernel[(programs, H)](
        z, z if mask is None else mask.contiguous(), packed, units, books.coarse, books.half_norms, books.largest,
        books.norm, books.error, sizes, residual, unit_rows, coarse_rows, indices, squares, quantized, sums, counts,
        N, D, packed.shape[1], books.padded_K, levels, step, mask is not None, metric == L2, metric == COSINE,
        books.padded_D, tile["ROWS"], tile["CODES"], features, block(D, 32), ARITHMETIC,
        num_warps=tile["num_warps"], num_stages=tile["num_stages"], enable_fp_fusion=False,
    )  # fmt: skip
    losses = torch.empty(levels, dtype=dtype, device=device)
    valid = torch.empty((), dtype=torch.int64, device=device)
    _losses_kernel[(levels,)](sums, counts, losses, valid, H * programs, D, 1024, enable_fp_fusion=False)
    return indices, quantized, losses, valid


def residual_quantize_backward(
    z: torch.Tensor,
    codebooks: list[torch.Tensor],
    indices: torch.Tensor,
    grad: torch.Tensor,
    commitment_scale: torch.Tensor,
    estimator: int,
    per_level: bool,
) -> torch.Tensor:
    """dz [H,N,D]; 0 where an index is -1."""
    z, grad, indices = z.contiguous(), grad.contiguous(), indices.contiguous()
    H, N, D = z.shape
    dz = torch.empty_like(z)
    if dz.numel() == 0:
        return dz
    packed, sizes, step = pack(codebooks)
    width = triton.next_power_of_2(D)
    tile = config("residual_quantize_backward", f"{str(z.dtype)[6:]} D{width}")
    rows = max(1, tile["ELEMENTS"] // width)
    warps = min(8, tile["num_warps"] * max(1, width // tile["ELEMENTS"]))
    sign = 0 if estimator == STE else 1 if estimator == ROTATION else -1
    _residual_quantize_backward_kernel[(triton.cdiv(N, rows), H)](
        z, packed, sizes, indices, grad, commitment_scale.contiguous(), dz, N, D, packed.shape[1], len(codebooks), step,
        sign, per_level, rows, width, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return dz
