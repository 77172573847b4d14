"""What the compiler makes of every Triton kernel on every chip, without a GPU.

    python -m vqkernels.triton_kernels.report [--out docs/triton-report.md] [--op NAME] [--target CHIP] [--dtype TYPE]

Calls the ordinary launchers at the sizes of workloads.py for all chips of offline.TARGETS and reads the machine code.
``faults`` is the gate: no spills, no stack frame, shared memory within the chip, matrix instructions in the loops of
the searches, 128-bit global accesses where rows are aligned, no device-wide fences.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from ..registry import DTYPES, SPECS
from . import launcher
from .chips import CHIPS, occupancy, roofline
from .machine_code import MachineCode, machine_code
from .offline import TARGETS, compiled_for
from .workloads import workloads

# the matrix instruction that a search must have in its loop; float64 searches have none by design
TENSOR = {
    "sm_80": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTC|HMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}
SEARCHES = ("nearest_codeword", "residual_quantize")
# operators that load less than 128 bits a lane, and why
NARROW = {
    "codebook_usage": "an index has 64 bits and the mask over N, which kernels are not specialised for, covers one",
    "trie_topk": "a block's lanes share one short row of logits",
}


@dataclass(frozen=True)
class Row:
    """One kernel of one call. ``features``: the length of its rows. ``roof``: the least microseconds of the whole
    call, and what sets them."""

    target: str
    op: str
    dtype: str
    workload: str
    features: int
    kernel: str
    grid: tuple[int, int, int]
    warps: int
    dynamic_shared: int
    code: MachineCode
    roof: tuple[float, str]

    @property
    def shared(self) -> int:
        return self.code.static_shared + self.dynamic_shared


def names() -> list[str]:
    """The operators that have a Triton kernel."""
    return [name for name, spec in SPECS.items() if "triton" in spec.compiled]


def compile_calls(target: str, op: str, dtype: torch.dtype, only: slice = slice(None)) -> list[Row]:
    """The kernels of the calls of ``op`` at its workloads (those of ``only``), compiled for ``target``."""
    spec, rows = SPECS[op], []
    for label, args in workloads(op, dtype, "meta")[only]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # triton announces a change of its own defaults
            # line information doubles the time to compile and changes no instruction
            with triton.knobs.compilation.scope(), compiled_for(target) as launches:
                triton.knobs.compilation.disable_line_info = True
                launcher(op)(*args)
        codes = [machine_code(launch.compiled) for launch in launches]
        roof = roofline(target, spec.flops(*args), spec.bytes(*args), _arithmetic(op, dtype, codes))
        for launch, code in zip(launches, codes, strict=True):
            metadata = launch.compiled.metadata
            rows.append(
                Row(
                    target,
                    op,
                    str(dtype).removeprefix("torch."),
                    label,
                    args[0].shape[-1],
                    launch.name.strip("_").removesuffix("_kernel"),
                    launch.grid,
                    metadata.num_warps,
                    metadata.shared,
                    code,
                    roof,
                )
            )
    return rows


def _arithmetic(op: str, dtype: torch.dtype, codes: list[MachineCode]) -> str:
    """The rate that the bulk of a call's work runs at: of its matrix instructions where it has any. Searches decide the
    few close rows in float64, which is not the bulk; other operators add in it."""
    if any(code.tensor for code in codes):
        return next(code.arithmetic for code in codes if code.tensor)
    few = op in SEARCHES and dtype != torch.float64
    return "fp64" if any(code.fp64 for code in codes) and not few else "fp32"


def collect(jobs: Iterable[tuple], processes: int = 2, progress=None) -> list[Row]:
    """``compile_calls(*job)`` of every job, in processes of their own; the order is that of the jobs."""
    jobs = list(jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, os.cpu_count() or 1), mp_context=context) as pool:
        futures = [pool.submit(compile_calls, *job) for job in jobs]
        for done, _ in enumerate(as_completed(futures), 1):
            if progress:
                progress(done, len(jobs))
    return [row for future in futures for row in future.result()]


def faults(rows: Iterable[Row]) -> list[str]:
    """What is wrong with the kernels: a line each; [] when nothing is."""
    rows = list(rows)
    out = [f"{_name(row)}: {fault}" for row in rows for fault in _kernel_faults(row)]
    for _, group in itertools.groupby(rows, lambda r: (r.target, r.op, r.dtype, r.workload)):
        out += _call_faults(list(group))
    return out


def _kernel_faults(row: Row) -> Iterator[str]:
    chip, code = CHIPS[row.target], row.code
    if code.spills:
        yield f"{code.spills} spills"
    if code.stack:
        yield f"a stack frame of {code.stack} bytes"
    if row.shared > chip.shared_block:
        yield f"{row.shared} bytes of shared memory, the chip has {chip.shared_block} for a block"
    if code.registers > chip.registers:
        yield f"{code.registers} registers, a thread can have {chip.registers}"
    elif not occupancy(row.target, code.registers, row.shared, row.warps).blocks:
        yield "not one block fits on a processor"
    if code.fences:
        yield f"{code.fences} device-wide fences; atomics must be relaxed"


def _call_faults(group: list[Row]) -> Iterator[str]:
    row, widest = group[0], max(r.code.load for r in group)
    if row.op not in NARROW and row.features % 16 == 0 and widest < 128:
        yield f"{_name(row)}: global loads of {widest} bits, rows of {row.features} allow 128"
    searched = row.op in SEARCHES and row.dtype != "float64" and row.features >= 16
    if searched and not any(re.match(TENSOR[row.target], r.code.tensor) for r in group):
        yield f"{_name(row)}: no {TENSOR[row.target]} in any loop"


def _name(row: Row) -> str:
    return f"{row.target} {row.op} {row.dtype} {row.workload}, {row.kernel}"


HEAD = """# Triton kernels as compiled

What the compiler of triton {triton} makes of the kernels at a few real sizes, written on a machine without a GPU by

    python -m vqkernels.triton_kernels.report {arguments}

`tests/test_triton_report.py` fails where a kernel spills, has a stack frame, asks for more shared memory than the chip
has, loses its matrix instruction or its 128-bit loads, or fences the whole device.

**Nothing here was measured.** The time is a roofline model: the operator's minimum work and bytes over the data-sheet
peaks of the card named. No launch can be faster; how much slower it is, only that card can tell.

- *registers*: of a lane; the chip allows 255 (NVIDIA), 512 (AMD). *spills, stack*: must be 0.
- *shared*: static + dynamic bytes of a block. *blocks*: how many of them fit on a processor, the share of its warps
  that they fill, and what there is no more of.
- *matrix*: the tensor-core instruction within a loop. *load, store*: the widest global access in bits.
- *at least*: the model's time for the whole call, and what sets it: memory, or the rate of the arithmetic.
"""


def markdown(rows: list[Row], arguments: str) -> str:
    """The document: a table for each chip, and the verdict."""
    parts = [HEAD.format(triton=triton.__version__, arguments=arguments)]
    rows = sorted(rows, key=lambda row: list(TARGETS).index(row.target))
    for target, group in itertools.groupby(rows, lambda row: row.target):
        chip = CHIPS[target]
        columns = "operator dtype call kernel warps registers spills,stack shared blocks matrix load,store at_least"
        parts.append(
            f"\n## {target}\n\n{chip.card}: {chip.shared_block:,} bytes of shared memory a block,"
            f" {chip.shared_processor:,} a processor, {chip.warps} warps; {chip.bandwidth:,} GB/s; {chip.half} TFLOP/s"
            f" in bfloat16 and float16, {chip.tf32} in tf32, {chip.fp32} in float32, {chip.fp64} in float64.\n\n| "
            + " | ".join(column.replace(",", ", ").replace("_", " ") for column in columns.split())
            + " |\n"
            + "|---" * len(columns.split())
            + "|\n"
        )
        parts += _table(list(group))
    wrong = faults(rows)
    parts.append("\n## Verdict\n\n" + ("No faults.\n" if not wrong else "".join(f"- {line}\n" for line in wrong)))
    return "".join(parts)


def _table(rows: list[Row]) -> Iterator[str]:
    """One line a kernel; types that compile to the same figures share it."""
    merged: dict[Row, list[str]] = {}
    for row in rows:
        merged.setdefault(replace(row, dtype="", code=replace(row.code, instructions=0)), []).append(row.dtype)
    for row, types in merged.items():
        code, fit = row.code, occupancy(row.target, row.code.registers, row.shared, row.warps)
        cells = (
            row.op,
            ", ".join(dict.fromkeys(types)),
            row.workload,
            row.kernel,
            row.warps,
            code.registers,
            f"{code.spills}, {code.stack}",
            f"{code.static_shared} + {row.dynamic_shared}",
            f"{fit.blocks} ({fit.share:.0%}, {fit.limit})",
            code.tensor or "–",
            f"{code.load or '–'}, {code.store or '–'}",
            f"{row.roof[0]:.1f} µs ({row.roof[1]})",
        )
        yield "| " + " | ".join(map(str, cells)) + " |\n"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    types = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser = argparse.ArgumentParser(
        prog="python -m vqkernels.triton_kernels.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="write the tables there; without it, to standard output")
    parser.add_argument("--op", action="append", choices=names(), help="only this operator (repeatable)")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this chip (repeatable)")
    parser.add_argument(
        "--dtype", action="append", choices=types, help="only this type (repeatable); int64 is always there"
    )
    chosen = parser.parse_args(arguments)
    jobs = [
        (target, op, dtype)
        for target in chosen.target or TARGETS
        for op in chosen.op or names()
        for dtype in SPECS[op].dtypes
        if not chosen.dtype or str(dtype).removeprefix("torch.") in (*chosen.dtype, "int64")
    ]

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total}", end="" if done < total else "\n", file=sys.stderr, flush=True)

    rows = collect(jobs, progress=progress)
    text = markdown(rows, shlex.join(arguments))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(text)
    else:
        print(text)
    wrong = faults(rows)
    print("\n".join(wrong) or f"{len(rows)} kernels, no faults", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
