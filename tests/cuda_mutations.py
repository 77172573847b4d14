"""Takes what orders the threads of csrc/cuda away, one piece at a time in a copy, and reports which build notices.

    python tests/cuda_mutations.py [WORD ...]     all mutations, or those of the programs whose name contains a word

A mutation is one barrier less, one wait for copies that allows a group more, or one addition without an atomic. One that
nothing notices is either a hole in the cases or not needed; exit code 1. By hand: it compiles twice for each.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cuda_harness
import torch
from test_cuda import short

KINDS = ("plain", "thread")
MUTATIONS = {
    "barrier": (r"^( *)__sync(threads|warp)\(\);", r"\1;"),
    "wait": (r"cp_async_wait<(.*?)>\(\)", r"cp_async_wait<(\1) + 1>()"),
    "atomic": (r"atomic(?:Add|Or)\(([^;]*?), ([^,;]*)\);", r"*(\1) += \2;"),
}


def mutants(text: str) -> Iterator[tuple[str, str]]:
    """(what is changed and in which line, the changed text)"""
    for name, (pattern, replacement) in MUTATIONS.items():
        for match in re.finditer(pattern, text, re.M):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{name} at line {line}", text[: match.start()] + match.expand(replacement) + text[match.end() :]


def sources_of(program: str) -> list[Path]:
    """The .cu file and the headers that it alone, or first in the alphabet, includes."""
    folder, owner = cuda_harness.ROOT / "csrc/cuda", {}
    for name in cuda_harness.programs():
        waiting = [f"{name}.cu"]
        while waiting:
            file = waiting.pop()
            if file not in owner:
                owner[file] = name
                waiting += re.findall(r'^#include "(\w+\.cuh)"', (folder / file).read_text(), re.M)
    return [folder / file for file, name in sorted(owner.items()) if name == program and file != "ptx.cuh"]


def main(words: list[str]) -> int:
    missed = 0
    for program in cuda_harness.programs():
        if words and not any(word in program for word in words):
            continue
        for source in sources_of(program):
            for what, text in mutants(source.read_text()):
                with tempfile.TemporaryDirectory() as place:
                    copy = Path(place) / "cuda"
                    shutil.copytree(source.parent, copy)
                    (copy / source.name).write_text(text)
                    found = {}
                    for kind in KINDS:
                        said = cuda_harness.build([(program, kind)], Path(place), copy)
                        wrong = [said] if said else cuda_harness.check(program, kind, folder=Path(place)).wrong
                        if wrong:
                            found[kind] = "does not compile" if said else short(wrong[0])
                missed += not found
                print(f"{source.name}: {what:24} {found or 'NOT NOTICED'}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(cuda_harness.missing() or main(sys.argv[1:]))
