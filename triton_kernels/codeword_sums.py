"""codeword_sums: sums[h,k] = sum of z[h,n] over indices[h,n] == k, counts[h,k] = number of those n.

    1. stable sort of the codes             rows of codeword 0 | 1 | 2 ...      (torch.sort)
    2. program (piece, columns):            PIECE rows of one codeword  --[LANES, BLOCK] float64--> sums or partials
    3. program (position, columns):         partials of a codeword of several pieces, in order   --> sums

Work and bytes: z read once, N D element sizes; the sort moves about 60 bytes a row. N D float64 additions: memory
bound, also where float64 runs at 1/64 of the float32 rate. A collapsed codebook is as fast as a uniform one: the pieces
of one codeword are programs of their own.
Numerics: added in float64, rounded once. Determinism: no atomics; row i of a piece goes to lane i mod LANES, lanes are
added by halves, pieces in order, so the bits depend on the values alone: not on the order of programs, the chip, the
number of warps.
Indices < 0 and >= K are skipped: the host would have to wait for the device to report one.
Run in Triton's interpreter only; tuning is open.
"""

import torch
import triton
import triton.language as tl

from .inductor import visible
from .tuning import config

PIECE = 256  # rows of one codeword that one program adds
LANES = 16  # rows added side by side, and partials in step 3
MAX_BLOCK = 128  # columns a program


@triton.jit
def _add_lanes(x, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over the first dimension of [LANES, BLOCK] by halves: a sum of two is the same in either order."""
    tl.static_assert(LANES == 16)
    for half in tl.static_range(3, -1, -1):
        x = tl.sum(tl.reshape(x, [2, 1 << half, BLOCK]), 0)
    return tl.reshape(x, [BLOCK])


@triton.jit
def _piece_kernel(
    z, order, offsets, first, owner, sums, partials, HK, D,
    PIECE: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)
    k = tl.load(owner + piece)
    if k >= HK:  # the host launches as many programs as there can be pieces
        return
    last = tl.load(offsets + k + 1)
    begin = tl.load(offsets + k)
    whole = last - begin <= PIECE
    begin += (piece - tl.load(first + k)) * PIECE
    end = tl.minimum(begin + PIECE, last)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.zeros([LANES, BLOCK], tl.float64)
    for start in range(begin, end, LANES):
        i = start + tl.arange(0, LANES)
        row = tl.load(order + i, mask=i < end, other=0)
        inside = (i < end)[:, None] & (d < D)[None, :]
        lanes += tl.load(z + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float64)
    total = _add_lanes(lanes, LANES, BLOCK)
    if whole:
        tl.store(sums + k * D + d, total.to(sums.dtype.element_ty), mask=d < D)
    else:
        # begins of full pieces are at least PIECE apart, and so are begins of last pieces that follow full ones
        slot = 2 * (begin // PIECE) + (end == last).to(tl.int64)
        tl.store(partials + slot * D + d, total, mask=d < D)


@triton.jit
def _combine_kernel(
    code, offsets, sums, partials, HK, D, PIECE: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # a codeword with more than PIECE rows has one at a multiple of PIECE; the program of the first such place adds it
    place = tl.program_id(0).to(tl.int64)
    k = tl.load(code + place * PIECE).to(tl.int64)
    if k >= HK:
        return
    begin = tl.load(offsets + k)
    count = tl.load(offsets + k + 1) - begin
    if count <= PIECE or (begin + PIECE - 1) // PIECE != place:
        return
    pieces = (count + PIECE - 1) // PIECE
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.zeros([LANES, BLOCK], tl.float64)
    for start in range(0, pieces, LANES):
        piece = start + tl.arange(0, LANES)
        slot = 2 * ((begin + piece * PIECE) // PIECE) + (piece == pieces - 1).to(tl.int64)
        inside = (piece < pieces)[:, None] & (d < D)[None, :]
        lanes += tl.load(partials + slot[:, None] * D + d[None, :], mask=inside, other=0.0)
    tl.store(sums + k * D + d, _add_lanes(lanes, LANES, BLOCK).to(sums.dtype.element_ty), mask=d < D)


def codeword_sums(z: torch.Tensor, indices: torch.Tensor, codebook_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """z [H,N,D], indices int64 [H,N] -> sums [H,K,D] float32 (float64 for float64), counts int64 [H,K]."""
    z = z.contiguous()
    H, N, D = z.shape
    HK = H * codebook_size
    sums = torch.empty(
        H, codebook_size, D, dtype=z.dtype if z.dtype == torch.float64 else torch.float32, device=z.device
    )
    number = {"device": z.device, "dtype": torch.int32 if HK < 2**31 else torch.int64}
    head = torch.arange(0, HK, codebook_size, **number).unsqueeze(1)
    inside = (indices >= 0) & (indices < codebook_size)
    code = torch.where(inside, indices.to(number["dtype"]) + head, HK)
    code, order = code.flatten().sort(stable=True)
    offsets = torch.searchsorted(code, torch.arange(HK + 1, **number))
    counts = offsets.diff()
    if HK and D:
        first = torch.zeros_like(offsets)  # of each codeword: the number of its first piece; all have at least one
        first[1:] = ((counts + (PIECE - 1)) // PIECE).clamp(min=1).cumsum(0)
        programs, places = HK + H * N // PIECE, triton.cdiv(H * N, PIECE)
        owner = torch.searchsorted(first[1:], torch.arange(programs, device=z.device), right=True)
        partials = torch.empty(2 * places, D, dtype=torch.float64, device=z.device)
        block = min(MAX_BLOCK, triton.next_power_of_2(D))
        columns, tuned = triton.cdiv(D, block), config("codeword_sums", f"D{block}")
        visible(_piece_kernel)[programs, columns](
            z, order, offsets, first, owner, sums, partials, HK, D, PIECE, LANES, block, **tuned
        )
        if H * N > PIECE:
            visible(_combine_kernel)[places, columns](
                code, offsets, sums, partials, HK, D, PIECE, LANES, block, **tuned
            )
    return sums, counts.view(H, codebook_size)
