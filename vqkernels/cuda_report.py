"""What nvcc made of every CUDA kernel, read from the compiled library, without a GPU.

    python -m vqkernels.cuda_report [--out docs/cuda-report.md] [LIBRARY or CUBIN ...]

Without a file it reads the library of this installation, for the architectures it was built for. ``faults`` is the
gate: no spills, no stack frame, registers and shared memory within the plan and the chip, the planned instructions in
the loops, 128-bit global loads, no device-wide fences, and a plan for every kernel.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import _ops
from .triton_kernels.chips import CHIPS, occupancy
from .triton_kernels.machine_code import MachineCode, nvidia, tool


@dataclass(frozen=True)
class Plan:
    """What a kernel is meant to be. ``file``, ``kernel``: regular expressions for the start of the file's name, and of
    the kernel's with its template arguments. ``registers``: the most a thread may hold. ``shared``: dynamic bytes that
    its launcher asks for at an ordinary size, and ``most`` at any (0: as much). ``tiles``: it asks for them by TILES.
    ``loops``: instructions that must stand in a loop. ``load``: bits of the widest global load, at least. ``fences``:
    it orders memory between blocks."""

    file: str
    kernel: str
    registers: int
    shared: int = 0
    most: int = 0
    tiles: bool = False
    loops: tuple[str, ...] = ()
    load: int = 128
    fences: bool = False


# stages, resident of csrc/cuda/tiles.cuh
TILES = {"sm_80": (2, 2), "sm_90": (3, 3), "sm_100": (3, 3), "sm_120": (2, 3)}
CHUNK = 16 << 10
TENSOR_CORES = ("HMMA", "LDSM", "LDGSTS")  # matrix products, their operands' loads, copies in the background
SEARCHES = "nearest_codeword|residual_quantize$"

# The first that fits a kernel counts. Less than 128 bits where a lane's elements do not lie side by side: keys that are
# ranked one by one, one row's element after the other, rows that are not aligned.
PLANS = (
    Plan("codebook_usage", "count_kernel", registers=64, shared=32 << 10, most=48 << 10, load=64),
    Plan("codeword_sums", "add_kernel", registers=80),
    Plan("codeword_sums", "combine_kernel", registers=40, load=64),
    Plan("codeword_sums", "scatter_kernel", registers=64, load=32),
    Plan("codeword_sums", "", registers=40, load=32),
    Plan("fsq", "fsq_kernel", registers=64, shared=5 << 10, most=48 << 10),
    Plan("fsq", "backward_kernel", registers=64),
    Plan("nearest_codeword", "coarse_kernel|compare_kernel", registers=255, tiles=True, loops=TENSOR_CORES),
    Plan("residual_quantize$", "levels_kernel", registers=255, tiles=True, loops=TENSOR_CORES),
    Plan("residual_quantize$", "set_levels_kernel", registers=40, load=0),
    Plan("nearest_codeword", "few_kernel", registers=128),
    Plan("nearest_codeword", "select_kernel", registers=96, load=32),
    Plan(SEARCHES, "", registers=128, load=32),
    Plan("residual_quantize_backward", "backward_kernel", registers=128),
    Plan("rotation_trick", r"backward_kernel<.*, 1, 0>", registers=128, load=32),
    Plan("rotation_trick", "backward_kernel", registers=128),
    Plan("trie_topk", "beam_kernel", registers=128),
    Plan("trie_topk", "", registers=64, load=32),
)


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture. ``threads``: of a block, at most, as its launch bounds say; 0 without any."""

    target: str
    file: str
    kernel: str
    threads: int
    code: MachineCode
    plan: Plan | None


def read(path: Path, plans: tuple[Plan, ...] = PLANS) -> list[Row]:
    """The kernels in a library, an object file or a cubin, by architecture, file and name."""
    if path.suffix == ".cubin":
        return _read_cubin(path, plans)
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "-xelf", "all", str(path.resolve()), folder=folder)
        rows = [row for cubin in Path(folder).glob("*.cubin") for row in _read_cubin(cubin, plans)]
    return sorted(rows, key=lambda row: (int(row.target[3:]), row.file, row.kernel))


def _read_cubin(path: Path, plans: tuple[Plan, ...]) -> list[Row]:
    header = tool("cuobjdump", "-elf", str(path))
    target = re.search(r"sm_\d+", header)[0]
    if target not in CHIPS:
        return []
    _, *parts = re.split(r"^\.nv\.info\.(\S+)$", header, flags=re.MULTILINE)
    bounds = {
        name: int(found[1], 16)
        for name, section in zip(parts[::2], parts[1::2], strict=True)
        if (found := re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(0x[0-9a-f]+)", section))
    }
    codes = nvidia(path.read_bytes(), int(target[3:]))
    rows = []
    for mangled, kernel in zip(codes, _readable(codes), strict=True):
        # nvcc writes the file's name into its unnamed namespace
        found = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+)_cu_", mangled)
        file = found[1] if found else ""
        plan = next((p for p in plans if re.match(p.file, file) and re.match(p.kernel, kernel)), None)
        rows.append(Row(target, file, kernel, bounds.get(mangled, 0), codes[mangled], plan))
    return rows


def _readable(names: Iterable[str]) -> list[str]:
    """ "backward_kernel<float, 4, 0>" of a mangled name."""
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    readable = []
    for name in out.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|vqk::(cuda::)?|__(?=half|nv_bf)", "", name)
        name = re.sub(r"\(\w+\)(?=\w)", "", name)  # the type of a template's number
        readable.append(re.sub(r"^void ", "", name.split(">(")[0] + ">" if ">(" in name else name.split("(")[0]))
    return readable


def faults(rows: Iterable[Row], plans: tuple[Plan, ...] = ()) -> list[str]:
    """What is wrong with the kernels: a line each; [] when nothing is. Of ``plans`` each must serve a kernel."""
    rows = list(rows)
    out = [f"{row.target} {row.file} {row.kernel}: {fault}" for row in rows for fault in _faults(row)]
    used = {row.plan for row in rows}
    return out + [
        f"{plan.file}: no kernel is called {plan.kernel}, which PLANS has" for plan in plans if plan not in used
    ]


def _faults(row: Row) -> Iterator[str]:
    chip, code, plan = CHIPS[row.target], row.code, row.plan
    if plan is None:
        yield f"no entry in {__name__}.PLANS"
        return
    if code.spills:
        yield f"{code.spills} accesses to local memory"
    if code.stack:
        yield f"a stack frame of {code.stack} bytes"
    if code.registers > plan.registers:
        yield f"{code.registers} registers, planned are at most {plan.registers}"
    if (shared := code.static_shared + max(dynamic(row))) > chip.shared_block:
        yield f"{shared} bytes of shared memory, the chip has {chip.shared_block} for a block"
    elif not row.threads:
        yield "no launch bounds: __launch_bounds__ says for which block its registers must suffice"
    elif not fit(row).blocks:
        yield "not one block fits on a processor"
    if code.fences and not plan.fences:
        yield f"{code.fences} device-wide fences"
    if code.load < plan.load:
        yield f"global loads of {code.load} bits, planned are {plan.load}"
    for instruction in plan.loops:
        if not any(re.match(instruction, op) for op in code.loops):
            yield f"no {instruction} in any loop"


def dynamic(row: Row) -> tuple[int, int]:
    """Bytes of shared memory that the launcher asks for: at an ordinary size, for TILES 64 features in 16 bits, and at
    most."""
    if row.plan is None:
        return 0, 0
    if not row.plan.tiles:
        return row.plan.shared, row.plan.most
    stages, resident = TILES[row.target]
    return (1 + stages) * CHUNK, (max(resident, stages) + stages) * CHUNK


def fit(row: Row):
    """The blocks on a processor, at an ordinary size."""
    shared = row.code.static_shared + dynamic(row)[0]
    return occupancy(row.target, row.code.registers, shared, max(1, row.threads // 32))


HEAD = """# CUDA kernels as compiled

What {nvcc} makes of the kernels in csrc/cuda, written on a machine without a GPU by

    python -m vqkernels.cuda_report --out docs/cuda-report.md

from the built library. `tests/test_cuda_report.py` fails where a kernel spills, has a stack frame or local memory,
needs more registers or shared memory than planned, lost the instructions that its loop is about, or loads global memory
in pieces of less than 128 bits without a stated reason.

**Nothing here was measured.** Figures that differ between architectures stand as {order}.

- *threads*: of a block. *registers*: of a thread, then the planned limit. *shared*: static + dynamic bytes
  at an ordinary size (at most).
- *blocks*: how many fit on a processor at an ordinary size; *filled*: the share of its warps that they fill;
  *limit*: what there is no more of.
- *loops*: matrix products, loads of their operands from shared memory (LDSM) and asynchronous copies (LDGSTS) in loops.
- *load, store*: the widest global access in bits. *fp64*: instructions in float64.
- Spills, stack frames and local memory: none, for every kernel, or the verdict says so.
"""
COLUMNS = "kernel threads registers shared blocks filled limit loops load,store fp64"


def markdown(rows: list[Row], seconds: dict[str, float], nvcc: str) -> str:
    """The document: a table for each file, and the verdict."""
    order = " / ".join(sorted({row.target for row in rows}, key=lambda target: int(target[3:])))
    parts = [HEAD.format(nvcc=nvcc, order=order)]
    for file, group in itertools.groupby(sorted(rows, key=lambda r: (r.file, r.kernel)), lambda r: r.file):
        took = f"Compiled in {seconds[file]:.0f} seconds of one core.\n\n" if file in seconds else ""
        columns = [column.replace(",", ", ") for column in COLUMNS.split()]
        parts.append(f"\n## {file}\n\n{took}| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|\n")
        for kernel, same in itertools.groupby(group, lambda r: r.kernel):
            parts.append(_line(kernel, sorted(same, key=lambda r: int(r.target[3:]))))
    wrong = faults(rows, PLANS)
    parts.append("\n## Verdict\n\n" + ("No faults.\n" if not wrong else "".join(f"- {line}\n" for line in wrong)))
    return "".join(parts)


def _line(kernel: str, rows: list[Row]) -> str:
    def each(value) -> str:
        values = [str(value(row)) for row in rows]
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    def loops(row: Row) -> str:
        names = {row.code.tensor} | {op.split(".")[0] for op in row.code.loops if re.match(r"LDSM|LDGSTS", op)}
        return " ".join(sorted(names - {""})) or "–"

    plan = rows[0].plan
    ordinary, most = (each(lambda row, i=i: dynamic(row)[i]) for i in (0, 1))
    cells = (
        f"`{kernel}`",
        each(lambda row: row.threads),
        each(lambda row: row.code.registers) + (f" ≤ {plan.registers}" if plan else ""),
        each(lambda row: row.code.static_shared) + f" + {ordinary}" + f" ({most})" * (most != "0"),
        each(lambda row: fit(row).blocks),
        each(lambda row: f"{fit(row).share:.0%}"),
        each(lambda row: fit(row).limit),
        each(loops),
        each(lambda row: f"{row.code.load or '–'}, {row.code.store or '–'}"),
        each(lambda row: row.code.fp64),
    )
    return "| " + " | ".join(cells) + " |\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vqkernels.cuda_report", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the tables there; without it, to standard output")
    parser.add_argument("file", nargs="*", type=Path, help="libraries or cubins; without any, the installed library")
    chosen = parser.parse_args(arguments)
    info = _ops.build_info()
    if not chosen.file and not info.get("cuda"):
        print(f"the installed library has no CUDA kernels: {info.get('cuda_reason')}", file=sys.stderr)
        return 2
    rows = [row for path in chosen.file or [library()] for row in read(path)]
    text = markdown(rows, info.get("cuda_seconds", {}), info.get("nvcc", "nvcc"))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(text)
    else:
        print(text)
    wrong = faults(rows, () if chosen.file else PLANS)
    print("\n".join(wrong) or f"{len(rows)} kernels, no faults", file=sys.stderr)
    return 1 if wrong else 0


def library() -> Path:
    """The compiled library of this installation."""
    return next(Path(__file__).parent.glob("_C*.so"))


if __name__ == "__main__":
    raise SystemExit(main())
