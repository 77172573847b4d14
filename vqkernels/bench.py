"""Timing of the operators against every alternative that is installed, correctness first.

A row is an operator at a shape; its contenders are ours and the alternatives, each at its best setting. A contender is
timed only after its answer passed the row's gate. Speed is also given as a share of the machine's measured limit: the
fp32 multiply-add
peak (a register-only loop at the SIMD level in use) for searches, copy bandwidth for memory-bound operators.
"""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from .info import machine

NEAREST = (
    (65536, 256, 32),
    (65536, 1024, 64),
    (32768, 8192, 64),
    (16384, 8192, 256),
    (65536, 16384, 8),
    (8192, 1024, 768),
)
RESIDUAL = ((65536, 4, 256, 32),)
ROTATION = ((262144, 256),)
USAGE = ((4_194_304, 8192),)
SUMS = ((262144, 1024, 64),)


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
    compute_bound: bool = field(default=True)


def copy_bandwidth() -> float:
    """GB/s of a large tensor copy, counting the bytes read and written; best of several."""
    source = torch.empty(64 << 20).normal_()
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best * 1e-9


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


def _regret_gate(z: Tensor, codebook: Tensor, take: Callable) -> Callable:
    """float32 alternatives may differ on near ties: the chosen codeword may be worse than the best by float32
    rounding, no more."""
    from .ops import nearest_codeword

    best = nearest_codeword(z, codebook)[1].double()

    def gate(output) -> str:
        indices = take(output).reshape(-1).long()
        chosen = (z.double() - codebook[indices].double()).square().sum(-1)
        slack = 4 * (z.shape[1] + 4) * 2.0**-24 * (z.norm(dim=-1) + codebook.norm(dim=-1).max()).double().square()
        bad = int((chosen - best > slack + 1e-6).sum())
        return f"{bad} of {len(best)} rows are not nearest" if bad else ""

    return gate


def _first(output):
    return torch.as_tensor(output[0] if isinstance(output, tuple) else output)


def _chunked_addmm(z: Tensor, c: Tensor, chunk: int) -> Tensor:
    squares = c.square().sum(-1)
    return torch.cat([torch.addmm(squares, rows, c.T, alpha=-2).argmin(1) for rows in z.split(chunk)])


def _best_chunk(z: Tensor, c: Tensor) -> Callable:
    chunks = [n for n in (256, 1024, 4096, 16384) if n <= z.shape[0]]
    best = min(chunks, key=lambda n: time_call(lambda: _chunked_addmm(z, c, n), 0.0)[0])
    return lambda: _chunked_addmm(z, c, best)


def _faiss_flat(z: Tensor, c: Tensor) -> Callable:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(z.shape[1])
    index.add(c.numpy())
    rows = z.numpy()
    return lambda: index.search(rows, 1)[1]


def _incumbent(c: Tensor) -> Callable:
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(dim=c.shape[1], codebook_size=c.shape[0]).eval()
    layer._codebook.embed.data.copy_(c[None])
    return layer


def nearest_rows(shapes=NEAREST) -> Iterator[Row]:
    from .ops import nearest_codeword

    for N, K, D in shapes:
        z, c = torch.randn(N, D), torch.randn(K, D)

        def layer(z=z, c=c):
            vq = _incumbent(c)
            return torch.no_grad()(lambda: vq(z[None])[1])

        yield Row(
            "nearest_codeword",
            f"{N}x{K}x{D}",
            {
                "vqkernels": lambda z=z, c=c: lambda: nearest_codeword(z, c)[0],
                "torch addmm+argmin, chunked": lambda z=z, c=c: _best_chunk(z, c),
                "torch cdist+argmin": lambda z=z, c=c: lambda: torch.cdist(z, c).argmin(1),
                "faiss IndexFlatL2": lambda z=z, c=c: _faiss_flat(z, c),
                "vector-quantize-pytorch": layer,
            },
            _regret_gate(z, c, _first),
            flops=2.0 * N * K * D,
            bytes=4.0 * (N + K) * D + 12 * N,
        )


def residual_rows(shapes=RESIDUAL) -> Iterator[Row]:
    from .ops import residual_quantize

    for N, Q, K, D in shapes:
        z = torch.randn(N, D)
        books = [torch.randn(K, D) * 0.7**q for q in range(Q)]

        def loop(z=z, books=books):
            residual, out = z, []
            for c in books:
                out.append(_chunked_addmm(residual, c, 4096))
                residual = residual - c[out[-1]]
            return torch.stack(out, -1)

        def layer(z=z, books=books, Q=Q, K=K, D=D):
            from vector_quantize_pytorch import ResidualVQ

            rvq = ResidualVQ(dim=D, num_quantizers=Q, codebook_size=K).eval()
            for level, c in zip(rvq.layers, books, strict=True):
                level._codebook.embed.data.copy_(c[None])
            return torch.no_grad()(lambda: rvq(z[None])[1])

        def faiss_rq(z=z, books=books, Q=Q, K=K, D=D):
            import faiss

            faiss.omp_set_num_threads(torch.get_num_threads())
            rq = faiss.ResidualQuantizer(D, Q, K.bit_length() - 1)
            rq.max_beam_size = 1
            rq.is_trained = True
            faiss.copy_array_to_vector(torch.cat(books).numpy().ravel(), rq.codebooks)
            rows = z.numpy()
            return lambda: rq.compute_codes(rows)[:, :Q]

        exact = residual_quantize(z, books).quantized
        norm = (z - exact).square().sum(-1).mean()

        def gate(output, z=z, books=books, norm=norm, N=N, Q=Q):
            indices = torch.as_tensor(output[1] if isinstance(output, tuple) else output).reshape(N, Q).long()
            decoded = sum(c[indices[:, q]] for q, c in enumerate(books))
            error = (z - decoded).square().sum(-1).mean()
            return (
                ""
                if abs(error / norm - 1) < 1e-3
                else f"mean squared error {error:.6g}, greedy search gives {norm:.6g}"
            )

        yield Row(
            "residual_quantize",
            f"{N}x{Q}x{K}x{D}",
            {
                "vqkernels": lambda z=z, books=books: lambda: residual_quantize(z, books).indices,
                "torch addmm+argmin loop": lambda loop=loop: loop,
                "faiss ResidualQuantizer, beam 1": faiss_rq,
                "vector-quantize-pytorch": layer,
            },
            gate,
            flops=2.0 * N * Q * K * D,
            bytes=8.0 * N * D + 4 * Q * K * D + 8 * N * Q,
        )


def rotation_rows(shapes=ROTATION) -> Iterator[Row]:
    from .dispatch import pick
    from .registry import ESTIMATORS

    def eager(z, q, g):
        nz, nq = z.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
        zh, qh = z / nz, q / nq
        r = torch.nn.functional.normalize(zh + qh, dim=-1)
        return (nq / nz) * (g - 2 * r * (r * g).sum(-1, keepdim=True) + 2 * zh * (qh * g).sum(-1, keepdim=True))

    def incumbent(z, q, g):
        from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

        leaf = z.clone().requires_grad_()
        out = rotate_to(leaf[None], q[None])
        return lambda: torch.autograd.grad(out, leaf, g[None], retain_graph=True)[0]

    op = pick("rotation_trick_backward", torch.device("cpu"))
    for N, D in shapes:
        z, q, g = (torch.randn(N, D) for _ in range(3))
        want = eager(z[:4096].double(), q[:4096].double(), g[:4096].double())

        def gate(output, want=want):
            error = ((output[:4096].double() - want).norm() / want.norm()).item()
            return "" if error < 1e-4 else f"relative error {error:.3g} against float64"

        yield Row(
            "rotation_trick backward",
            f"{N}x{D}",
            {
                "vqkernels": lambda z=z, q=q, g=g: lambda: op(z, q, g, ESTIMATORS["rotation"]),
                "torch eager formula": lambda z=z, q=q, g=g: lambda: eager(z, q, g),
                "torch.compile of it": lambda z=z, q=q, g=g: (lambda f: lambda: f(z, q, g))(torch.compile(eager)),
                "vector-quantize-pytorch autograd": lambda z=z, q=q, g=g: incumbent(z, q, g),
            },
            gate,
            flops=16.0 * N * D,
            bytes=16.0 * N * D,
            compute_bound=False,
        )


def usage_rows(shapes=USAGE) -> Iterator[Row]:
    from .dispatch import pick

    op = pick("codebook_usage", torch.device("cpu"))
    for N, K in shapes:
        indices = torch.randint(0, K, (N,))
        want = torch.bincount(indices, minlength=K)
        yield Row(
            "codebook_usage",
            f"{N}x{K}",
            {
                "vqkernels": lambda i=indices, K=K: lambda: op(i[None], K)[0],
                "torch.bincount": lambda i=indices, K=K: lambda: torch.bincount(i, minlength=K),
            },
            lambda output, want=want: "" if torch.equal(output, want) else "counts differ",
            flops=N,
            bytes=8.0 * (N + K),
            compute_bound=False,
        )


def sums_rows(shapes=SUMS) -> Iterator[Row]:
    from .ops import codeword_sums

    for N, K, D in shapes:
        z, indices = torch.randn(N, D), torch.randint(0, K, (N,))
        want = torch.zeros(K, D, dtype=torch.float64).index_add_(0, indices, z.double())

        def one_hot(z=z, indices=indices, K=K):
            return torch.nn.functional.one_hot(indices, K).float().T @ z

        yield Row(
            "codeword_sums",
            f"{N}x{K}x{D}",
            {
                "vqkernels": lambda z=z, i=indices, K=K: lambda: codeword_sums(z, i, K)[0],
                "torch index_add_": lambda z=z, i=indices, K=K, D=D: lambda: torch.zeros(K, D).index_add_(0, i, z),
                "torch one-hot matmul": lambda f=one_hot: f,
            },
            lambda output, want=want: "" if torch.allclose(output.double(), want, atol=1e-2) else "sums differ",
            flops=N * D,
            bytes=4.0 * N * D + 8 * N + 4 * K * D,
            compute_bound=False,
        )


ROWS = {
    "nearest_codeword": nearest_rows,
    "residual_quantize": residual_rows,
    "rotation_trick": rotation_rows,
    "codebook_usage": usage_rows,
    "codeword_sums": sums_rows,
}


def conditions() -> dict:
    """Machine, limits, versions and commit: what makes the numbers mean something."""
    from .registry import AVAILABLE

    built = AVAILABLE["nearest_codeword"]["cpu"] is True
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    versions = {}
    for package in ("faiss-cpu", "vector-quantize-pytorch", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        **machine(),
        "peak_gflops": round(torch.ops.vqkernels.fma_peak_gflops(), 1) if built else float("nan"),
        "copy_gbps": round(copy_bandwidth(), 1),
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
                roof = result.gflops / limits["peak_gflops"] if row.compute_bound else result.gbps / limits["copy_gbps"]
                result.limit = roof
        except ImportError as error:
            result.error = f"not installed ({error.name})"
        except (RuntimeError, MemoryError) as error:
            result.error = f"{type(error).__name__}: {error}"[:200]
        yield result
