"""Global, shared, local and parameter memory; ld and st. Every access is checked: inside an allocation, aligned,
written before it is read (shared memory), and with the race check ordered with every other (races.py)."""

from __future__ import annotations

import numpy as np

from .machine import LOCAL_WINDOW, SHARED_WINDOW, operation
from .parse import operands_of
from .races import READ, WRITE, Shadow
from .values import RAW, PtxError, bits, kind

SPACES = ("global", "shared", "local", "param", "const")
_VECTOR = {"v2": 2, "v4": 4, "v8": 8}


class Region:
    """Bytes that can be indexed as elements of 1, 2, 4 or 8 bytes."""

    def __init__(self, size: int, fill: int = 0):
        self.bytes = np.full((size + 15) // 16 * 16 + 16, fill, np.uint8)
        self.views = {width: self.bytes.view(raw) for width, raw in RAW.items()}
        self.written: Region | None = None  # ones where something was stored, if that is watched
        self.shadow: Shadow | None = None


class Memory:
    """The memory of one launch. Global memory is a copy of the arguments' bytes, in one piece; addresses stay those of
    the arguments."""

    def __init__(self, allocations: list[tuple[str, int, np.ndarray]], shared: int, local: int, params: bytes, races):
        self.names, self.races = [name for name, _, _ in allocations], races
        self.buffers = [buffer for _, _, buffer in allocations]
        self.starts = np.array([start for _, start, _ in allocations], np.int64)
        self.sizes = np.array([buffer.size for _, _, buffer in allocations], np.int64)
        if (np.diff(self.starts) < 0).any():
            raise ValueError("allocations must be sorted by address")
        places, top = [], 0
        for start, buffer in zip(self.starts, self.buffers):
            top = (top + 15) // 16 * 16 + int(start % 16)  # alignment stays
            places.append(top)
            top += buffer.size
        self.places = np.array(places, np.int64)
        self.arena = Region(top)
        for place, buffer in zip(places, self.buffers):
            self.arena.bytes[place : place + buffer.size] = buffer
        if races:
            self.arena.shadow = Shadow(self.arena.bytes.size)
        self.shared_size, self.shared_stride = shared, (shared + 1023) // 1024 * 1024 + 1024
        self.local_size, self.local_stride = local, (local + 15) // 16 * 16
        self.params = Region(len(params))
        self.params.bytes[: len(params)] = np.frombuffer(params, np.uint8)

    def write_back(self) -> None:
        for place, buffer in zip(self.places, self.buffers):
            buffer[:] = self.arena.bytes[place : place + buffer.size]

    def begin_batch(self, t) -> None:
        t.shared = Region(t.blocks * self.shared_stride, 0xFF)
        t.shared.written = Region(t.blocks * self.shared_stride)
        t.shared.shadow = Shadow(t.shared.bytes.size) if self.races else None
        t.local = Region(t.n * self.local_stride, 0xFF)

    def locate(self, t, space: str, address: np.ndarray, lanes, size: int, align: int) -> tuple[Region, np.ndarray]:
        """Addresses of the threads ``lanes`` -> the region and the places of their bytes in it."""
        if (address & (align - 1)).any():
            bad = int(address[(address & (align - 1)) != 0][0])
            raise PtxError(f"misaligned: address {bad:#x} is no multiple of {align}")
        if space == "generic":
            windows = address >> 60
            if (windows != windows[0]).any():
                raise PtxError("generic addresses of one instruction in different spaces")
            space = {SHARED_WINDOW >> 60: "shared", LOCAL_WINDOW >> 60: "local"}.get(int(windows[0]), "global")
            address = address & (SHARED_WINDOW - 1)
        if space in ("global", "const"):
            which = np.searchsorted(self.starts, address, side="right") - 1
            offset = address - self.starts[which]
            bad = (which < 0) | (offset + size > self.sizes[which])
            if bad.any():
                self._outside(t, address, which, offset, bad, lanes, size)
            return self.arena, offset + self.places[which]
        if space == "param":
            return self.params, address
        limit, stride = (
            (self.shared_size, self.shared_stride) if space == "shared" else (self.local_size, self.local_stride)
        )
        bad = (address < 0) | (address + size > limit)
        if bad.any():
            raise PtxError(
                f"out of bounds: {size} bytes at {int(address[bad][0])} of {limit} bytes of {space} memory, "
                f"{self._who(t, bad, lanes)}"
            )
        row = (
            (t.block if space == "shared" else t.lane)
            if lanes is None
            else (t.block if space == "shared" else t.lane)[lanes]
        )
        return (t.shared if space == "shared" else t.local), address + row * stride

    def _who(self, t, bad, lanes) -> str:
        first = int(np.flatnonzero(bad)[0])
        lane = first if lanes is None else int(lanes[first])
        block = tuple(int(b) for b in t._special["%ctaid"][:, lane])
        return f"{int(bad.sum())} threads, first: thread {lane % t.threads} of block {block}"

    def _outside(self, t, address, which, offset, bad, lanes, size) -> None:
        first = int(np.flatnonzero(bad)[0])
        k = int(which[first])
        near = f" = {self.names[k]} + {int(offset[first])} bytes, which has {int(self.sizes[k])}" if k >= 0 else ""
        raise PtxError(
            f"out of bounds: {size} bytes at {int(address[first]) & (1 << 64) - 1:#x}{near}; {self._who(t, bad, lanes)}"
        )

    # Element access, ``count`` of ``size`` bytes each at consecutive places; values are raw, one row an element.
    def load(self, t, region: Region, at: np.ndarray, lanes, size: int, count: int = 1) -> list[np.ndarray]:
        index = at // size
        self.check_written(t, region, at, lanes, size, count)
        if region.shadow is not None:
            self.mark(t, region, READ, at, lanes, size * count)
        view = region.views[size]
        return [view[index + j] for j in range(count)]

    def check_written(self, t, region: Region, at: np.ndarray, lanes, size: int, count: int = 1) -> None:
        if region.written is None:
            return
        known, ones = region.written.views[size], _ones(size)
        for j in range(count):
            bad = known[at // size + j] != ones
            if bad.any():
                place = int(at[bad][0]) % self.shared_stride + j * size
                who = self._who(t, bad, lanes)
                raise PtxError(f"uninitialised: reads shared memory at {place} where nothing was written, {who}")

    def store(self, t, region: Region, at: np.ndarray, lanes, size: int, values: list[np.ndarray]) -> None:
        index, view = at // size, region.views[size]
        if region.shadow is not None:
            if region.written is None:
                self.mark(t, region, WRITE, at, lanes, size * len(values))
            else:  # several warps may write the same value to the same place: the compiler does so
                for j, value in enumerate(values):
                    new = (view[index + j] != value) | (region.written.bytes[at + j * size] == 0)
                    if new.any():
                        own = np.flatnonzero(new) if lanes is None else lanes[new]
                        place, first = np.unique(at[new] + j * size, return_index=True)
                        if self._one_value(place, at[new] + j * size, value[new]):
                            self.mark(t, region, WRITE, place, own[first], size)
                        else:
                            self.mark(t, region, WRITE, at[new] + j * size, own, size)
        for j, value in enumerate(values):
            view[index + j] = value
            if region.written is not None:
                region.written.views[size][index + j] = _ones(size)

    @staticmethod
    def _one_value(place: np.ndarray, at: np.ndarray, value: np.ndarray) -> bool:
        """Whether equal places get equal values."""
        where = np.searchsorted(place, at)
        chosen = np.empty(place.size, value.dtype)
        chosen[where] = value
        return bool((chosen[where] == value).all())

    def mark(self, t, region: Region, access: int, at: np.ndarray, lanes, size: int, warp=None) -> None:
        lanes = t.lane if lanes is None else lanes
        block = t.block[lanes]
        warp = t.warp[lanes] + t.first_block * t.warps_a_block if warp is None else np.full(lanes.shape, warp)
        region.shadow.access(access, at[:, None] + np.arange(size), block + t.first_block, warp, t.epoch[block])


def _ones(size: int):
    """An element of ``size`` bytes that are all 1: "written"."""
    return RAW[size](0x0101010101010101 & ((1 << 8 * size) - 1))


def space_of(parts: list[str]) -> str:
    return next((p.split("::")[0] for p in parts if p.split("::")[0] in SPACES), "generic")


def vector_of(parts: list[str]) -> int:
    return next((_VECTOR[p] for p in parts if p in _VECTOR), 1)


def chosen(mask, t):
    """The mask as an index array, or None for every thread."""
    return None if mask is t.everyone else np.flatnonzero(mask)


def pick(array: np.ndarray, lanes) -> np.ndarray:
    return array if lanes is None else array[lanes]


def spread(value: np.ndarray, lanes, n: int) -> np.ndarray:
    """The values of the threads ``lanes`` as an array over all threads."""
    if lanes is None:
        return value
    full = np.zeros(n, value.dtype)
    full[lanes] = value
    return full


@operation("ld", "ldu")
def _load(c, i):
    parts = i.parts
    size, dtype = kind(parts[-1])
    count, space, address = vector_of(parts), space_of(parts), c.address(i.operands[1])
    targets = [c.target(o, parts[-1]) for o in operands_of(i.operands[0])]
    if len(targets) != count:
        raise PtxError("vector width and registers differ")

    def run(t, mask):
        lanes = chosen(mask, t)
        region, at = t.memory.locate(t, space, pick(address(t), lanes), lanes, size * count, size * count)
        for write, value in zip(targets, t.memory.load(t, region, at, lanes, size, count)):
            write(t, spread(value, lanes, t.n).view(dtype), mask)

    return run


@operation("st")
def _store(c, i):
    parts = i.parts
    size, _ = kind(parts[-1])
    count, space, address = vector_of(parts), space_of(parts), c.address(i.operands[0])
    sources = [c.source(o, parts[-1]) for o in operands_of(i.operands[1])]
    if len(sources) != count:
        raise PtxError("vector width and registers differ")

    def run(t, mask):
        lanes = chosen(mask, t)
        region, at = t.memory.locate(t, space, pick(address(t), lanes), lanes, size * count, size * count)
        t.memory.store(t, region, at, lanes, size, [bits(pick(s(t), lanes)) for s in sources])

    return run


@operation("cvta")
def _generic_address(c, i):
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space_of(i.parts), 0)
    source, write = c.source(i.operands[1], "u64"), c.target(i.operands[0], "u64")
    shift = np.uint64(window)
    if "to" in i.parts:
        return lambda t, mask: write(t, source(t) - shift, mask)
    return lambda t, mask: write(t, source(t) + shift, mask)


@operation("isspacep")
def _is_space(c, i):
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space_of(i.parts), 0) >> 60
    source, write = c.source(i.operands[1], "u64"), c.target(i.operands[0], "pred")
    return lambda t, mask: write(t, (source(t) >> np.uint64(60)) == window, mask)
