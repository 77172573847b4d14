"""Integer, bit, predicate and move instructions, for numpy's wrapping arithmetic."""

from __future__ import annotations

import numpy as np

from .machine import operation
from .parse import operands_of
from .values import RAW, PtxError, is_float, kind


def elementwise(c, i, function, types, result: str):
    """run() of an instruction without side effects: ``function`` of the operands after the first, each read as its
    type, gives the first."""
    sources = [c.source(o, type_) for o, type_ in zip(i.operands[1:], types, strict=True)]
    dtype, write = kind(result)[1], c.target(i.operands[0], result)
    if len(sources) == 1:
        (a,) = sources
        return lambda t, mask: write(t, function(a(t)).astype(dtype, copy=False), mask)
    if len(sources) == 2:
        a, b = sources
        return lambda t, mask: write(t, function(a(t), b(t)).astype(dtype, copy=False), mask)
    return lambda t, mask: write(t, function(*[s(t) for s in sources]).astype(dtype, copy=False), mask)


def wider(type_: str) -> str:
    return type_[0] + str(2 * int(type_[1:]))


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product."""
    size = a.dtype.itemsize
    if size < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * size}")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(8 * size)).astype(a.dtype)
    x, y = a.view(np.uint64), b.view(np.uint64)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    middle2 = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> half) + (middle2 >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded to zero; all ones where the divisor is 0, as the processor does."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    with np.errstate(over="ignore"):
        q = a // divisor
        if a.dtype.kind == "i":
            q = q + ((q * divisor != a) & ((a < 0) != (divisor < 0)))
    return np.where(b == 0, ~b.dtype.type(0), q.astype(a.dtype))


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, a - quotient(a, b) * b)


INTEGER_ARITHMETIC = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": quotient, "rem": remainder, "min": np.minimum,
    "max": np.maximum, "neg": np.negative, "abs": np.abs, "mad": lambda a, b, c: a * b + c,
}  # fmt: skip


def integer_arithmetic(c, i):
    """add, sub, mul, mad, div, rem, min, max, neg, abs; called for types that are no floats."""
    type_, word = i.parts[-1], i.parts[0]
    count = len(i.operands) - 1
    if any(p in ("cc", "sat", "relu") for p in i.parts):
        raise PtxError("carry and saturation")
    if "wide" in i.parts:
        wide = wider(type_)
        dtype = kind(wide)[1]
        product = lambda a, b: a.astype(dtype) * b.astype(dtype)  # noqa: E731
        if word == "mad":
            return elementwise(c, i, lambda a, b, add: product(a, b) + add, [type_, type_, wide], wide)
        return elementwise(c, i, product, [type_, type_], wide)
    if "hi" in i.parts:
        function = high_product if word == "mul" else lambda a, b, add: high_product(a, b) + add
        return elementwise(c, i, function, [type_] * count, type_)
    if type_ in ("u16x2", "s16x2"):
        dtype = np.dtype(np.int16 if type_[0] == "s" else np.uint16)
        function = lambda *x: INTEGER_ARITHMETIC[word](*(v.view(dtype) for v in x)).view(np.uint32)  # noqa: E731
        return elementwise(c, i, function, ["b32"] * count, "b32")
    return elementwise(c, i, INTEGER_ARITHMETIC[word], [type_] * count, type_)


_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@operation("and", "or", "xor", "not")
def _logic(c, i):
    return elementwise(c, i, _LOGIC[i.parts[0]], [i.parts[-1]] * (len(i.operands) - 1), i.parts[-1])


@operation("cnot")
def _cnot(c, i):
    return elementwise(c, i, lambda a: a == 0, [i.parts[-1]], i.parts[-1])


@operation("shl", "shr")
def _shift(c, i):
    type_ = i.parts[-1]
    size, dtype = kind(type_)
    width = np.uint32(8 * size)
    if i.parts[0] == "shl":
        shift = lambda a, n: np.where(n >= width, dtype.type(0), a << np.minimum(n, width - 1).astype(dtype))  # noqa: E731
    elif dtype.kind == "i":
        shift = lambda a, n: a >> np.minimum(n, width - 1).astype(dtype)  # noqa: E731
    else:
        shift = lambda a, n: np.where(n >= width, dtype.type(0), a >> np.minimum(n, width - 1).astype(dtype))  # noqa: E731
    return elementwise(c, i, shift, [type_, "u32"], type_)


@operation("shf")
def _funnel_shift(c, i):
    left, wrap = i.parts[1] == "l", "wrap" in i.parts

    def shift(low, high, n):
        n = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        return (((both << n) >> np.uint64(32)) if left else (both >> n)).astype(np.uint32)

    return elementwise(c, i, shift, ["b32", "b32", "u32"], "b32")


@operation("prmt")
def _permute_bytes(c, i):
    if i.parts[-1] != "b32":
        raise PtxError("prmt mode")

    def permute(a, b, selector):
        source = np.stack([a, b], 1).view(np.uint8)  # 8 bytes a thread
        out = np.zeros((a.size, 4), np.uint8)
        for n in range(4):
            choice = (selector >> np.uint32(4 * n)) & np.uint32(15)
            byte = source[np.arange(a.size), (choice & 7).astype(np.int64)]
            out[:, n] = np.where(choice & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        return out.view(np.uint32).ravel()

    return elementwise(c, i, permute, ["b32"] * 3, "b32")


@operation("lop3")
def _any_logic(c, i):
    table = int(i.operands[4], 0)

    def logic(a, b, d):
        out = np.zeros_like(a)
        for n in range(8):
            if table >> n & 1:
                out |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (d if n & 1 else ~d)
        return out

    sources = [c.source(o, "b32") for o in i.operands[1:4]]
    write = c.target(i.operands[0], "b32")
    return lambda t, mask: write(t, logic(*[s(t) for s in sources]), mask)


@operation("popc")
def _count_ones(c, i):
    return elementwise(c, i, np.bitwise_count, [i.parts[-1]], "u32")


def leading_zeros(a: np.ndarray) -> np.ndarray:
    width = 8 * a.dtype.itemsize
    out = np.full(a.shape, width, np.uint32)
    for n in range(width):
        out[(a >> a.dtype.type(n)) != 0] = width - 1 - n
    return out


@operation("clz")
def _leading_zeros(c, i):
    return elementwise(c, i, leading_zeros, [i.parts[-1]], "u32")


@operation("bfind")
def _highest_bit(c, i):
    type_ = i.parts[-1]
    width, shift_amount = 8 * kind(type_)[0], "shiftamt" in i.parts

    def find(a):
        a = np.where(a < 0, ~a, a).view(RAW[a.dtype.itemsize]) if type_[0] == "s" else a
        zeros = leading_zeros(a)
        return np.where(a == 0, np.uint32(0xFFFFFFFF), zeros if shift_amount else np.uint32(width - 1) - zeros)

    return elementwise(c, i, find, [type_], "u32")


@operation("brev")
def _reverse_bits(c, i):
    type_ = i.parts[-1]
    width, dtype = 8 * kind(type_)[0], kind(type_)[1].type

    def reverse(a):
        out = np.zeros_like(a)
        for n in range(width):
            out |= ((a >> dtype(n)) & dtype(1)) << dtype(width - 1 - n)
        return out

    return elementwise(c, i, reverse, [type_], type_)


def _ones(n: np.ndarray, dtype) -> np.ndarray:
    """2^n - 1, n up to the width."""
    width = 8 * dtype.itemsize
    full = dtype.type((1 << width) - 1)
    return np.where(n == 0, dtype.type(0), full >> np.minimum(width - n.astype(np.int64), width - 1).astype(dtype))


@operation("bfe")
def _extract_bits(c, i):
    type_ = i.parts[-1]
    size, signed = kind(type_)
    raw, width = np.dtype(RAW[size]), 8 * size

    def extract(a, start, length):
        start, length = start & np.uint32(255), np.minimum(length & np.uint32(255), np.uint32(width))
        u = a.view(raw)
        moved = np.where(start >= width, raw.type(0), u >> np.minimum(start, width - 1).astype(raw))
        value = moved & _ones(length, raw)
        if type_[0] == "u":
            return value
        last = np.minimum(start.astype(np.int64) + length - 1, width - 1)
        sign = np.where(
            (length > 0) & ((u >> np.maximum(last, 0).astype(raw)) & raw.type(1) != 0), ~raw.type(0), raw.type(0)
        )
        kept = np.minimum(length.astype(np.int64), np.maximum(width - start.astype(np.int64), 0)).astype(np.uint32)
        return (value | (sign & ~_ones(kept, raw))).view(signed)

    return elementwise(c, i, extract, [type_, "u32", "u32"], type_)


@operation("bfi")
def _insert_bits(c, i):
    type_ = i.parts[-1]
    size, raw = kind(type_)
    width = 8 * size

    def insert(a, b, start, length):
        start, length = start & np.uint32(255), np.minimum(length & np.uint32(255), np.uint32(width))
        shift = np.minimum(start, width - 1).astype(raw)
        field = np.where(start >= width, raw.type(0), _ones(length, raw) << shift)
        return (b & ~field) | ((a << shift) & field)

    return elementwise(c, i, insert, [type_, type_, "u32", "u32"], type_)


@operation("selp")
def _select(c, i):
    type_ = i.parts[-1]
    return elementwise(c, i, lambda a, b, p: np.where(p, a, b), [type_, type_, "pred"], type_)


@operation("slct")
def _select_sign(c, i):
    type_, by = i.parts[-2:]
    return elementwise(c, i, lambda a, b, s: np.where(s >= 0, a, b), [type_, type_, by], type_)


@operation("mov")
def _move(c, i):
    type_ = i.parts[-1]
    target, source = i.operands
    if source.startswith("{"):  # several registers into one
        names = operands_of(source)
        size = kind(type_)[0] // len(names)
        sources, write = [c.source(n, f"b{8 * size}") for n in names], c.target(target, type_)
        raw = RAW[kind(type_)[0]]
        return lambda t, mask: write(t, np.stack([s(t) for s in sources], 1).view(raw).ravel(), mask)
    if target.startswith("{"):  # one into several
        names = operands_of(target)
        size = kind(type_)[0] // len(names)
        read, writes = c.source(source, type_), [c.target(n, f"b{8 * size}") for n in names]

        def split(t, mask):
            values = np.ascontiguousarray(read(t)).view(RAW[size]).reshape(t.n, len(names))
            for n, write in enumerate(writes):
                if names[n] != "_":
                    write(t, values[:, n].copy(), mask)

        return split
    read, write = c.source(source, type_), c.target(target, type_)
    return lambda t, mask: write(t, read(t), mask)


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
_JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(word: str, type_: str):
    if word in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (word == "nan")
    if word in _UNORDERED:
        compare = _COMPARE[_UNORDERED[word]]
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    if word == "ne" and is_float(type_):
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return _COMPARE[word]


@operation("setp")
def _compare(c, i):
    from .floats import halves, reader

    parts, operands = i.parts, i.operands
    type_ = parts[-1]
    compare = _comparison(parts[1], type_)
    if type_ in ("bf16x2", "f16x2"):  # one predicate for each half
        if len(operands) != 3:
            raise PtxError("comparison of pairs with a third predicate")
        a, b = halves(c, operands[1], type_), halves(c, operands[2], type_)
        writes = [c.target(o, "pred") for o in operands[0].split("|")]

        def run_pairs(t, mask):
            for write, x, y in zip(writes, a(t), b(t)):
                write(t, compare(x, y), mask)

        return run_pairs
    a, b = reader(c, operands[1], type_), reader(c, operands[2], type_)
    join = _JOIN.get(parts[2])
    other = c.source(operands[3], "pred") if join else None
    first, _, second = operands[0].partition("|")
    write = c.target(first, "pred")
    write_not = c.target(second, "pred") if second else None

    def run(t, mask):
        value = compare(a(t), b(t))
        if write_not:
            negative = ~value if join is None else join(~value, other(t))
            write_not(t, negative, mask)
        write(t, value if join is None else join(value, other(t)), mask)

    return run


@operation("set")
def _set(c, i):
    from .floats import reader

    parts = i.parts
    result, type_ = parts[-2:]
    if "x2" in type_:
        raise PtxError("set of pairs")
    compare = _comparison(parts[1], type_)
    a, b = reader(c, i.operands[1], type_), reader(c, i.operands[2], type_)
    write, dtype = c.target(i.operands[0], result), kind(result)[1]
    yes = dtype.type(1.0) if dtype.kind == "f" else ~dtype.type(0)
    return lambda t, mask: write(t, np.where(compare(a(t), b(t)), yes, dtype.type(0)), mask)
