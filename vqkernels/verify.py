"""Every operator x backend x dtype that can run here, against the float64 reference. The tests and ``vqkernels
verify`` share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .dispatch import _OVERLOAD
from .registry import AVAILABLE, BACKENDS, SPECS, OpSpec


@dataclass(frozen=True)
class Record:
    """One comparison. ``error`` is the largest error of the "close" outputs in units of the dtype's eps."""

    op: str
    backend: str
    dtype: str
    case: str
    passed: bool
    error: float
    detail: str

    def as_dict(self) -> dict:
        return asdict(self)


def _map(args, change: Callable[[Tensor], Tensor]):
    return tuple(
        [change(x) for x in a]
        if isinstance(a, list) and a and isinstance(a[0], Tensor)
        else change(a)
        if isinstance(a, Tensor)
        else a
        for a in args
    )


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _tuple(out) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else tuple(out) if isinstance(out, list) else (out,)


def _first_difference(got: Tensor, want: Tensor) -> str | None:
    """None when bit equal (any NaN equals any NaN), else where the first difference is."""
    same = (got == want) | ((got != got) & (want != want))
    if bool(same.all()):
        return None
    where = (~same).nonzero()[0].tolist()
    count, first = int((~same).sum()), tuple(where)
    return f"{count} of {same.numel()} differ, first at {where}: got {got[first].item()}, want {want[first].item()}"


def _error(got: Tensor, want: Tensor) -> float:
    """Largest |got - want| in units of eps times the row norm (scalars and vectors: times the value itself)."""
    info = torch.finfo(got.dtype)
    got, want = got.double(), want.double()
    if not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    finite = want.isfinite()
    got, want = torch.where(finite, got, 0.0), torch.where(finite, want, 0.0)
    scale = want.norm(dim=-1, keepdim=True) if want.dim() > 1 else want.abs()
    error = (got - want).abs() / (info.eps * (scale + info.tiny))
    return float(error.max()) if error.numel() else 0.0


def compare(spec: OpSpec, backend: str, args: tuple) -> tuple[str, float]:
    """Runs one case. Returns what is wrong (empty when nothing is) and the error of its "close" outputs."""
    device = torch.device("cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu")
    return judge(spec, getattr(spec.op, _OVERLOAD[backend])(*_map(args, lambda t: t.to(device))), args)


def judge(spec: OpSpec, out, args: tuple) -> tuple[str, float]:
    """What is wrong with ``out``, computed from ``args`` on any device (empty when nothing is), and the error of its
    "close" outputs."""
    got = tuple(g.cpu() for g in _tuple(out))
    want = _tuple(spec.reference(*args))
    want64 = _tuple(spec.reference(*_map(args, _double))) if "close" in spec.outputs else want
    worst = 0.0
    for i, (kind, g, w, w64) in enumerate(zip(spec.outputs, got, want, want64, strict=True)):
        if g.shape != w.shape or g.dtype != w.dtype:
            return f"output {i} is {g.dtype} {tuple(g.shape)}, want {w.dtype} {tuple(w.shape)}", float("inf")
        if kind == "exact":
            if (difference := _first_difference(g, w)) is not None:
                return f"output {i}: {difference}", float("inf")
        else:
            worst = max(worst, _error(g, w64))
            if not worst <= spec.tolerance:
                return f"output {i} is off by {worst:.3g} eps of its row norm; allowed {spec.tolerance:g}", worst
    return "", worst


def cases(spec: OpSpec, dtype: torch.dtype) -> list[tuple[str, tuple]]:
    return spec.samples(dtype) + spec.edges(dtype)


def run(backends: tuple[str, ...] = BACKENDS, ops: tuple[str, ...] | None = None) -> Iterator[Record]:
    """Yields one record per op x backend x dtype x case for every backend that can run here, the reference included."""
    for name in ops or SPECS:
        spec = SPECS[name]
        for backend in backends:
            if AVAILABLE[name][backend] is not True:
                continue
            for dtype in spec.dtypes:
                for case, args in cases(spec, dtype):
                    try:
                        detail, error = compare(spec, backend, args)
                    except Exception as exception:
                        detail, error = f"{type(exception).__name__}: {exception}", float("inf")
                    yield Record(name, backend, str(dtype).removeprefix("torch."), case, not detail, error, detail)


def not_run(ops: tuple[str, ...] | None = None) -> dict[str, list[str]]:
    """{reason: ["op backend", ...]} of everything that ``run`` leaves out on this machine."""
    out: dict[str, list[str]] = {}
    for name in ops or SPECS:
        for backend, available in AVAILABLE[name].items():
            if available is not True:
                out.setdefault(available.replace(f" for {name} ", " for it "), []).append(f"{name} {backend}")
    return out
