"""PTX types as numpy arrays, and the roundings that numpy does not have.

A register of 32 bits is an array of uint32, one element a thread; an instruction looks at it as its own type. 16-bit
brain floats, tf32 and packed pairs have no numpy type and stay unsigned integers.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import re
from functools import cache

import numpy as np

RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_FLOAT = {2: np.float16, 4: np.float32, 8: np.float64}
_NO_NUMPY_TYPE = {"bf16": 2, "bf16x2": 4, "f16x2": 4, "tf32": 4}


class PtxError(RuntimeError):
    """What a kernel did wrong: says which kernel, which instruction, and what."""


@cache
def kind(name: str) -> tuple[int, np.dtype]:
    """PTX type -> (bytes, numpy type)."""
    if name == "pred":
        return 1, np.dtype(np.bool_)
    if name in _NO_NUMPY_TYPE:
        return _NO_NUMPY_TYPE[name], np.dtype(RAW[_NO_NUMPY_TYPE[name]])
    match = re.fullmatch(r"([busf])(8|16|32|64)", name)
    if not match:
        raise PtxError(f"type .{name} is not supported")
    size = int(match[2]) // 8
    return size, np.dtype({"s": _SIGNED, "f": _FLOAT}.get(match[1], RAW)[size])


def is_float(name: str) -> bool:
    return name[0] == "f" or name.startswith("bf16")


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(RAW[x.dtype.itemsize])


# ---------------------------------------------------------------------------------------------------------- rounding


def bf16_to_f32(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Round to nearest even, or cut ("rz")."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    up = np.uint32(0) if mode == "rz" else np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint16(0x7FFF), ((u + up) >> np.uint32(16)).astype(np.uint16))


def tf32(x: np.ndarray) -> np.ndarray:
    """What a tensor core reads of 32 bits: the low 13 are dropped."""
    return (bits(x) & np.uint32(0xFFFFE000)).view(np.float32)


def _to_odd(nearest: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Nearest + error rounded to odd: where inexact, the neighbour whose last bit is 1. A second rounding to at least
    two bits less is then the correct one."""
    even = (bits(nearest) & nearest.dtype.type(1).view(RAW[nearest.dtype.itemsize]).dtype.type(1)) == 0
    move = (error != 0) & even & np.isfinite(nearest) & np.isfinite(error)
    if not move.any():
        return nearest
    return np.where(move, np.nextafter(nearest, np.where(error > 0, np.inf, -np.inf).astype(nearest.dtype)), nearest)


def _two_sum(a, b):
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


def narrow(x: np.ndarray, target: str, mode: str = "rn") -> np.ndarray:
    """A float32 or float64 array rounded once to bf16, f16, f32 (or left)."""
    if target == "bf16":
        if x.dtype == np.float64:
            f = x.astype(np.float32)
            x = _to_odd(f, x - f.astype(np.float64))
        return f32_to_bf16(x, mode)
    dtype = kind(target)[1]
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    if mode == "rn" or y.dtype.itemsize >= x.dtype.itemsize:
        return y
    wide = y.astype(x.dtype)
    towards = {"rz": (np.abs(wide) > np.abs(x), 0.0), "rm": (wide > x, -np.inf), "rp": (wide < x, np.inf)}
    wrong, to = towards[mode]
    return np.where(wrong, np.nextafter(y, dtype.type(to)), y)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, rounded once; float64 in and out."""
    with np.errstate(all="ignore"):
        p = a * b
        split = 134217729.0
        ah, bh = a * split, b * split
        ah, bh = ah - (ah - a), bh - (bh - b)
        al, bl = a - ah, b - bh
        e = ((ah * bh - p) + ah * bl + al * bh) + al * bl  # p + e = a b
        low, lower = _two_sum(c, e)
        high, middle = _two_sum(p, low)
        tail, rest = _two_sum(middle, lower)
        out = high + _to_odd(tail, rest)
        # the splitting is exact only away from the ends of the range: the C library does the others one by one
        big = np.maximum(np.maximum(np.abs(a), np.abs(b)), np.abs(c))
        odd = ~((np.abs(p) > 1e-200) & (np.abs(p) < 1e300) & (big < 1e290) & (np.abs(out) > 1e-200))
        odd &= ~((a == 0) | (b == 0)) | ~np.isfinite(big)
        out = np.where((a == 0) | (b == 0), p + c, out)
    for i in np.flatnonzero(odd):
        out[i] = _libm().fma(a[i], b[i], c[i])
    return out


@cache
def _libm():
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    library.fma.restype, library.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    return library


def fma_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of float32 or shorter values in float64, rounded to odd: narrow() then rounds it correctly."""
    with np.errstate(all="ignore"):
        p = a.astype(np.float64) * b.astype(np.float64)  # exact
        return _to_odd(*_two_sum(p, c.astype(np.float64)))


def roughly(x: np.ndarray) -> np.ndarray:
    """The result of an .approx instruction: off by one unit in the last place, up or down or not at all, as the value
    decides. A kernel that needs the correctly rounded value is found out."""
    u = bits(x)
    off = (u * u.dtype.type(0x9E3779B1)) >> u.dtype.type(8 * u.dtype.itemsize - 2)  # 0..3
    step = np.where(off == 0, 1, np.where(off == 1, -1, 0)).astype(u.dtype)
    fixed = ~np.isfinite(x) | (x == 0) | (np.abs(x) >= np.finfo(x.dtype).max) | (np.abs(x) <= np.finfo(x.dtype).tiny)
    return np.where(fixed, u, u + step).astype(u.dtype).view(x.dtype)


def flush(x: np.ndarray) -> np.ndarray:
    """.ftz: float32 subnormals become zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)
