"""Instructions in which the 32 threads of a warp exchange values: shfl, vote, match, redux, ldmatrix, stmatrix."""

from __future__ import annotations

import numpy as np

from .machine import operation
from .parse import operands_of
from .races import READ
from .values import PtxError, kind

_BIT = np.uint64(1) << np.arange(32, dtype=np.uint64)


def ballot(rows: np.ndarray) -> np.ndarray:
    """bool [warps, 32] -> one mask a warp."""
    return (rows * _BIT).sum(1).astype(np.uint32)


def check_members(t, mask, members: np.ndarray) -> None:
    """Every thread that a .sync instruction names must be here, and whoever is here must be named."""
    here = ballot(mask.reshape(-1, 32))
    named = members.reshape(-1, 32)
    rows = mask.reshape(-1, 32)
    if (((named >> np.arange(32, dtype=np.uint32)) & np.uint32(1) == 0) & rows).any():
        raise PtxError("warp divergence: a thread executes the instruction and is not in its membermask")
    missing = named & ~here[:, None]
    bad = (missing != 0) & rows
    if bad.any():
        raise PtxError(f"warp divergence: threads {int(missing[bad][0]):#x} of the membermask are elsewhere or ended")


@operation("shfl")
def _shuffle(c, i):
    if "sync" not in i.parts:
        raise PtxError("shfl without .sync")
    target, _, inside = i.operands[0].partition("|")
    value, by, clamp, members = (c.source(o, "b32") for o in i.operands[1:])
    mode, write = i.parts[2], c.target(target, "b32")
    write_inside = c.target(inside, "pred") if inside else None

    def run(t, mask):
        check_members(t, mask, members(t))
        own = t.lane % 32
        delta, limits = by(t).astype(np.int64) & 31, clamp(t).astype(np.int64)
        segment = (limits >> 8) & 31
        last, first = (own & segment) | (limits & 31 & ~segment), own & segment
        other = {"up": own - delta, "down": own + delta, "bfly": own ^ delta, "idx": first | (delta & ~segment)}[mode]
        valid = other >= last if mode == "up" else other <= last
        lane = np.where(valid, other, own)
        if not mask.all():  # a value from a thread that does not take part is undefined
            absent = ~mask[t.lane - own + lane] & mask
            if absent.any():
                raise PtxError("warp divergence: reads a thread that does not take part")
        write(t, value(t)[t.lane - own + lane], mask)
        if write_inside:
            write_inside(t, valid, mask)

    return run


@operation("vote")
def _vote(c, i):
    parts = i.parts
    mode = parts[2]
    test, members = c.source(i.operands[1], "pred"), c.source(i.operands[2], "b32")
    write = c.target(i.operands[0], parts[-1])

    def run(t, mask):
        check_members(t, mask, members(t))
        rows, here = test(t).reshape(-1, 32), mask.reshape(-1, 32)
        if mode == "ballot":
            out = ballot(rows & here)
        elif mode == "any":
            out = (rows & here).any(1)
        elif mode == "all":
            out = (rows | ~here).all(1)
        else:  # uni
            out = (rows | ~here).all(1) | (~rows | ~here).all(1)
        write(t, np.repeat(out, 32), mask)

    return run


@operation("match")
def _match(c, i):
    if i.parts[1] != "any":
        raise PtxError("match.all")
    value, members = c.source(i.operands[1], i.parts[-1]), c.source(i.operands[2], "b32")
    write = c.target(i.operands[0], "b32")

    def run(t, mask):
        check_members(t, mask, members(t))
        rows = value(t).reshape(-1, 32)
        equal = (rows[:, :, None] == rows[:, None, :]) & mask.reshape(-1, 1, 32)
        write(t, (equal * _BIT).sum(2).astype(np.uint32).ravel(), mask)

    return run


@operation("activemask")
def _active(c, i):
    write = c.target(i.operands[0], "b32")
    return lambda t, mask: write(t, np.repeat(ballot(mask.reshape(-1, 32)), 32), mask)


@operation("elect")
def _elect(c, i):
    leader, _, elected = i.operands[0].partition("|")
    write, write_leader = c.target(elected, "pred"), c.target(leader, "b32")

    def run(t, mask):
        rows = mask.reshape(-1, 32)
        first = rows.argmax(1)
        write_leader(t, np.repeat(first.astype(np.uint32), 32), mask)
        write(t, (np.arange(32) == first[:, None]).ravel(), mask)

    return run


@operation("redux")
def _reduce(c, i):
    parts = i.parts
    type_, word = parts[-1], parts[2]
    value, members = c.source(i.operands[1], type_), c.source(i.operands[2], "b32")
    write, dtype = c.target(i.operands[0], type_), kind(type_)[1]
    reduce = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[word]  # fmt: skip
    if type_[0] == "f":
        reduce = {"min": np.minimum, "max": np.maximum} if "NaN" in parts else {"min": np.fmin, "max": np.fmax}
        reduce = reduce[word]

    def run(t, mask):
        check_members(t, mask, members(t))
        rows, here = value(t).reshape(-1, 32), mask.reshape(-1, 32)
        if "abs" in parts:
            rows = np.abs(rows)
        out = rows[:, 0].copy()
        for w in np.flatnonzero(here.any(1)):
            out[w] = reduce.reduce(rows[w, here[w]], dtype=dtype)
        write(t, np.repeat(out, 32), mask)

    return run


# ------------------------------------------------------------- 8 x 8 matrices of 16 bits between registers and memory


def fragment(matrices: np.ndarray) -> np.ndarray:
    """uint16 [..., 8 rows, 8 columns] -> uint32 [..., 32 threads]: thread 4 r + c holds columns 2 c, 2 c + 1 of row r."""
    return np.ascontiguousarray(matrices).view(np.uint32).reshape(*matrices.shape[:-2], 32)


def unfragment(registers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(registers).view(np.uint16).reshape(*registers.shape[:-1], 8, 8)


def _rows(c, i, operand: str, count: int):
    """The addresses of the rows of ``count`` matrices: row r of matrix m comes from thread 8 m + r."""
    space_address = c.address(operand)

    def locate(t, mask):
        warps = t.whole_warps(mask)
        address = space_address(t).reshape(-1, 32)[warps, : 8 * count].ravel()
        lanes = (32 * warps[:, None] + np.arange(8 * count)).ravel()
        region, at = t.memory.locate(t, "shared", address, lanes, 16, 16)
        return warps, lanes, region, at

    return locate


def _check_matrix(i, count: int) -> None:
    if (
        "m8n8" not in i.parts
        or i.parts[-1] != "b16"
        or i.parts[next(n for n, p in enumerate(i.parts) if p[0] == "x")] != f"x{count}"
    ):
        raise PtxError("matrix shape")


@operation("ldmatrix")
def _load_matrix(c, i):
    targets = [c.target(o, "b32") for o in operands_of(i.operands[0])]
    count, transposed = len(targets), "trans" in i.parts
    _check_matrix(i, count)
    locate = _rows(c, i, i.operands[1], count)

    def run(t, mask):
        warps, lanes, region, at = locate(t, mask)
        t.memory.check_written(t, region, at, lanes, 8, 2)
        if region.shadow is not None:
            t.memory.mark(t, region, READ, at, lanes, 16)
        rows = region.views[2][at[:, None] // 2 + np.arange(8)].reshape(len(warps), count, 8, 8)
        registers = fragment(rows.swapaxes(2, 3) if transposed else rows)
        for m, write in enumerate(targets):
            out = np.zeros((t.warps, 32), np.uint32)
            out[warps] = registers[:, m]
            write(t, out.ravel(), mask)

    return run


@operation("stmatrix")
def _store_matrix(c, i):
    sources = [c.source(o, "b32") for o in operands_of(i.operands[1])]
    count, transposed = len(sources), "trans" in i.parts
    _check_matrix(i, count)
    locate = _rows(c, i, i.operands[0], count)

    def run(t, mask):
        warps, lanes, region, at = locate(t, mask)
        rows = unfragment(np.stack([s(t).reshape(-1, 32)[warps] for s in sources], 1))
        rows = np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows).reshape(-1, 8)
        words = rows.view(np.uint64)
        t.memory.store(t, region, at, lanes, 8, [words[:, 0], words[:, 1]])

    return run
