"""What nvcc makes of csrc/cuda, run on the PTX emulator behind the ordinary launchers.

A launcher is the one of the emulated build (cuda_harness), as a shared library; its launches come here instead of going
onto fibers, and run the entry of the same name in nvcc's PTX with the same grid, shared memory and arguments."""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
from pathlib import Path

import cuda_harness
from cuda_harness import Case, demangled
from ptx.launch import bytes_at, run_entry

TARGET = "sm_80"


class _Launch(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_void_p),
        ("type_name", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_size_t),
        ("count", ctypes.c_int),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("sizes", ctypes.POINTER(ctypes.c_size_t)),
        ("body", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("static_left", ctypes.c_int64),
    ]


_Hook = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Launch))


@functools.cache
def translated(source: Path) -> tuple[str, dict[str, str]]:
    """(nvcc's PTX of a .cu file, {a kernel's name with its template arguments: its entry})."""
    include = ["-I", cuda_harness.ROOT / "csrc/include", "-I", cuda_harness.ROOT / "csrc/cuda"]
    out = cuda_harness.FOLDER / f"{source.stem}.ptx"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        f"-arch={TARGET}",
        *include,
        "-ptx",
        "-o",
        out,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    text = out.read_text()
    entries = [line.split(".entry ")[1].split("(")[0].strip() for line in text.splitlines() if ".entry " in line]
    return text, {demangled(entry): entry for entry in entries}


class Library:
    """The launchers of one program."""

    def __init__(self, name: str, source: Path, folder: Path = cuda_harness.FOLDER):
        self.text, self.entries = translated(source)
        self.lib = ctypes.CDLL(str(folder / "plain" / f"{name}.so"))
        self.lib.vqk_call.restype = ctypes.c_char_p
        self.hook = _Hook(self._launched)
        self.lib.vqk_set_launch_hook(self.hook)
        self.execute, self.racecheck, self.seed = True, False, 0

    def call(self, case: Case, execute: bool = True, racecheck: bool = False):
        """(what is wrong, outputs, names of the kernels that were launched); without ``execute`` these only."""
        self.execute, self.racecheck, self.seed = execute, racecheck, case.seed
        self.launched, self.error = [], None
        results = ctypes.create_string_buffer(case.room() + 8)
        wrong = self.lib.vqk_call(case.encoded(), results).decode()
        if self.error is not None:
            raise self.error
        return wrong, case.decoded(results.raw), self.launched

    def _launched(self, pointer) -> None:
        launch = pointer.contents
        name = demangled(launch.type_name.decode())
        self.launched.append(name)
        if self.error is not None or not self.execute:
            return
        try:
            values = [ctypes.string_at(launch.arguments[i], launch.sizes[i]) for i in range(launch.count)]
            run_entry(
                self.text, self.entries[name], tuple(launch.grid), tuple(launch.block), values, self._allocations(),
                shared=launch.shared_bytes, static_left=launch.static_left, racecheck=self.racecheck, seed=self.seed,
            )  # fmt: skip
        except Exception as error:  # ctypes would print it and go on
            self.error = error

    def _allocations(self):
        places, sizes = (ctypes.c_void_p * 256)(), (ctypes.c_int64 * 256)()
        count = self.lib.vqk_allocations(places, sizes, ctypes.c_int64(256))
        assert count < 256
        return [(f"array {i}", places[i], bytes_at(places[i], sizes[i])) for i in range(count) if sizes[i]]


def few_cases(library: Library, cases: list[Case]) -> list[Case]:
    """Few cases that launch every kernel that the cases launch, those of some 16 KB first."""
    seen: set[str] = set()
    chosen = []
    for case in sorted(cases, key=lambda case: abs(math.log((len(case.encoded()) + case.room()) / 16384))):
        _, _, launched = library.call(case, execute=False)
        if not seen.issuperset(launched):
            seen.update(launched)
            chosen.append(case)
    return chosen
