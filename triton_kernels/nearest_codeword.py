"""nearest_codeword: indices[h,n] = argmin_k d(z[h,n], codebook[h,k]), ties to the lowest k; distances: its value.

    prepare            coarse copies of codebook and z, bounds (search.py)
    coarse   (n, h, s) ROWS x CODES tiles of scores stream by; each lane of a tile keeps its lowest score, the tile that
                       had it and its second lowest; at the end a row's lanes become one best, second and index
    select   (n, h)    joins the splits s of the codebook. second - best > 2 eps: decided, canonical distance of the
                       winner; else the row goes to a list, by a counter in memory
    compare  (p, h)    a fixed grid walks the list, 16 rows a step: coarse scores again, all codewords within 2 eps of
                       the best compared canonically
    scan     (n, h)    or, alone, every codeword canonically: float64, little work, more features than the bound allows

Work: 2NKD flops on tensor cores, and about six instructions a score beside them (fused multiply-add, two minima, a
maximum, a comparison, a selection): below about 64 features these are the roof, above it the tensor cores. Bytes: z and
the codebook once, their 2-byte copies written and read, 12 bytes a row written; never N x K. Where the tuning table
sets GEMM, cuBLAS makes the dot products of some rows at a time (64 MB) and the coarse kernel only reduces them.
Numerics: docs/numerics.md. A coarse score chooses a winner only where the bound proves it, so results are bit equal to
the reference whatever the arithmetic. certified=False takes the lowest coarse score.
Determinism: the order of the list depends on the order of programs; each row is decided by itself, so results do not.
Limits: all-equal codebooks send every row to compare, and there every codeword to float64: right, and slow.
Nothing here has been timed on a GPU.
"""

import torch
import triton
import triton.language as tl

from . import search
from .search import canonical_pairs, canonical_tile, dots_of_rows, dots_of_tile
from .tuning import config, registers

COMPARED_ROWS = 16  # a step of the compare kernel: the least that tl.dot takes
COMPARED_CODES = 32
PROGRAMS = 2048  # of the compare kernel, one warp each
MIN_PROGRAMS = 256  # of the coarse kernel, if the codebook can be split into that many
SCAN_ROWS, SCAN_CODES = 32, 32
SCAN_WORK = 1 << 16  # N K D of one head, up to which one launch is better than five
GEMM_SCORES = 1 << 24  # float32 at a time
_NO_CODE = tl.constexpr(2147483647)  # above every index


@triton.jit(do_not_specialize=["PADDED_N"])
def _coarse_kernel(
    z, codebook, half_norms, ratios, best_out, second_out, index_out, PADDED_N, PADDED_K, D, stride_k, stride_d,
    splits, ROWS: tl.constexpr, CODES: tl.constexpr, FEATURES: tl.constexpr, PLAN: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """PLAN: "tile" keeps the rows' features in registers, "rows" reads them anew for each tile, "dots": z holds the dot
    products [rows, PADDED_K] already."""
    h, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, CODES)
    share = (PADDED_K // CODES + splits - 1) // splits
    ratio = tl.load(ratios + h * PADDED_N + rows)[:, None]
    z_head, codebook_head, half_norms_head = (
        z + h * PADDED_N * D,
        codebook + h * PADDED_K * D,
        half_norms + h * PADDED_K,
    )
    if PLAN == "tile":
        z_tile = tl.load(z_head + rows[:, None] * D + tl.arange(0, FEATURES)[None, :])
    best = tl.full([ROWS, CODES], float("inf"), tl.float32)
    second = tl.full([ROWS, CODES], float("inf"), tl.float32)
    tile = tl.zeros([ROWS, CODES], dtype=tl.int32)
    for t in range(split * share, tl.minimum(PADDED_K // CODES, (split + 1) * share)):
        codes = tl.cast(t, tl.int64) * CODES + lanes
        if PLAN == "tile":
            dots = dots_of_tile(z_tile, codebook_head, codes, stride_k, ARITHMETIC)
        elif PLAN == "rows":
            dots = dots_of_rows(z_head, codebook_head, rows, codes, D, stride_k, stride_d, FEATURES, ARITHMETIC)
        else:
            dots = tl.load(z + rows[:, None] * PADDED_K + codes[None, :])
        scores = tl.load(half_norms_head + codes)[None, :] - ratio * dots
        second = tl.minimum(second, tl.maximum(best, scores))
        tile = tl.where(scores < best, t, tile)
        best = tl.minimum(best, scores)
    lowest = tl.min(best, 1)
    index = tl.min(tl.where(best == lowest[:, None], tile * CODES + lanes[None, :], _NO_CODE), 1)
    winner = tile * CODES + lanes[None, :] == index[:, None]
    at = (split.to(tl.int64) * tl.num_programs(1) + h) * PADDED_N + rows
    tl.store(best_out + at, lowest)
    tl.store(second_out + at, tl.min(tl.where(winner, second, best), 1))
    tl.store(index_out + at, index)


@triton.jit
def _distance(value, valid, COSINE: tl.constexpr):
    return tl.where(valid, value + 1.0 if COSINE else value, float("nan"))


@triton.jit(do_not_specialize=["N", "PADDED_N"])
def _select_kernel(
    z, codebook, mask, margins, bests, seconds, winners, indices, distances, counts, listed, limits, N, PADDED_N, K, D,
    splits, L2: tl.constexpr, COSINE: tl.constexpr, MASKED: tl.constexpr, CERTIFIED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, rows = n < N, h * N + n
    margin = tl.load(margins + h * PADDED_N + n, mask=inside, other=-1.0)
    best = tl.full([ROWS], float("inf"), tl.float32)
    second = tl.full([ROWS], float("inf"), tl.float32)
    index = tl.zeros([ROWS], dtype=tl.int32)
    for split in range(splits):
        at = (tl.cast(split, tl.int64) * tl.num_programs(1) + h) * PADDED_N + n
        value = tl.load(bests + at, mask=inside, other=float("inf"))
        second = tl.minimum(tl.load(seconds + at, mask=inside, other=float("inf")), second)
        second = tl.minimum(second, tl.maximum(best, value))
        index = tl.where(value < best, tl.load(winners + at, mask=inside, other=0), index)
        best = tl.minimum(best, value)
    usable = inside & (margin >= 0)
    found = best < float("inf")
    gap = second - tl.where(found, best, 0.0)
    decided = usable & found & ((gap > margin) if CERTIFIED else (margin < float("inf")))
    value = canonical_pairs(z, codebook, rows, h * K + index, decided, D, L2)
    value = _distance(value, decided, COSINE)
    if MASKED:
        value = tl.where(tl.load(mask + rows, mask=inside, other=0) != 0, value, 0.0)
    listing = usable & (decided == 0)
    store = inside & (listing == 0)
    tl.store(indices + rows, tl.where(decided, index, -1).to(tl.int64), mask=store)
    tl.store(distances + rows, value.to(distances.dtype.element_ty), mask=store)
    # the list has its rows in any order
    listing = listing.to(tl.int32)
    first = tl.atomic_add(counts + h, tl.sum(listing, 0), sem="relaxed")
    slot = h * N + first + tl.cumsum(listing, 0) - 1
    tl.store(listed + slot, n, mask=listing != 0)
    tl.store(limits + slot, tl.where(found, best, 0.0) + margin, mask=listing != 0)


@triton.jit(do_not_specialize=["N", "PADDED_N"])
def _compare_kernel(
    z, codebook, coarse_z, coarse_codebook, half_norms, ratios, counts, listed, limits, indices, distances, N, PADDED_N,
    K, PADDED_K, D, PADDED_D, stride_k, stride_d, L2: tl.constexpr, COSINE: tl.constexpr, ROWS: tl.constexpr,
    CODES: tl.constexpr, FEATURES: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + h)
    lanes = tl.arange(0, CODES)
    for step in range(tl.program_id(0), (count + ROWS - 1) // ROWS, tl.num_programs(0)):
        slot = step * ROWS + tl.arange(0, ROWS)
        inside = slot < count
        n = tl.load(listed + h * N + slot, mask=inside, other=0)
        limit = tl.load(limits + h * N + slot, mask=inside, other=float("-inf"))[:, None]
        ratio = tl.load(ratios + h * PADDED_N + n)[:, None]
        best = tl.full([ROWS], float("inf"), tl.float64)
        index = tl.full([ROWS], -1, tl.int32)
        for t in range(PADDED_K // CODES):
            start = tl.cast(t, tl.int64) * CODES
            dots = dots_of_rows(
                coarse_z + h * PADDED_N * PADDED_D, coarse_codebook + h * PADDED_K * PADDED_D, n, start + lanes,
                PADDED_D, stride_k, stride_d, FEATURES, ARITHMETIC,
            )  # fmt: skip
            half = tl.load(half_norms + h * PADDED_K + start + lanes)[None, :]
            survives = (half - ratio * dots <= limit) & (half < float("inf")) & inside[:, None]
            # in lockstep, each row its next survivor; usually one row has one
            for _pair in range(tl.max(tl.sum(survives.to(tl.int32), 1), 0)):
                lane = tl.min(tl.where(survives, lanes[None, :], CODES), 1)
                valid = lane < CODES
                value = canonical_pairs(z, codebook, h * N + n, h * K + start + lane, valid, D, L2)
                value = tl.where(valid, value, float("inf"))
                index = tl.where(value < best, t * CODES + lane, index)
                best = tl.minimum(best, value)
                survives = survives & (lanes[None, :] != lane[:, None])
        rows = h * N + n
        tl.store(indices + rows, index.to(tl.int64), mask=inside)
        tl.store(distances + rows, _distance(best, index >= 0, COSINE).to(distances.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _scan_kernel(
    z, codebook, mask, indices, distances, N, K, D, L2: tl.constexpr, COSINE: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows, inside = h * N + n, n < N
    usable = inside
    if MASKED:
        usable = usable & (tl.load(mask + rows, mask=inside, other=0) != 0)
    valid = usable & (search.largest_magnitude(z, rows, usable, D, BLOCK) >= 0)
    best = tl.full([ROWS], float("inf"), tl.float64)
    index = tl.full([ROWS], _NO_CODE, tl.int64)
    for t in range(tl.cdiv(K, CODES)):
        codes = tl.cast(t, tl.int64) * CODES + tl.arange(0, CODES)
        value, finite = canonical_tile(z, codebook, rows, h * K + codes, valid, codes < K, D, L2)
        # a sum of overflowing products may be NaN: such a row has no nearest codeword
        valid = valid & (tl.max(((value != value) & finite[None, :]).to(tl.int32), 1) == 0)
        value = tl.where(finite[None, :] & (value == value), value, float("inf"))
        lowest = tl.min(value, 1)
        code = tl.min(tl.where(finite[None, :] & (value == lowest[:, None]), codes[None, :], _NO_CODE), 1)
        better = (lowest < best) | ((lowest == best) & (code < index))
        index = tl.where(better, code, index)
        best = tl.where(better, lowest, best)
    valid = valid & (index < _NO_CODE)
    value = _distance(best, valid, COSINE)
    if MASKED:
        value = tl.where(usable, value, 0.0)
    tl.store(indices + rows, tl.where(valid, index, -1), mask=inside)
    tl.store(distances + rows, value.to(distances.dtype.element_ty), mask=inside)


def plan(dtype: torch.dtype, K: int, D: int) -> dict:
    """Arithmetic and tiles for a dtype, K codewords and D features, from the tuning table; never from N.

    Float32 rows are rounded to fp16, whose eleven bits are as good as tf32's at twice the speed, because the rows are
    scaled; a table may name another arithmetic by its place in search.ARITHMETICS. Below 16 features codewords lie so
    close together that only float32 decides. cuBLAS gets values that it multiplies exactly in tf32 mode and without.
    """
    few = D < 16
    numbers = config("nearest_codeword", f"{str(dtype).removeprefix('torch.')} D{'<16' if few else search.block(D)}")
    arithmetic = "bf16" if dtype == torch.bfloat16 else "fma" if few else "fp16"
    if "ARITHMETIC" in numbers:
        arithmetic = search.ARITHMETICS[numbers["ARITHMETIC"]]
    codes = min(numbers["CODES"], max(COMPARED_CODES, triton.next_power_of_2(K)))
    features = min(numbers["FEATURES"], max(16, triton.next_power_of_2(D)))
    return numbers | {"ARITHMETIC": "tf32" if numbers["GEMM"] else arithmetic, "CODES": codes, "FEATURES": features}


def nearest_codeword(
    z: torch.Tensor, codebook: torch.Tensor, mask: torch.Tensor | None, metric: int, certified: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """z [H,N,D], codebook [H,K,D], mask [H,N] or None -> indices int64 [H,N], distances [H,N]."""
    H, N, D = z.shape
    K = codebook.shape[1]
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    indices = torch.empty(H, N, dtype=torch.int64, device=z.device)
    distances = torch.empty(H, N, dtype=dtype, device=z.device)
    if H == 0 or N == 0:
        return indices, distances
    z, codebook = z.contiguous(), codebook.contiguous()
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    if metric == search.COSINE:
        z, codebook = search.normalize(z), search.normalize(codebook)
    l2, cosine, masked = metric == search.L2, metric == search.COSINE, mask is not None
    some_mask = mask if masked else z
    if z.dtype == torch.float64 or D > search.MAX_FEATURES or N * K * D <= SCAN_WORK:
        _scan_kernel[(triton.cdiv(N, SCAN_ROWS), H)](
            z, codebook, some_mask, indices, distances, N, K, D, l2, cosine, masked, SCAN_ROWS, SCAN_CODES,
            search.block(D, 32), enable_fp_fusion=False,
        )  # fmt: skip
        return indices, distances

    numbers = plan(z.dtype, K, D)
    arithmetic, features = numbers["ARITHMETIC"], numbers["FEATURES"]
    coarse = search.prepare_codebook(codebook, arithmetic, l2, numbers["CODES"], features)
    coarse_z, ratios, margins = search.prepare_rows(z, mask, coarse, numbers["ROWS"])
    padded_N = ratios.shape[1]
    bests, seconds, winners = coarse_pass(coarse_z, ratios, coarse, numbers)
    counts = torch.zeros(H, dtype=torch.int32, device=z.device)
    listed = torch.empty(H, N, dtype=torch.int64, device=z.device)
    limits = torch.empty(H, N, dtype=torch.float32, device=z.device)
    _select_kernel[(triton.cdiv(N, 128), H)](
        z, codebook, some_mask, margins, bests, seconds, winners, indices, distances, counts, listed, limits,
        N, padded_N, K, D, bests.shape[0], l2, cosine, masked, certified, 128, enable_fp_fusion=False,
    )  # fmt: skip
    programs = min(triton.cdiv(N, COMPARED_ROWS), max(1, PROGRAMS // H))
    _compare_kernel[(programs, H)](
        z, codebook, coarse_z, coarse.coarse, coarse.half_norms, ratios, counts, listed, limits, indices, distances,
        N, padded_N, K, coarse.padded_K, D, coarse.padded_D, *coarse.strides, l2, cosine, COMPARED_ROWS, COMPARED_CODES,
        min(features, 64), arithmetic, num_warps=1, num_stages=3, enable_fp_fusion=False, **registers(168),
    )  # fmt: skip
    return indices, distances


def dot_products(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """float32 z.c by torch. A GPU multiplies these values exactly, in tf32 mode too. For CPU tensors the precision
    "medium" would round them to bfloat16, which no bound allows for; float64 is beyond its reach."""
    if z.is_cpu:
        return (z.double() @ codebook.double()).float()
    return z @ codebook


def coarse_pass(z: torch.Tensor, ratios: torch.Tensor, codebook: search.Codebook, numbers: dict):
    """z: coarse copy -> best and second score float32, index of the best int32, all [splits,H,PADDED_N]."""
    H, padded_N, D = z.shape
    K, arithmetic = codebook.padded_K, codebook.arithmetic
    rows, codes, features = numbers["ROWS"], numbers["CODES"], numbers["FEATURES"]
    options = {"num_warps": numbers["num_warps"], "num_stages": numbers["num_stages"], "enable_fp_fusion": True}
    if numbers["GEMM"]:
        splits, step = 1, max(rows, GEMM_SCORES // K // rows * rows)
    else:
        splits = min(K // codes, triton.cdiv(MIN_PROGRAMS, H * (padded_N // rows)))
    best, second = torch.empty(2, splits, H, padded_N, dtype=torch.float32, device=z.device)
    index = torch.empty(splits, H, padded_N, dtype=torch.int32, device=z.device)
    if not numbers["GEMM"]:
        whole = arithmetic != "fma" and features == D
        _coarse_kernel[(padded_N // rows, H, splits)](
            z, codebook.coarse, codebook.half_norms, ratios, best, second, index, padded_N, K, D, *codebook.strides,
            splits, rows, codes, features, "tile" if whole else "rows", arithmetic, **options,
        )  # fmt: skip
        return best, second, index
    matrix = codebook.coarse.view(H, K, D).mT
    for h in range(H):
        for first in range(0, padded_N, step):
            part = slice(first, min(padded_N, first + step))
            dots = dot_products(z[h, part], matrix[h])
            _coarse_kernel[(len(dots) // rows, 1, 1)](
                dots, z, codebook.half_norms[h], ratios[h, part], best[0, h, part], second[0, h, part],
                index[0, h, part], padded_N, K, D, *codebook.strides, 1, rows, codes, features, "dots", arithmetic,
                **options,
            )  # fmt: skip
    return best, second, index
