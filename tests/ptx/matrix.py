"""Operator x dtype x target: the registry's inputs through the Triton launchers on the emulator, judged like any other
backend. ``check`` is what test_ptx_kernels.py runs in its worker processes."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from hostile_search import hostile_search

from . import emulated

TARGETS = ("sm_80", "sm_90")
LARGEST = 2048  # size of a dimension; larger cases take too long


@dataclass
class Row:
    """What became of one operator x dtype x target."""

    op: str
    dtype: str
    target: str
    cases: int = 0
    launches: int = 0
    instructions: int = 0  # executed
    worst: float = 0.0  # error of "close" outputs, in eps
    seconds: float = 0.0  # of processor time
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.op:27} {self.dtype:9} {self.target}  {self.cases:3} cases {self.launches:4} launches"
            f" {self.instructions:9} instructions  {self.worst:6.2f} eps  {self.seconds:5.1f} s"
        )


def rows() -> list[tuple[str, str, str]]:
    """Every operator that has Triton kernels x its dtypes x targets."""
    from vqkernels.registry import SPECS

    return [
        (spec.name, str(dtype).removeprefix("torch."), target)
        for spec in SPECS.values()
        if "triton" in spec.compiled
        for dtype in spec.dtypes
        for target in TARGETS
    ]


def check(op: str, dtype: str, target: str, whole: bool = False) -> Row:
    """Every case with its own seed; the first one with an even and an odd one, and with the race check. ``whole``: every
    case of the registry, whatever its size."""
    from vqkernels import triton_kernels, verify
    from vqkernels.registry import SPECS

    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # torch.empty holds NaN
    assert os.environ.get("TRITON_INTERPRET") != "1"
    spec, launcher = SPECS[op], triton_kernels.launcher(op)
    row, start = Row(op, dtype, target), time.process_time()
    cases = (everything if whole else chosen)(spec, getattr(torch, dtype), target)
    for number, (label, args) in enumerate(cases):
        for seed, racecheck in ((0, False), (1, False), (2, True)) if number == 0 else ((number, False),):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    with few_programs(seed % 2 == 1 or racecheck), emulated(target, racecheck, seed) as launches:
                        out = launcher(*args)
                    detail, error = verify.judge(spec, out, args)
                except Exception as exception:
                    detail, error = f"{type(exception).__name__}: {exception}", 0.0
            row.cases += 1
            row.launches += len(launches)
            row.instructions += sum(launch.executed for launch in launches)
            row.worst = max(row.worst, error)
            if detail:
                row.wrong.append(f"{label}, seed {seed}{', race check' if racecheck else ''}: {detail}")
    row.seconds = time.process_time() - start
    return row


@contextmanager
def few_programs(wanted: bool) -> Iterator[None]:
    """One program goes over many codewords: small inputs are otherwise divided until the loops run once."""
    from vqkernels.triton_kernels import nearest_codeword

    with mock.patch.object(nearest_codeword, "MIN_PROGRAMS", 1 if wanted else nearest_codeword.MIN_PROGRAMS):
        yield


def chosen(spec, dtype, target):
    """The hostile cases if the operator has some, and the first sample; then a share of the registry's other cases,
    another one for the next dtype and target, so that every case runs on some and no row takes long."""
    every = [case for case in spec.samples(dtype) + spec.edges(dtype) if _largest(case[1]) <= LARGEST]
    share = min(4, len(TARGETS) * len(spec.dtypes))
    offset = spec.dtypes.index(dtype) + TARGETS.index(target) * share // 2
    return [*hostile_search(dtype).get(spec.name, []), every[0], *every[1 + offset % share :: share]]


def everything(spec, dtype, target):
    return [*hostile_search(dtype).get(spec.name, []), *spec.samples(dtype), *spec.edges(dtype)]


def _largest(args) -> int:
    """The largest size of any dimension."""
    sizes = [
        _largest(a) if isinstance(a, (list, tuple)) else max(a.shape, default=0)
        for a in args
        if isinstance(a, (list, tuple, torch.Tensor))
    ]
    return max(sizes, default=0)


if __name__ == "__main__":
    import sys

    # python -m ptx.matrix [--whole] WORD ...: the rows that hold every word, one line each
    whole, words = "--whole" in sys.argv, [word for word in sys.argv[1:] if word != "--whole"]
    wrong = 0
    for op, dtype, target in rows():
        if all(word in f"{op} {dtype} {target}" for word in words):
            row = check(op, dtype, target, whole)
            wrong += len(row.wrong)
            print(row, *row.wrong, sep="\n    ", flush=True)
    sys.exit(wrong > 0)
