"""vqkernels tune: which tiles, and which backend, are fastest on this very card."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from .. import __version__
from ..dispatch import _OVERLOAD
from ..registry import AVAILABLE, SPECS
from ..triton_kernels import launcher, tuning
from ..triton_kernels.workloads import workloads
from ..verify import _error, _first_difference, _tuple

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)  # float64 runs with the shipped tiles
ROUNDS = 2  # over all numbers of a config
SLOW = 20.0  # a backend that many times slower than the best is not timed further


def tune(
    op: Annotated[list[str] | None, typer.Option(help="Only these operators (repeatable).")] = None,
) -> None:
    """Measures the Triton kernels' tiles, warps and stages, and then the backends against each other, on this GPU.

    The result goes to vqkernels/tuning.json in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache), or to the
    file that VQK_TUNING names, and serves every later process. Ctrl-C keeps what has been measured.
    """
    tunable = [name for name, spec in SPECS.items() if "triton" in spec.compiled]
    unknown = set(op or ()) - set(tunable)
    if unknown:
        raise ValueError(f"unknown operator {', '.join(sorted(unknown))}; there are: {', '.join(tunable)}")
    card = tuning.card()
    if card is None:
        raise ValueError(
            f"there is no GPU to measure on (torch {torch.__version__} finds no CUDA or ROCm device); "
            "run it on the machine whose card the kernels shall be tuned for"
        )
    from triton.testing import do_bench

    console = Console(stderr=True)
    cards = tuning.load()
    entry = cards.setdefault(card, {"configs": {}, "preference": {}, "milliseconds": {}})
    entry["versions"] = {"vqkernels": __version__, "torch": torch.__version__}
    names = op or tunable
    done = 0
    try:
        with Progress(console=console) as progress:
            bar = progress.add_task(card, total=2 * len(names))
            for name in names:
                for key, config, before, after in tune_op(
                    name, do_bench, lambda s: progress.update(bar, description=s)
                ):
                    entry["configs"].setdefault(name, {})[key] = config
                    entry["milliseconds"].setdefault(name, {})[key] = after
                    tuning.save(cards)
                    done += 1
                    progress.print(f"{name} {key}: {before:.3g} -> {after:.3g} ms  {config}", highlight=False)
                progress.advance(bar)
            for name in names:
                progress.update(bar, description=f"{name}: backends")
                if order := backend_order(name, do_bench):
                    entry["preference"][name] = order
                    tuning.save(cards)
                    progress.print(f"{name}: {', '.join(order)}", highlight=False)
                progress.advance(bar)
    except KeyboardInterrupt:
        console.print(f"Stopped. {done} configs are kept in {tuning.user_file()}; run it again for the rest.")
        raise typer.Exit(130) from None
    console.print(f"Wrote {tuning.user_file()}")


def candidates(op: str) -> dict[str, list[int]]:
    """The values that each number of a config of ``op`` may take."""
    table = json.loads((Path(tuning.__file__).parent / "configs/candidates.json").read_text())
    return table["*"] | table.get(op, {})


def tune_op(
    op: str, bench: Callable[[Callable], float], say: Callable[[str], None] = lambda text: None, device: str = "cuda"
) -> Iterator[tuple[str, dict, float, float]]:
    """(key, fastest config, milliseconds before, after) of every key that the operator's workloads ask for."""
    seen: set[str] = set()
    for dtype in (d for d in SPECS[op].dtypes if d in DTYPES):
        for label, args in workloads(op, dtype, device):
            say(f"{op} {str(dtype).removeprefix('torch.')} {label}")
            for key in keys(op, args) - seen:
                seen.add(key)
                yield key, *fastest(op, key, args, bench)


def keys(op: str, args: tuple) -> set[str]:
    """The keys that one call asks ``tuning.config`` for."""
    asked: set[str] = set()

    class Recording(dict):
        def get(self, key, default=None):
            if key != "*" or not asked:  # "*" is looked up after every other key, and by itself where an op has one key
                asked.add(key)
            return default

    with tuning.using({op: Recording()}):
        launcher(op)(*args)
    return asked


def fastest(op: str, key: str, args: tuple, bench: Callable[[Callable], float]) -> tuple[dict, float, float]:
    """(config, milliseconds before, after): one number of the config after the other takes each of its candidates and
    keeps the fastest, until nothing improves. A candidate that does not compile, does not fit or answers otherwise is
    passed over."""
    spec, allowed = SPECS[op], candidates(op)
    best = tuning.config(op, key)
    tried: dict[tuple, float] = {}
    want = None

    def time(config: dict) -> float:
        nonlocal want
        name = tuple(sorted(config.items()))
        if name not in tried:
            tried[name] = math.inf
            with tuning.using({op: {key: config}}):
                try:
                    got = _tuple(launcher(op)(*args))
                    want = want or got
                    if _same(spec, got, want):
                        tried[name] = float(bench(lambda: launcher(op)(*args)))
                except _unusable():
                    pass
        return tried[name]

    before = lowest = time(best)
    if math.isinf(before):
        raise RuntimeError(f"{op} {key}: the shipped config {best} does not run on this card; please report it")
    for _ in range(ROUNDS):
        start = lowest
        for number in best:
            for value in allowed.get(number, ()):
                trial = best | {number: value}
                if (milliseconds := time(trial)) < lowest:
                    best, lowest = trial, milliseconds
        if lowest == start:
            break
    return best, before, lowest


def _same(spec, got: tuple, want: tuple) -> bool:
    """Exact outputs are bit equal; the others may differ by the order of their sums."""
    return all(
        _first_difference(g, w) is None if kind == "exact" else _error(g, w) <= 2 * spec.tolerance
        for kind, g, w in zip(spec.outputs, got, want, strict=True)
    )


def _unusable() -> tuple[type[BaseException], ...]:
    """What a config that this card or this compiler cannot serve raises."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return CompilationError, OutOfResources, PTXASError, torch.OutOfMemoryError, ValueError


def backend_order(op: str, bench: Callable[[Callable], float], device: str = "cuda") -> list[str]:
    """The backends that serve ``op`` on this card, fastest first over its workloads; [] where there is no choice."""
    spec = SPECS[op]
    names = [name for name in ("triton", "cuda", "reference") if AVAILABLE[op][name] is True]
    total = dict.fromkeys(names, 0.0)
    if len(names) < 2:
        return []
    for dtype in (d for d in spec.dtypes if d in DTYPES):
        for _, args in workloads(op, dtype, device):
            times: dict[str, float] = {}
            for name in names:
                call = getattr(spec.op, _OVERLOAD[name])
                times[name] = _bounded(
                    lambda call=call, args=args: call(*args), bench, min(times.values(), default=None)
                )
            for name in names:
                total[name] += math.log(times[name])
    return sorted(names, key=total.__getitem__)


def _bounded(call: Callable, bench: Callable[[Callable], float], best: float | None) -> float:
    """Milliseconds of ``call``; one run is enough where it is SLOW times slower than ``best``, infinity where it does
    not fit into memory."""
    try:
        call()
        if best is not None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if (once := start.elapsed_time(end)) > SLOW * best:
                return once
        return float(bench(call))
    except torch.OutOfMemoryError:
        return math.inf
