"""The CUDA and Triton kernels on this machine's GPU beside torch eager, torch.compile, flash-kmeans and cuVS.

Times are CUDA events around one call each, with the caches flushed before. A contender is timed only after its first
output agreed with ours; the exact comparison of our kernels with the reference is :mod:`vqkernels.verify`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..dispatch import _OVERLOAD
from ..reference.fsq import bounds
from ..reference.nearest_codeword import accumulate_dtype
from ..registry import AVAILABLE, SPECS
from ..triton_kernels.workloads import workloads
from . import Result

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
ROWS = 16384  # of the N x K scores that eager torch holds at a time


def not_run() -> str | None:
    """Why there are no speeds on this machine, or None."""
    if torch.cuda.is_available():
        return None
    return f"no CUDA device for torch {torch.__version__}; speeds of the GPU kernels are measured on a GPU only"


def _nearest(z, codebook, *_):
    z, codebook = z[0], codebook[0]
    squares = codebook.float().square().sum(-1).to(z.dtype)
    return torch.cat([torch.addmm(squares, rows, codebook.T, alpha=-2).argmin(1) for rows in z.split(ROWS)])[None]


def _residual(z, codebooks, *_):
    residual, indices = z, []
    for codebook in codebooks:
        indices.append(_nearest(residual, codebook))
        residual = residual - codebook[0][indices[-1]]
    return torch.stack(indices, -1)


def _rotation_backward(z, q, g, _):
    nz, nq = (x.norm(dim=-1, keepdim=True) for x in (z, q))
    zh, qh = z / nz, q / nq
    r = torch.nn.functional.normalize(zh + qh, dim=-1)
    return (nq / nz) * (g - 2 * r * (r * g).sum(-1, keepdim=True) + 2 * zh * (qh * g).sum(-1, keepdim=True))


def _usage(indices, K):
    return torch.stack([torch.bincount(row, minlength=K) for row in indices])


def _sums(z, indices, K):
    return z.new_zeros(K, z.shape[2], dtype=accumulate_dtype(z)).index_add_(0, indices[0], z[0].float())[None]


def _fsq(z, levels):
    half, offset, shift, width = z.new_tensor(bounds(levels)).T
    return (half * (z + shift).tanh() - offset).round() / width


def _trie(logits, scores, states, offsets, tokens, children, k):
    return SPECS["trie_topk"].reference(logits, scores, states, offsets, tokens, children, k)[0]


# what one would write with torch; the first output, on the arguments of the raw operator
EAGER: dict[str, Callable] = {
    "nearest_codeword": _nearest,
    "residual_quantize": _residual,
    "rotation_trick_backward": _rotation_backward,
    "codebook_usage": _usage,
    "codeword_sums": _sums,
    "fsq": _fsq,
    "fsq_backward": SPECS["fsq_backward"].reference,
    "trie_topk": _trie,
}


def _flash_kmeans(z, codebook, *_):
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    squares = z.float().square().sum(-1)
    return lambda: euclid_assign_triton(z, codebook, squares)


def _cuvs(z, codebook, *_):
    from cuvs.neighbors import brute_force

    index = brute_force.build(codebook[0], metric="sqeuclidean")
    return lambda: torch.as_tensor(brute_force.search(index, z[0], 1)[1], device=z.device).reshape(1, -1)


def contenders(op: str, args: tuple) -> dict[str, Callable[[], Callable]]:
    """{name: factory}: ours that can run here first; a factory returns the call to time, or raises ImportError."""
    spec = SPECS[op]
    out = {
        backend: lambda backend=backend: lambda: getattr(spec.op, _OVERLOAD[backend])(*args)
        for backend in ("cuda", "triton")
        if AVAILABLE[op][backend] is True
    }
    if op in EAGER:
        out["torch eager"] = lambda: lambda: EAGER[op](*args)
        out["torch.compile"] = lambda: (lambda compiled: lambda: compiled(*args))(torch.compile(EAGER[op]))
    if op == "nearest_codeword":
        out |= {"flash-kmeans": lambda: _flash_kmeans(*args), "cuVS": lambda: _cuvs(*args)}
    return out


def event_times(call: Callable, milliseconds: float = 300.0) -> list[float]:
    """Sorted milliseconds of single calls, measured by events on the GPU; at least 10 after 3 to warm up."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    times: list[float] = []
    while len(times) < 10 or (sum(times) < milliseconds and len(times) < 500):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)


def _disagreement(got, want) -> str:
    """Coarse, for contenders in other arithmetic: near ties may fall differently, garbage may not."""
    got, want = (x[0] if isinstance(x, (tuple, list)) else x for x in (got, want))
    if got.shape != want.shape:
        return f"answers {tuple(got.shape)} where ours is {tuple(want.shape)}"
    if not want.is_floating_point():
        share = float((got.to(want.dtype) == want).double().mean())
        return "" if share > 0.9 else f"{100 * (1 - share):.1f} % of its answers differ from ours"
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))
    return "" if error < 0.1 else f"relative difference {error:.2g} from ours"


def speed(
    op: str,
    timer: Callable[[Callable], list[float]] = event_times,
    device: str = "cuda",
    cases: Callable = workloads,
) -> Iterator[Result]:
    """One record per dtype, workload and contender; ``error`` says why one was not timed."""
    spec = SPECS[op]
    for dtype in (d for d in spec.dtypes if d in DTYPES):
        for label, args in cases(op, dtype, device):
            ours: Tensor | tuple | None = None
            for name, factory in contenders(op, args).items():
                result = Result(op, label, name, str(dtype).removeprefix("torch."))
                try:
                    call = factory()
                    answer = call()
                    ours = answer if ours is None else ours
                    result.error = _disagreement(answer, ours)
                    if not result.error:
                        times = timer(call)
                        result.median_ms = statistics.median(times)
                        result.p20_ms, result.p80_ms = times[len(times) // 5], times[len(times) * 4 // 5]
                        result.gflops = spec.flops(*args) / result.median_ms * 1e-6
                        result.gbps = spec.bytes(*args) / result.median_ms * 1e-6
                except ImportError as error:
                    result.error = f"not installed ({error.name})"
                except Exception as error:
                    result.error = f"{type(error).__name__}: {error}"[:200]
                yield result
