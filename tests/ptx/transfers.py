"""Atomics, and copies from global to shared memory that run in the background (cp.async)."""

from __future__ import annotations

import numpy as np

from .machine import operation
from .memory import Region, chosen, pick, space_of, spread, vector_of
from .parse import operands_of
from .races import ATOMIC, READ, WRITE
from .values import PtxError, bf16_to_f32, f32_to_bf16, kind

_UFUNC = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _combine(word: str, type_: str):
    """(old, value) -> new, on numpy scalars."""
    if word == "exch":
        return lambda old, value: value
    if word == "inc":
        return lambda old, value: old + old.dtype.type(1) if old < value else old.dtype.type(0)
    if word == "dec":
        return lambda old, value: value if old == 0 or old > value else old - old.dtype.type(1)
    if type_ in ("bf16", "bf16x2", "f16x2"):
        return lambda old, value: _packed(_UFUNC[word], old, value, type_)
    return {"min": np.fmin, "max": np.fmax}.get(word, _UFUNC[word]) if type_[0] == "f" else _UFUNC[word]


def _packed(ufunc, old, value, type_):
    a, b = (np.array([x]).view(np.uint16) for x in (old, value))
    if type_ == "f16x2":
        return ufunc(a.view(np.float16), b.view(np.float16)).view(np.uint32)[0]
    out = f32_to_bf16(ufunc(bf16_to_f32(a), bf16_to_f32(b)))
    return out.view(old.dtype)[0]


@operation("atom", "red")
def _atomic(c, i):
    parts, operands = i.parts, list(i.operands)
    type_ = parts[-1]
    word = next(p for p in parts if p in (*_UFUNC, "exch", "cas", "inc", "dec"))
    size, dtype = kind(type_)
    count, space = vector_of(parts), space_of(parts)
    results = operands_of(operands.pop(0)) if parts[0] == "atom" else []
    needed = any(r in c.read_registers for r in results)
    targets = [c.target(r, type_) for r in results] if needed else []
    address = c.address(operands[0])
    sources = [c.source(o, type_) for o in operands_of(operands[1])]
    swap = c.source(operands[2], type_) if word == "cas" else None
    # without a result to return, integers may be combined in any order at once
    whole = not needed and word in _UFUNC and dtype.kind in "iu" and type_[0] in "usb" and type_[:2] != "bf"
    combine = None if word == "cas" else _combine(word, type_)

    def run(t, mask):
        lanes = chosen(mask, t)
        region, at = t.memory.locate(t, space, pick(address(t), lanes), lanes, size * count, size * count)
        if region.shadow is not None:
            t.memory.mark(t, region, ATOMIC, at, lanes, size * count)
        t.memory.check_written(t, region, at, lanes, size, count)
        view, index = region.views[size].view(dtype), at // size
        for j, source in enumerate(sources):
            value = pick(source(t), lanes)
            if whole:
                _UFUNC[word].at(view, index + j, value)
                continue
            new = pick(swap(t), lanes) if swap else None
            old = np.zeros(value.size, dtype)
            order = list(range(value.size))
            t.rng.shuffle(order)
            with np.errstate(all="ignore"):
                for k in order:
                    place = index[k] + j
                    old[k] = current = view[place]
                    if swap:
                        if current == value[k]:
                            view[place] = new[k]
                    else:
                        view[place] = combine(current, value[k])
            if targets:
                targets[j](t, spread(old, lanes, t.n), mask)

    return run


@operation("cp")
def _copy(c, i):
    parts, operands = i.parts, i.operands
    if "async" not in parts or "bulk" in parts:
        raise PtxError("only cp.async without bulk")
    if "commit_group" in parts:

        def commit(t, mask):
            t.committed[mask] += 1

        return commit
    if "wait_group" in parts or "wait_all" in parts:
        pending = int(operands[0], 0) if operands else -1
        return lambda t, mask: _land(t, mask, pending)
    size = int(operands[2], 0)
    target, origin = c.address(operands[0]), c.address(operands[1])
    given = c.source(operands[3], "u32") if len(operands) > 3 else None

    def run(t, mask):
        lanes = np.flatnonzero(mask)
        to, at = t.memory.locate(t, "shared", target(t)[lanes], lanes, size, size)
        data = np.zeros((lanes.size, size), np.uint8)  # what is not read is zero
        length = given(t)[lanes].astype(np.int64) if given else np.full(lanes.size, size)
        for n in np.unique(length):
            if n:
                own = length == n
                where = origin(t)[lanes][own]
                if (where % size).any():
                    raise PtxError(f"misaligned: the source of a copy of {size} bytes")
                region, place = t.memory.locate(t, "global", where, lanes[own], int(n), 1)
                if region.shadow is not None:
                    t.memory.mark(t, region, READ, place, lanes[own], int(n))
                data[own, : int(n)] = region.bytes[place[:, None] + np.arange(n)]
        if to.shadow is not None:
            t.memory.mark(t, to, WRITE, at, lanes, size)
        # the bytes of the target are undefined from now on until they land
        to.written.bytes[at[:, None] + np.arange(size)] = 0
        t.copies.append((lanes, t.committed[lanes], at, data))
        if t.launch.early:
            _fill(t, to, at, data, lanes)

    return run


def _fill(t, region: Region, at, data, lanes) -> None:
    place = at[:, None] + np.arange(data.shape[1])
    region.bytes[place] = data
    region.written.bytes[place] = 1


def _land(t, mask, pending: int) -> None:
    """Ends the copies of all but the ``pending`` youngest groups of each thread (-1: all, committed or not)."""
    left = []
    for lanes, group, at, data in t.copies:
        bound = t.committed[lanes] - pending if pending >= 0 else t.committed[lanes] + 1
        done = mask[lanes] & (group < bound)
        if done.any():
            if t.shared.shadow is not None:
                t.memory.mark(t, t.shared, WRITE, at[done], lanes[done], data.shape[1])
            if not t.launch.early:
                _fill(t, t.shared, at[done], data[done], lanes[done])
        if not done.all():
            rest = ~done
            left.append((lanes[rest], group[rest], at[rest], data[rest]))
    t.copies = left
