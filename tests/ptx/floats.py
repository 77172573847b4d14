"""Floating-point instructions and conversions. The ones that the processor rounds correctly are rounded correctly
here; the .approx ones are deliberately one unit off now and then (values.roughly)."""

from __future__ import annotations

import numpy as np

from .integers import elementwise, integer_arithmetic
from .machine import operation
from .values import (
    PtxError,
    bf16_to_f32,
    bits,
    flush,
    fma,
    fma_odd,
    is_float,
    kind,
    narrow,
    roughly,
)

_ROUNDING = {"rn": "rn", "rna": "rna", "rz": "rz", "rm": "rm", "rp": "rp"}
_HALVES = {"bf16x2": "bf16", "f16x2": "f16"}


def reader(c, operand: str, type_: str):
    """Like c.source, with 16-bit brain floats as float32."""
    read = c.source(operand, type_)
    return (lambda t: bf16_to_f32(read(t))) if type_ == "bf16" else read


def _by_halves(function, type_: str):
    """A function of float arrays as one of packed pairs."""
    one = _HALVES[type_]

    def packed(*values):
        low, high = (bits(narrow(function(*x), one)).astype(np.uint32) for x in zip(*(_split(v, one) for v in values)))
        return low | high << np.uint32(16)

    return packed


def _split(pairs: np.ndarray, one: str) -> list[np.ndarray]:
    """The lower and the upper elements of packed pairs."""
    parts = [((pairs >> np.uint32(shift)) & np.uint32(0xFFFF)).astype(np.uint16) for shift in (0, 16)]
    return [bf16_to_f32(p) if one == "bf16" else p.view(np.float16) for p in parts]


def halves(c, operand: str, type_: str):
    read, one = c.source(operand, "b32"), _HALVES[type_]
    return lambda t: _split(read(t), one)


def _negative_zero_first(compare):
    """min and max take -0 for less than +0."""

    def choose(a, b):
        out = compare(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            minus = np.signbit(a) & np.signbit(b) if compare in (np.fmax, np.maximum) else np.signbit(a) | np.signbit(b)
            out = np.where(zeros, np.where(minus, out.dtype.type(-0.0), out.dtype.type(0.0)), out)
        return out

    return choose


def _function(word: str, parts: list[str], type_: str):
    approximate = "approx" in parts or "full" in parts
    exact = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
        "sqrt": np.sqrt, "rcp": lambda a: 1 / a, "rsqrt": lambda a: 1 / np.sqrt(a), "ex2": np.exp2, "lg2": np.log2,
        "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "copysign": lambda a, b: np.copysign(b, a),
        "min": _negative_zero_first(np.minimum if "NaN" in parts else np.fmin),
        "max": _negative_zero_first(np.maximum if "NaN" in parts else np.fmax),
    }  # fmt: skip
    if word in ("fma", "mad"):
        if type_ == "f64":
            return fma
        return fma_odd
    function = exact[word]
    if approximate or word in ("ex2", "lg2", "sin", "cos", "tanh", "rsqrt"):
        if type_ not in ("f32", "f64"):
            return function
        return lambda *a: roughly(function(*a))
    return function


@operation(
    "add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs", "sqrt", "rcp", "rsqrt", "ex2", "lg2",
    "sin", "cos", "tanh", "copysign",
)  # fmt: skip
def _arithmetic(c, i):
    parts = i.parts
    word, type_ = parts[0], parts[-1]
    if not is_float(type_):
        return integer_arithmetic(c, i)
    mode = next((p for p in parts if p in ("rz", "rm", "rp")), "rn")
    if mode != "rn" and not (word == "fma" and type_ == "f32" and "ftz" not in parts):
        raise PtxError("rounding mode")
    if any(p in ("sat", "relu", "oob", "xorsign") for p in parts):
        raise PtxError("modifier")
    if word == "rem":
        raise PtxError("rem of floats")
    function, count = _function(word, parts, type_), len(i.operands) - 1
    if "ftz" in parts and type_ == "f32":
        inner = function
        function = lambda *a: flush(narrow(inner(*map(flush, a)), "f32"))  # noqa: E731
    if type_ in _HALVES:
        packed = _by_halves(function, type_)
        return elementwise(c, i, packed, [type_] * count, type_)
    if type_ in ("f32", "f64") and word not in ("fma", "mad"):
        return elementwise(c, i, function, [type_] * count, type_)
    sources = [reader(c, o, type_) for o in i.operands[1:]]
    write = c.target(i.operands[0], type_)
    return lambda t, mask: write(t, narrow(function(*[s(t) for s in sources]), type_, mode), mask)


@operation("testp")
def _test(c, i):
    test = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda a: ~np.isnan(a)}[
        i.parts[1]
    ]
    return elementwise(c, i, test, [i.parts[-1]], "pred")


# --------------------------------------------------------------------------------------------------------- conversions

_TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(x: np.ndarray, dtype, mode: str) -> np.ndarray:
    """Rounded, then clamped to the range; NaN becomes 0."""
    x = _TO_INTEGER[mode](x.astype(np.float64))
    info = np.iinfo(dtype)
    low, high = x <= float(info.min), x >= float(info.max)
    safe = np.where(low | high | np.isnan(x), 0.0, x)
    inside = safe.astype(np.uint64).astype(dtype) if dtype == np.uint64 else safe.astype(np.int64).astype(dtype)
    return np.where(low, dtype.type(info.min), np.where(high, dtype.type(info.max), inside))


def _is_type(part: str) -> bool:
    try:
        kind(part)
        return part != "pred"
    except PtxError:
        return False


@operation("cvt")
def _convert(c, i):
    parts = i.parts
    types = [p for p in parts[1:] if _is_type(p)]
    if len(types) < 2 or any("x4" in p for p in parts):
        raise PtxError("conversion")
    target, origin = types[:2]
    mode = next((_ROUNDING[p] for p in parts if p in _ROUNDING), "rn")
    relu, saturate = "relu" in parts, "sat" in parts
    if mode not in ("rn", "rz") and (target[:4] == "bf16" or (mode == "rna") != (target == "tf32")):
        raise PtxError("rounding of this conversion")
    if target in _HALVES:
        if len(i.operands) != 3 or relu:
            raise PtxError("conversion")
        high, low = (reader(c, o, origin) for o in i.operands[1:])
        write, one = c.target(i.operands[0], target), _HALVES[target]

        def pair(t, mask):
            h, l = (bits(narrow(x(t), one, mode)).astype(np.uint32) for x in (high, low))  # noqa: E741
            write(t, (h << np.uint32(16)) | l, mask)

        return pair
    read, write = reader(c, i.operands[1], origin), c.target(i.operands[0], target)
    if target == "tf32":
        half = np.uint32(0x1000)

        def to_tf32(t, mask):
            u = bits(read(t))
            up = half if mode == "rna" else np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1))
            finite = (u & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
            write(t, np.where(finite, u + up, u) & np.uint32(0xFFFFE000), mask)

        return to_tf32
    dtype = kind(target)[1]
    to_whole = next((p for p in parts if p in _TO_INTEGER), None)

    def convert(x):
        if is_float(origin) and not is_float(target):
            return _to_integer(x, dtype, to_whole or "rzi")
        if is_float(target):
            if to_whole:
                x = _TO_INTEGER[to_whole](x)
            if not is_float(origin):
                if mode != "rn":
                    raise PtxError("rounding of this conversion")
                # float32 and float64 in one step; shorter ones through float64, exact for up to 53 bits
                x = x.astype(dtype if target in ("f32", "f64") else np.float64)
            if "ftz" in parts:
                x = flush(x) if x.dtype == np.float32 else x
            x = narrow(np.maximum(x, x.dtype.type(0)) if relu else x, target, mode)
            return np.clip(x, 0, 1) if saturate else x
        if saturate:
            info = np.iinfo(dtype)
            x = np.clip(x.astype(object), info.min, info.max)
        return x.astype(dtype)

    return lambda t, mask: write(t, convert(read(t)), mask)
