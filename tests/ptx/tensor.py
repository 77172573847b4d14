"""Tensor cores: mma.sync of a warp, wgmma of a warpgroup (128 threads, operands in shared memory).

The layouts are those of the PTX manual. Products are exact; with an odd seed (``launch.rough``) their sum is rounded
the way tensor cores are said to do it: aligned to the largest one and cut, the worst that a kernel's error bound must
stand; otherwise it is float32's.
"""

from __future__ import annotations

import re

import numpy as np

from .machine import operation
from .parse import operands_of
from .races import EVERY_WARP, READ
from .values import PtxError, bf16_to_f32, tf32

_FLOATS = {"bf16": 2, "f16": 2, "tf32": 4}
EXTRA_BITS = 1  # kept below float32's last one while products are added


def tensor_sum(a: np.ndarray, b: np.ndarray, start: np.ndarray, rough: bool) -> np.ndarray:
    """start + a b for float32 [..., M, K], [..., K, N], [..., M, N]."""
    with np.errstate(all="ignore"):
        if not rough:
            return start + np.matmul(a, b)
        out = start
        step = 8 if a.shape[-1] % 8 == 0 else a.shape[-1]
        for k in range(0, a.shape[-1], step):
            products = a[..., :, None, k : k + step].astype(np.float64) * b.swapaxes(-1, -2)[..., None, :, k : k + step]
            terms = np.concatenate([products, out[..., None].astype(np.float64)], -1)
            exponent = np.frexp(np.abs(terms).max(-1, keepdims=True))[1]
            unit = np.ldexp(1.0, exponent - 24 - EXTRA_BITS)
            unit = np.where(np.isfinite(terms).all(-1, keepdims=True) & (unit > 0), unit, 1.0)
            total = (np.trunc(terms / unit) * unit).sum(-1)
            total = np.where(np.isfinite(terms).all(-1), total, terms.sum(-1))
            near = total.astype(np.float32)
            out = np.where(np.abs(near) > np.abs(total), np.nextafter(near, np.float32(0)), near)
        return out


def elements(registers: list[np.ndarray], type_: str) -> np.ndarray:
    """Registers [..., 32] -> float32 [..., 32, registers, elements a register]."""
    raw = np.ascontiguousarray(np.stack(registers, -1))[..., None]
    if type_ == "tf32":
        return tf32(raw)
    halves = raw.view(np.uint16)
    return bf16_to_f32(halves) if type_ == "bf16" else halves.view(np.float16).astype(np.float32)


_THREAD = np.arange(32)
_GROUP, _IN_GROUP = _THREAD // 4, _THREAD % 4


def a_places(register: int, element: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of A (16 rows) that each thread holds in a register; ``width`` elements a register."""
    return _GROUP + 8 * (register % 2), _IN_GROUP * width + element + 4 * width * (register // 2)


def b_places(register: int, element: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of B (8 columns)."""
    return _IN_GROUP * width + element + 4 * width * register, _GROUP


def c_places(register: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of C and D (16 x 8, one float32 a register)."""
    return _GROUP + 8 * (register // 2), 2 * _IN_GROUP + register % 2


@operation("mma")
def _mma(c, i):
    parts = i.parts
    shape = next((p for p in parts if re.fullmatch(r"m\d+n\d+k\d+", p)), "")
    d_type, a_type, b_type, c_type = parts[-4:]
    depth = {"m16n8k16": 16, "m16n8k8": 8, "m16n8k4": 4}.get(shape)
    if depth is None or a_type not in _FLOATS or a_type != b_type or (d_type, c_type) != ("f32", "f32"):
        raise PtxError("shape or type of mma")
    if parts[parts.index(shape) + 1 :][:2] != ["row", "col"]:
        raise PtxError("layout of mma")
    width = 4 // _FLOATS[a_type]
    a_read, b_read, c_read = (
        [c.source(o, type_) for o in operands_of(operand)]
        for operand, type_ in zip(i.operands[1:], ("b32", "b32", "f32"))
    )
    if (len(a_read), len(b_read)) != (16 * depth // (32 * width), 8 * depth // (32 * width)):
        raise PtxError("number of registers of mma")
    writes = [c.target(o, "f32") for o in operands_of(i.operands[0])]

    def run(t, mask):
        t.whole_warps(mask)
        a = np.zeros((t.warps, 16, depth), np.float32)
        b = np.zeros((t.warps, depth, 8), np.float32)
        start = np.zeros((t.warps, 16, 8), np.float32)
        for matrix, read, places in ((a, a_read, a_places), (b, b_read, b_places)):
            values = elements([r(t).reshape(-1, 32) for r in read], a_type)
            for register in range(len(read)):
                for element in range(width):
                    row, column = places(register, element, width)
                    matrix[:, row, column] = values[:, :, register, element]
        for register, read in enumerate(c_read):
            row, column = c_places(register)
            start[:, row, column] = read(t).reshape(-1, 32)
        out = tensor_sum(a, b, start, t.launch.rough)
        for register, write in enumerate(writes):
            row, column = c_places(register)
            write(t, np.ascontiguousarray(out[:, row, column]).ravel(), mask)

    return run


# --------------------------------------------------------------------------------------------------------------- wgmma

_SPANS = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a swizzled row
_XOR = {0: 0, 1: 7, 2: 3, 3: 1}


def swizzled(address: np.ndarray, mode: int) -> np.ndarray:
    return address ^ (((address >> 7) & _XOR[mode]) << 4)


def descriptor_places(descriptor: int, rows: int, depth: int, size: int, transposed: bool) -> np.ndarray:
    """Shared-memory addresses [rows, depth] of a matrix that a 64-bit descriptor describes; rows are M or N, depth is
    K; ``transposed``: rows are contiguous in memory instead of K."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = descriptor >> 62 & 3
    span = _SPANS[mode]
    r, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    if transposed:
        byte = r * size
        offset = byte // span * leading + byte % span + k % 8 * span + k // 8 * stride
    else:
        byte = k * size
        offset = r // 8 * stride + r % 8 * span + byte % span + byte // span * leading
    return swizzled(start + offset, mode)


@operation("wgmma")
def _wgmma(c, i):
    if i.parts[1] == "fence":
        return lambda t, mask: None
    if i.parts[1] == "commit_group":

        def commit(t, mask):
            t.products_committed[mask] += 1

        return commit
    if i.parts[1] == "wait_group":
        pending = int(i.operands[0])
        return lambda t, mask: _finish(t, mask, pending)
    return _wgmma_product(c, i)


def _finish(t, mask, pending: int) -> None:
    """Executes the products of all but the ``pending`` youngest groups: until then nothing may rely on them. The first
    warp that waits has them executed for its whole warpgroup."""
    left = []
    for execute, lanes, group in t.products:
        done = mask & lanes & (group < t.products_committed - pending)
        done = np.repeat(done.reshape(-1, 128).any(1), 128)
        if done.any():
            execute(t, done)
        if (lanes & ~done).any():
            left.append((execute, lanes & ~done, group))
    t.products = left


def _wgmma_product(c, i):
    parts, operands = i.parts, i.operands
    shape = next(p for p in parts if p.startswith("m64"))
    columns, depth = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", shape).groups())
    d_type, a_type, b_type = parts[-3:]
    if a_type not in _FLOATS or a_type != b_type or d_type != "f32" or depth * _FLOATS[a_type] != 32:
        raise PtxError("shape or type of wgmma")
    size, width = _FLOATS[a_type], 4 // _FLOATS[a_type]
    names = operands_of(operands[0])
    reads, writes = [c.source(o, "f32") for o in names], [c.target(o, "f32") for o in names]
    in_registers = operands[1].startswith("{")
    a_read = [c.source(o, "b32") for o in operands_of(operands[1])] if in_registers else c.source(operands[1], "b64")
    b_read, keep = c.source(operands[2], "b64"), c.source(operands[3], "pred")
    scale_a, scale_b, *majors = (int(o) for o in operands[4:])
    if (scale_a, scale_b) != (1, 1):
        raise PtxError("negated operand of wgmma")
    a_transposed, b_transposed = majors if len(majors) == 2 else (0, majors[0] if majors else 0)

    def matrix(t, block, descriptor: int, rows: int, transposed: bool, lanes) -> np.ndarray:
        place = descriptor_places(descriptor, rows, depth, size, transposed)
        flat = place.ravel().astype(np.int64)
        owners = np.full(flat.size, lanes[0])
        region, at = t.memory.locate(t, "shared", flat, owners, size, size)
        t.memory.check_written(t, region, at, owners, size)
        if region.shadow is not None:
            t.memory.mark(t, region, READ, at, owners, size, EVERY_WARP)
        raw = region.views[size][at // size].reshape(place.shape)
        return (
            elements([raw.astype(np.uint32) if size == 4 else raw], a_type)[..., 0, 0]
            if size == 4
            else (bf16_to_f32(raw) if a_type == "bf16" else raw.view(np.float16).astype(np.float32))
        )

    def execute(t, mask, kept, a_descriptor, b_descriptor):
        for group in np.flatnonzero(mask.reshape(-1, 128).any(1)):
            lanes = slice(128 * group, 128 * group + 128)
            own = np.arange(128 * group, 128 * group + 128)
            block = t.block[own[0]]
            if in_registers:
                values = elements([r(t)[lanes].reshape(4, 32) for r in a_read], a_type)
                a = np.zeros((4, 16, depth), np.float32)
                for register in range(len(a_read)):
                    for element in range(width):
                        row, column = a_places(register, element, width)
                        a[:, row, column] = values[:, :, register, element]
                a = a.reshape(64, depth)
            else:
                a = matrix(t, block, int(a_descriptor[own[0]]), 64, a_transposed, own)
            b = matrix(t, block, int(b_descriptor[own[0]]), columns, b_transposed, own).T
            start = np.zeros((4, 16, columns), np.float32)
            if kept[own[0]]:
                for register, read in enumerate(reads):
                    row, column = c_places(register % 4)
                    start[:, row, column + 8 * (register // 4)] = read(t)[lanes].reshape(4, 32)
            out = tensor_sum(a.reshape(4, 16, depth), b[None], start, t.launch.rough)
            only = np.zeros(t.n, bool)
            only[lanes] = True
            for register, write in enumerate(writes):
                row, column = c_places(register % 4)
                value = np.zeros(t.n, np.float32)
                value[lanes] = out[:, row, column + 8 * (register // 4)].ravel()
                write(t, value, t.everyone if t.n == 128 else only)

    def run(t, mask):
        group = t.gather_warpgroup(mask)
        if group is None:
            return
        # read now, whenever the product is executed; the accumulators and A in registers belong to it until then
        operands_now = keep(t), None if in_registers else a_read(t), b_read(t)
        if t.launch.early:
            execute(t, group, *operands_now)
        else:
            t.products.append((lambda t, m: execute(t, m, *operands_now), group.copy(), t.products_committed.copy()))

    return run
