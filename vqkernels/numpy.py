"""The search kernels on NumPy arrays, for serving and offline encoding: imports no PyTorch.

The same names, rules and results as in :mod:`vqkernels`, bit for bit; float32, float64 and float16. Dimensions, always
in this order: H heads, N vectors, K codewords, D features, Q levels. ``threads`` defaults to ``VQK_NUM_THREADS``, else
to the cores this process may use; results do not depend on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = [
    "CodebookUsage",
    "ResidualQuantized",
    "build_info",
    "codebook_usage",
    "codeword_sums",
    "nearest_codeword",
    "residual_quantize",
    "simd_level",
]

_METRICS = {"l2": 0, "cosine": 1, "dot": 2}
_PRECISIONS = {"exact": True, "fast": False}
_DTYPES = ("float32", "float64", "float16")


def build_info() -> dict:
    """What was built and why not the rest (compiler, flags, CUDA), and what this CPU runs; {} when never built."""
    path = Path(__file__).with_name("_build_info.json")
    info = json.loads(path.read_text()) if path.is_file() else {}
    if _native is not None:
        info |= {"simd_detected": _native.simd_detected(), "simd_level": _native.simd_level()}
    return info


def _import_native():
    try:
        from . import _native
    except ImportError as error:
        reason = build_info().get("cpu_reason") or str(error)
        raise ImportError(
            f"vqkernels.numpy needs the compiled kernels, which were not built or do not load: {reason}. "
            "Mend that and install again: pip install --no-build-isolation -e . "
            "The functions of vqkernels itself run without them, on PyTorch."
        ) from error
    return _native


_native = None
_native = _import_native()


class ResidualQuantized(NamedTuple):
    """``quantized`` [..., D]; ``indices`` int64 [..., Q]; ``losses`` [Q], the mean over valid rows and features of
    (r_{l-1} - c_l)^2."""

    quantized: np.ndarray
    indices: np.ndarray
    losses: np.ndarray


class CodebookUsage(NamedTuple):
    """``counts`` int64 [K]; ``used`` fraction of codewords with a count; ``entropy`` in nats; ``perplexity`` =
    exp(entropy); ``dead`` bool [K]."""

    counts: np.ndarray
    used: float
    entropy: float
    perplexity: float
    dead: np.ndarray


def simd_level(name: str = "") -> str:
    """The SIMD level in use: "portable", "avx2", "avxvnni", "avx512", "vnni" or "amx". With a name (or "auto") sets it
    first, for this module."""
    return _native.simd_level(name)


def _choice(op: str, argument: str, value, allowed: dict):
    if value not in allowed:
        raise ValueError(f"{op}: {argument}={value!r} is unknown; allowed: {', '.join(map(repr, allowed))}")
    return allowed[value]


def _threads(op: str, threads: int | None) -> int:
    name = "threads"
    if threads is None:
        if "VQK_NUM_THREADS" not in os.environ:
            return len(os.sched_getaffinity(0))
        name, threads = "VQK_NUM_THREADS", os.environ["VQK_NUM_THREADS"]
    if isinstance(threads, bool) or not str(threads).isdecimal() or int(threads) < 1:
        raise ValueError(f"{op}: {name}={threads!r}; a positive integer is expected")
    return int(threads)


def _floating(op: str, argument: str, value) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.name not in _DTYPES:
        raise TypeError(f"{op}: {argument} has dtype {array.dtype}; allowed: {', '.join(_DTYPES)}; use .astype()")
    return array


def _positive(op: str, argument: str, value) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{op}: {argument}={value!r}; a positive integer is expected")
    return int(value)


def _codebook(op: str, z: np.ndarray, codebook, name: str) -> np.ndarray:
    """z [..., D] with codebook [K,D], or z [H, ..., D] with codebook [H,K,D]. Returns the codebook as [H,K,D]."""
    codebook = _floating(op, name, codebook)
    shapes = f"{op}: z is {z.shape} and {name} is {codebook.shape}"
    if z.dtype != codebook.dtype:
        raise TypeError(f"{op}: z is {z.dtype} and {name} is {codebook.dtype}; convert one with .astype()")
    if z.ndim < 1 or codebook.ndim not in (2, 3):
        raise ValueError(f"{shapes}; expected z [..., D] with {name} [K, D], or z [H, ..., D] with {name} [H, K, D]")
    if z.shape[-1] != codebook.shape[-1]:
        raise ValueError(f"{shapes}: the last dimensions (features) differ, {z.shape[-1]} against {codebook.shape[-1]}")
    if codebook.shape[-2] == 0 or codebook.shape[-1] == 0:
        raise ValueError(f"{op}: {name} is {codebook.shape}; it needs at least one codeword and one feature")
    if codebook.ndim == 3 and (z.ndim < 2 or z.shape[0] != codebook.shape[0]):
        raise ValueError(f"{shapes}: {codebook.shape[0]} heads, so z must be [{codebook.shape[0]}, ..., D]")
    return np.ascontiguousarray(codebook if codebook.ndim == 3 else codebook[None])


def _rows(z: np.ndarray, heads: int) -> np.ndarray:
    size = z.size // (heads * z.shape[-1]) if heads else 0
    return np.ascontiguousarray(z).reshape(heads, size, z.shape[-1])


def _mask(op: str, mask, z: np.ndarray, heads: int) -> np.ndarray | None:
    if mask is None:
        return None
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != z.shape[:-1]:
        raise ValueError(
            f"{op}: mask is {mask.dtype} {mask.shape}; expected bool {z.shape[:-1]} "
            "(z without its last dimension; True takes part)"
        )
    return np.ascontiguousarray(mask).reshape(heads, mask.size // heads)


def nearest_codeword(
    z: np.ndarray,
    codebook: np.ndarray,
    metric: str = "l2",
    precision: str = "exact",
    mask: np.ndarray | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest codeword of every vector; see :func:`vqkernels.nearest_codeword`.

    Args:
        z: ``[..., D]``.
        codebook: ``[K, D]``, or ``[H, K, D]`` with z ``[H, ..., D]``.
        metric: ``"l2"``, ``"cosine"`` or ``"dot"``.
        precision: ``"exact"`` (certified) or ``"fast"``.
        mask: bool ``[...]``; False rows are skipped.
        threads: at most this many.

    Returns:
        ``indices`` int64 ``[...]``, ``distances`` ``[...]``: squared distance, 1 - similarity or -dot. Rows with a
        non-finite value get -1 and NaN, masked rows -1 and 0.

    Raises:
        TypeError: a dtype; ValueError: a shape, name or number.
    """
    op = "nearest_codeword"
    z = _floating(op, "z", z)
    book = _codebook(op, z, codebook, "codebook")
    indices, distances = _native.nearest_codeword(
        _rows(z, len(book)),
        book,
        _mask(op, mask, z, len(book)),
        _choice(op, "metric", metric, _METRICS),
        _choice(op, "precision", precision, _PRECISIONS),
        _threads(op, threads),
    )
    return indices.reshape(z.shape[:-1]), distances.reshape(z.shape[:-1])


def residual_quantize(
    z: np.ndarray,
    codebooks: np.ndarray | Sequence[np.ndarray],
    metric: str = "l2",
    mask: np.ndarray | None = None,
    threads: int | None = None,
) -> ResidualQuantized:
    """Quantizes z, then what is left of it, level after level; see :func:`vqkernels.residual_quantize`.

    Args:
        z: ``[..., D]``.
        codebooks: ``[Q, K, D]``, or a sequence of Q arrays ``[K_l, D]`` (or ``[H, K_l, D]`` with z ``[H, ..., D]``).
        metric, mask, threads: as in :func:`nearest_codeword`.

    Raises:
        TypeError: a dtype; ValueError: a shape, name or number.
    """
    op = "residual_quantize"
    z = _floating(op, "z", z)
    if isinstance(codebooks, np.ndarray) and codebooks.ndim != 3:
        raise ValueError(f"{op}: codebooks is {codebooks.shape}; expected [Q, K, D] or a list of [K, D]")
    books = [_codebook(op, z, c, f"codebooks[{level}]") for level, c in enumerate(codebooks)]
    if not books:
        raise ValueError(f"{op}: codebooks is empty; at least one level is needed")
    heads = len(books[0])
    if any(np.ndim(c) != np.ndim(codebooks[0]) for c in codebooks):
        raise ValueError(f"{op}: codebooks mix [K, D] and [H, K, D]: {[np.shape(c) for c in codebooks]}")
    metric_id = _choice(op, "metric", metric, _METRICS)
    indices, quantized, losses = _native.residual_quantize(
        _rows(z, heads), books, _mask(op, mask, z, heads), metric_id, _threads(op, threads)
    )
    return ResidualQuantized(quantized.reshape(z.shape), indices.reshape(*z.shape[:-1], len(books)), losses)


def _indices(op: str, indices) -> np.ndarray:
    array = np.asarray(indices)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{op}: indices has dtype {array.dtype}; integer indices are expected")
    return np.ascontiguousarray(array, dtype=np.int64)


def codebook_usage(indices: np.ndarray, codebook_size: int, threads: int | None = None) -> CodebookUsage:
    """How often each codeword is used; negative indices are skipped.

    Raises:
        TypeError: indices that are no integers; ValueError: an index >= codebook_size.
    """
    op = "codebook_usage"
    flat = _indices(op, indices).reshape(1, -1)
    counts = _native.codebook_usage(flat, _positive(op, "codebook_size", codebook_size), _threads(op, threads))[0]
    share = counts[counts > 0] / max(1, counts.sum())
    entropy = float(-(share * np.log(share)).sum())
    dead = counts == 0
    return CodebookUsage(counts, float(1 - dead.mean()), entropy, float(np.exp(entropy)) if share.size else 0.0, dead)


def codeword_sums(
    z: np.ndarray, indices: np.ndarray, codebook_size: int, threads: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the vectors assigned to each codeword, added in float64 in row order, and the counts.

    Args:
        z: ``[N, D]``, or ``[H, N, D]`` for separate heads.
        indices: integers ``[N]`` or ``[H, N]``; negative ones are skipped.

    Returns:
        ``sums`` ``[K, D]`` (``[H, K, D]``), float32 (float64 for float64 input); ``counts`` int64 ``[K]`` (``[H, K]``).

    Raises:
        TypeError: a dtype; ValueError: shapes that do not fit, an index >= codebook_size.
    """
    op = "codeword_sums"
    z, flat = _floating(op, "z", z), _indices(op, indices)
    size, threads = _positive(op, "codebook_size", codebook_size), _threads(op, threads)
    if z.ndim not in (2, 3) or flat.shape != z.shape[:-1] or z.shape[-1] == 0:
        raise ValueError(
            f"{op}: z is {z.shape} and indices {flat.shape}; expected [N, D] with [N], or [H, N, D] with [H, N]"
        )
    heads = np.ascontiguousarray(z if z.ndim == 3 else z[None])
    sums, counts = _native.codeword_sums(heads, flat.reshape(heads.shape[:2]), size, threads)
    return (sums, counts) if z.ndim == 3 else (sums[0], counts[0])
