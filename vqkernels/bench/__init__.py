"""Timing of operators and layers against every alternative that is installed, correctness first.

A row is an operator or a layer at a shape; its contenders are ours and the alternatives, each at its best setting. A
contender is timed only after its answer passed the row's gate. Speed is also given as a share of the machine's measured
limit: the fp32 multiply-add peak (a register-only loop at the SIMD level in use) for searches, copy bandwidth for
memory-bound operators.
"""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from ..info import machine


@dataclass
class Result:
    """One contender at one row. Times in milliseconds, memory in MB beyond the inputs, ``limit`` the fraction of the
    roof."""

    op: str
    shape: str
    backend: str
    dtype: str
    median_ms: float = float("nan")
    p20_ms: float = float("nan")
    p80_ms: float = float("nan")
    gflops: float = float("nan")
    gbps: float = float("nan")
    limit: float = float("nan")
    extra_mb: float = float("nan")
    error: str = ""

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass
class Row:
    """``contenders``: {name: factory}; a factory prepares and returns the callable to time, or raises ImportError.
    ``gate(output)`` returns what is wrong with an answer, or "". Flops and bytes are the minimum of the row."""

    op: str
    shape: str
    contenders: dict[str, Callable[[], Callable]]
    gate: Callable[[object], str]
    flops: float = 0.0
    bytes: float = 0.0
    roof: str = "fma"  # the limit that the row is held against: "fma", "copy" or "" (none)


def copy_bandwidth() -> tuple[float, float]:
    """GB/s of a large tensor's copy and of its clone, which brings the system's new memory into use as an operator's
    result does, counting the bytes read and written; best of several."""
    source = torch.empty(64 << 20).normal_()
    target = torch.empty_like(source)
    best = []
    for call in (lambda: target.copy_(source), source.clone):
        times = time_call(call, 0.0) + time_call(call, 0.0)
        best.append(2 * source.numel() * 4 / min(times) * 1e-6)
    return best[0], best[1]


def _status_kb(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_extra_mb(call: Callable) -> float:
    """Peak resident memory during a call beyond what was resident before (Linux; NaN elsewhere)."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = _status_kb("VmRSS")
    keep = call()
    peak = _status_kb("VmHWM")
    del keep
    return max(0, peak - before) / 1024


def time_call(call: Callable, seconds: float) -> list[float]:
    """Milliseconds of repeated calls, for about ``seconds``, after one warm-up; at least 3."""
    call()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < deadline and len(times) < 1000):
        start = time.perf_counter()
        keep = call()
        times.append((time.perf_counter() - start) * 1e3)
        del keep
    return sorted(times)


def conditions() -> dict:
    """Machine, limits, versions and commit: what makes the numbers mean something."""
    from ..registry import AVAILABLE

    built = AVAILABLE["nearest_codeword"]["cpu"] is True
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    copy, clone = copy_bandwidth()
    versions = {}
    for package in ("faiss-cpu", "vector-quantize-pytorch", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        **machine(),
        "peak_gflops": round(torch.ops.vqkernels.fma_peak_gflops(), 1) if built else float("nan"),
        "copy_gbps": round(copy, 1),
        "clone_gbps": round(clone, 1),
        "commit": commit.stdout.strip() or "unknown",
        **versions,
    }


def measure(row: Row, limits: dict, seconds: float) -> Iterator[Result]:
    """Gate, then memory, then time, for each contender of a row."""
    for name, factory in row.contenders.items():
        result = Result(row.op, row.shape, name, "float32")
        try:
            call = factory()
            result.error = row.gate(call())
            if not result.error:
                result.extra_mb = peak_extra_mb(call)
                times = time_call(call, seconds)
                result.median_ms = statistics.median(times)
                result.p20_ms, result.p80_ms = times[len(times) // 5], times[len(times) * 4 // 5]
                result.gflops = row.flops / result.median_ms * 1e-6
                result.gbps = row.bytes / result.median_ms * 1e-6
                if row.roof == "fma":
                    result.limit = result.gflops / limits["peak_gflops"]
                elif row.roof == "copy":
                    result.limit = result.gbps / limits["copy_gbps"]
        except ImportError as error:
            result.error = f"not installed ({error.name})"
        except (RuntimeError, MemoryError) as error:
            result.error = f"{type(error).__name__}: {error}"[:200]
        yield result


def rows() -> dict[str, Callable[[], Iterator[Row]]]:
    """What there is to measure, by name: the operators, the trie, the layers."""
    from . import layers, ops, trie

    return {**ops.ROWS, "trie_topk": trie.step_rows, "trie": trie.trie_rows, "layers": layers.rows}
