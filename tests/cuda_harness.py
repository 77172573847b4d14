"""csrc/cuda's own sources, compiled as C++ and run on this CPU through their ordinary launchers.

    python tests/cuda_harness.py [WORD ...]     builds and runs all programs, or those whose name contains a word; words
                                                may also be builds (plain, address, thread) or a dtype

Three builds, each of which finds what the others do not (tests/test_cuda.py shows it): ``plain``, multiply and add fused
as nvcc does; ``address``, ASan and UBSan, not fused; ``thread``, TSan. tests/cuda/emulator.h says what is emulated,
tests/cuda/calls.h how an operator is added.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cuda_cases import TILES_MATTER, more_cases
from torch import Tensor

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "tests/cuda"
FOLDER = ROOT / "build/emulated"
BUILDS = ("plain", "address", "thread")
FLAGS = [*"-std=c++20 -g -fPIC -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi -DVQK_EMULATED".split()]
SANITIZERS = {
    "plain": "-O2",
    "address": "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -ffp-contract=off",
    "thread": "-O1 -fsanitize=thread -ffp-contract=off",
}
SEEN = {"address": ["-DVQK_ASAN"], "thread": ["-DVQK_TSAN"]}  # by the emulator, which is not instrumented
# of a build, or of nvcc's PTX: the largest size of a dimension, beyond which cases take too long; runs of a case
LARGEST = {"plain": 100_000, "address": 5000, "thread": 1100, "ptx": 1100}
LARGEST_OF = {("codebook_usage", "thread"): 10_000}  # fewer are one block's, and no other adds to the same counts
RUNS = {"plain": 4, "address": 2, "thread": 2, "ptx": 1}
CAPABILITIES = (80, 86, 90, 100, 120)  # of the emulated devices: case after case another
EVERY_TILES = (80, 90, 120)  # rows of csrc/cuda/tiles.cuh that differ
TYPES = {t: i for i, t in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool))}  # fmt: skip


def missing() -> str | None:
    """Why the kernels cannot be compiled here."""
    return None if toolkit() else "no CUDA headers: nvcc is not installed"


@functools.cache
def toolkit() -> list[str]:
    """Compiler flags that find the CUDA headers, as nvcc itself would."""
    if not shutil.which("nvcc") or not shutil.which("g++"):
        return []
    said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    words = shlex.split(re.search(r"INCLUDES=(.*)", said)[1])
    return [part for word in words for part in ("-isystem", os.path.realpath(word.removeprefix("-I")))]


@functools.cache
def programs() -> dict[str, list[str]]:
    """One program a .cu file: {its name: the operators it has calls of}."""
    names = sorted(path.stem for path in SOURCES.glob("*.cpp") if (ROOT / f"csrc/cuda/{path.stem}.cu").exists())
    return {name: re.findall(r"^VQK_CALL\((\w+)\)", (SOURCES / f"{name}.cpp").read_text(), re.M) for name in names}


def _fused() -> list[str]:
    info = Path("/proc/cpuinfo")
    words = info.read_text().split() if info.exists() else []
    return ["-mavx2", "-mfma", "-ffp-contract=fast"] if "fma" in words and "avx2" in words else []


def build(wanted: list[tuple[str, str]], folder: Path = FOLDER, kernels: Path = ROOT / "csrc/cuda") -> str:
    """Compiles (program, build) pairs with ninja, what has changed; returns the compiler's messages if it failed.
    A program lies at folder/build/program, the plain one also as a shared library beside it."""
    include = ["-I", SOURCES, "-I", ROOT / "csrc/include", "-I", ROOT / "csrc/cuda", *toolkit()]
    lines = [
        "rule cxx\n  command = g++ -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = g++ $flags $in -o $out",
    ]
    targets = []
    for kind in sorted({kind for _, kind in wanted}):
        instrumented = shlex.join(
            map(str, [*FLAGS, *SANITIZERS[kind].split(), *(_fused() if kind == "plain" else []), *include])
        )
        bare = shlex.join(map(str, [*FLAGS, "-O2", *SEEN.get(kind, []), *include]))
        at = folder / kind
        common = []
        for name, flags in (("calls", instrumented), ("emulator", bare), ("exchanges", bare), ("runtime", bare)):
            common.append(f"{at}/{name}.o")
            lines.append(f"build {common[-1]}: cxx {SOURCES}/{name}.cpp\n  flags = {flags}")
        for name in sorted({name for name, k in wanted if k == kind}):
            own = [f"{at}/{name}.call.o", f"{at}/{name}.o"]
            lines.append(f"build {own[0]}: cxx {SOURCES}/{name}.cpp\n  flags = {instrumented}")
            lines.append(f"build {own[1]}: cxx {kernels}/{name}.cu\n  flags = -x c++ {instrumented}")
            outputs = [(name, SANITIZERS[kind])] + [(f"{name}.so", "-shared")] * (kind == "plain")
            for target, flags in outputs:
                targets.append(f"{at}/{target}")
                lines.append(f"build {targets[-1]}: link {' '.join(own + common)}\n  flags = {flags}")
    folder.mkdir(parents=True, exist_ok=True)
    ninja_file = folder / f"{os.getpid()}.ninja"
    ninja_file.write_text("\n".join(lines) + f"\ndefault {' '.join(targets)}\n")
    ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    cores = str(len(os.sched_getaffinity(0)))
    with (folder / "lock").open("w") as lock:  # tests of another process want the same programs
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [*ninja, "-C", folder, "-f", ninja_file, "-k", "0", "-j", cores]
        out = subprocess.run(command, capture_output=True, text=True)
    ninja_file.unlink()
    return "" if out.returncode == 0 else (out.stdout + out.stderr)[-8000:]


# ----------------------------------------------------------------------------------------------------------- the files


def _integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def _text(text: str) -> bytes:
    return _integers(len(text.encode())) + _padded(text.encode())


def raw(x: Tensor) -> bytes:
    return x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def _array(x: Tensor | None, filled: bool) -> bytes:
    if x is None:
        return _integers(-1)
    x = x.contiguous()
    offset = x.data_ptr() % 16 if filled else 0
    return _integers(TYPES[x.dtype], x.dim(), *x.shape, offset) + (_padded(raw(x)) if filled else b"")


def _argument(value) -> bytes:
    if value is None or isinstance(value, Tensor):
        return _integers(0, 1) + _array(value, True)
    values = value if isinstance(value, (list, tuple)) else [value]
    if values and isinstance(values[0], Tensor):
        return _integers(0, len(values)) + b"".join(_array(x, True) for x in values)
    return _integers(len(values), *(int(v) for v in values), 0)


@dataclass
class Case:
    """One call of one operator; ``outputs`` say what comes out, their values do not matter."""

    op: str
    label: str
    args: tuple
    outputs: tuple[Tensor, ...]
    seed: int = 1
    runs: int = 1
    capability: int = 80

    def encoded(self) -> bytes:
        head = _text(self.op) + _integers(self.seed, self.runs, self.capability, self.seed // 2 % 2)
        arguments = _integers(len(self.args)) + b"".join(map(_argument, self.args))
        return head + arguments + _integers(len(self.outputs)) + b"".join(_array(x, False) for x in self.outputs)

    def room(self) -> int:
        return sum(len(_padded(bytes(x.numel() * x.element_size()))) for x in self.outputs)

    def decoded(self, data: bytes) -> tuple[Tensor, ...]:
        results, at = [], 0
        for x in self.outputs:
            size = x.numel() * x.element_size()
            piece = torch.frombuffer(bytearray(data[at : at + size] or b"\0"), dtype=torch.uint8)[:size]
            results.append(piece.view(x.dtype).reshape(x.shape))
            at += (size + 7) // 8 * 8
        return tuple(results)


# ------------------------------------------------------------------------------------------------------------- running


@dataclass
class Result:
    """What became of one program of one build."""

    program: str
    build: str
    cases: int = 0
    seconds: float = 0.0
    worst: float = 0.0  # error of "close" outputs, in eps
    wrong: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)  # kernels that were never launched

    def __str__(self) -> str:
        return f"{self.program:20} {self.build:8} {self.cases:4} cases  {self.worst:6.2f} eps  {self.seconds:5.1f} s"


def chosen(op: str, dtype, kind: str) -> list[tuple[str, tuple]]:
    """The registry's samples and edges and this folder's own cases; a share of them under TSan."""
    from vqkernels.registry import SPECS

    spec = SPECS[op]
    every = [*more_cases(op, dtype), *spec.samples(dtype), *spec.edges(dtype)]
    largest = LARGEST_OF.get((op, kind), LARGEST[kind])
    every = [case for case in every if _largest(case[1]) <= largest]
    share = 3 if kind == "thread" and len(every) > 12 else 1
    return every[spec.dtypes.index(dtype) % share :: share]


def _largest(args) -> int:
    """The largest size of any dimension."""
    sizes = [
        _largest(a) if isinstance(a, (list, tuple)) else max(a.shape, default=0)
        for a in args
        if isinstance(a, (list, tuple, Tensor))
    ]
    return max(sizes, default=0)


def cases_of(program: str, kind: str, dtype: str = "") -> list[Case]:
    from vqkernels.registry import SPECS

    cases = []
    for op in programs()[program]:
        for type_ in SPECS[op].dtypes:
            for label, args in chosen(op, type_, kind) if dtype in str(type_) else ():
                out = SPECS[op].fake(*args)
                out = out if isinstance(out, tuple) else (out,)
                devices = EVERY_TILES if label in TILES_MATTER else CAPABILITIES[len(cases) % len(CAPABILITIES) :][:1]
                for device in devices:
                    name = f"{op} {str(type_)[6:]} {label}, sm_{device}"
                    cases.append(Case(op, name, args, out, len(cases), RUNS[kind], device))
    return cases


def execute(
    path: Path, cases: list[Case], kind: str, name: str = "all"
) -> tuple[str, list[tuple[str, tuple]], list[str]]:
    """Runs a program (``name`` tells apart two that run at a time): what it said if it ended early; (what is wrong, outputs) of each case; kernels not launched."""
    calls, results = (path.with_name(f"{path.name}.{name}.{os.getpid()}.{what}") for what in ("calls", "results"))
    calls.write_bytes(_integers(len(cases)) + b"".join(_text(case.label) + case.encoded() for case in cases))
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0:history_size=0",
    }
    command = [path, calls, results]
    if kind == "thread" and shutil.which("setarch"):  # gcc 12's TSan does not know the widest address randomization
        command = ["setarch", "-R", *command]
    try:
        out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **options})
        if out.returncode:
            lines = out.stderr.strip().splitlines()
            last = max((i for i, line in enumerate(lines) if line in {case.label for case in cases}), default=0)
            return "\n".join(lines[last : last + 60]) or f"exit code {out.returncode}", [], []
        data = results.read_bytes()
    finally:
        calls.unlink(missing_ok=True)
        results.unlink(missing_ok=True)
    at, answers = 0, []
    for case in cases:
        wrong, at = _read_text(data, at)
        answers.append((wrong, () if wrong else case.decoded(data[at:])))
        at += 0 if wrong else case.room()
    unused = []
    while at < len(data):
        name, at = _read_text(data, at)
        unused.append(name)
    return "", answers, unused


def _read_text(data: bytes, at: int) -> tuple[str, int]:
    (size,) = struct.unpack_from("<q", data, at)
    return data[at + 8 : at + 8 + size].decode(), at + 8 + (size + 7) // 8 * 8


def judge(case: Case, outputs: tuple[Tensor, ...]) -> tuple[str, float]:
    """verify.judge. On CUDA, where nobody waits for the device to report it, an index beyond its codebook is skipped and
    makes a gradient NaN; the reference refuses it."""
    from vqkernels import verify
    from vqkernels.registry import SPECS

    args = list(case.args)
    if case.op in ("codebook_usage", "codeword_sums"):
        args[-2] = args[-2].where(args[-2] < args[-1], -1)
    elif case.op == "residual_quantize_backward":
        sizes = torch.tensor([book.shape[1] for book in args[1]])
        beyond = ((args[2] >= sizes).any(-1) & (args[2] >= 0).all(-1))[..., None]
        if not (outputs[0].isnan() | ~beyond).all():
            return "rows with an index beyond its codebook are not NaN", 0.0
        outputs, args[2] = (outputs[0].masked_fill(beyond, 0),), args[2].where(args[2] < sizes, -1)
    return verify.judge(SPECS[case.op], outputs, tuple(args))


def check(program: str, kind: str, dtype: str = "", folder: Path = FOLDER) -> Result:
    """All cases of a program that was built, judged like any other backend."""
    result, start = Result(program, kind), time.monotonic()
    cases = cases_of(program, kind, dtype)
    said, answers, unused = execute(folder / kind / program, cases, kind)
    result.cases, result.unused = len(cases), list(map(demangled, unused))
    if said:
        result.wrong.append(said)
    for case, (wrong, outputs) in zip(cases, answers):
        detail, error = (wrong, 0.0) if wrong else judge(case, outputs)
        result.worst = max(result.worst, error)
        if detail:
            result.wrong.append(f"{case.label}, seed {case.seed}: {detail}")
    result.seconds = time.monotonic() - start
    return result


@functools.cache
def _demangle():
    import ctypes

    function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_char_p, *[ctypes.c_void_p] * 3]
    return lambda name: ctypes.string_at(address).decode() if (address := function(name.encode(), 0, 0, 0)) else name


def demangled(name: str) -> str:
    """A kernel's name with its template arguments, from the name of vqk::emulator::Kernel<it> or from PTX."""
    text = _demangle()(name if name.startswith("_Z") else "_Z" + name)
    text = re.split(r"vqk::cuda::(?:\(anonymous namespace\)::)?", text, maxsplit=1)[-1]
    depth = 0
    for at, letter in enumerate(text):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if depth < 0 or (depth == 0 and letter == "("):
            return text[:at]
    return text


def main(words: list[str]) -> int:
    dtypes = [w for w in words if w in ("float32", "float64", "bfloat16", "float16", "int64")]
    kinds = [kind for kind in BUILDS if kind in words] or BUILDS
    words = [w for w in words if w not in dtypes and w not in kinds]
    pairs = [(name, kind) for name in programs() for kind in kinds if not words or any(word in name for word in words)]
    if not pairs:
        print(f"no program is called like {' '.join(words)}; there are: {', '.join(programs())}")
        return 2
    if said := build(pairs):
        print(said)
    failed = bool(said)
    for name, kind in pairs:
        if (FOLDER / kind / name).exists():
            result = check(name, kind, *dtypes)
            print(result, *result.wrong[:5], sep="\n    ", flush=True)
            for unused in result.unused if kind == "plain" else ():
                print(f"    never launched: {unused}")
            failed |= bool(result.wrong)
    return int(failed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(missing() or main(sys.argv[1:]))
