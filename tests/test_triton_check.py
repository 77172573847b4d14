"""The checking layer: planted bugs are reported, clean kernels are not blamed, the arithmetic is the hardware's.

The kernels run in a process of their own: the interpreter is chosen at import.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


printed: list[str] = []  # conftest writes it at the end of the run


@functools.cache
def lines(script: str) -> dict[str, tuple[str, str]]:
    """{case: (ok or WRONG, what was said)} as the script prints it."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, HERE / script], capture_output=True, text=True, env=env)
    rows = [line.split(" | ", 2) for line in out.stdout.splitlines() if " | " in line]
    assert rows, out.stderr[-3000:]
    printed.append(f"triton {script}: {len(rows)} cases, {sum(row[0] == 'ok' for row in rows)} as they must be")
    return {case: (verdict, said) for verdict, case, said in rows}


def names(script: str, pattern: str) -> list[str]:
    """The cases of a script, read from its text: collecting tests must not choose the interpreter."""
    return re.findall(pattern, (HERE / script).read_text(), re.MULTILINE)


@pytest.mark.parametrize("bug", names("planted_bugs.py", r'"([^"]+)": (?=["\'])'))
def test_planted_bug_is_reported(bug):
    verdict, said = lines("planted_bugs.py")[bug]
    assert verdict == "ok", said


@pytest.mark.parametrize("kernel", names("planted_bugs.py", r"^def run_(\w+)"))
def test_clean_kernel_is_not_blamed(kernel):
    verdict, said = lines("planted_bugs.py")[f"clean {kernel}"]
    assert verdict == "ok", said


@pytest.mark.parametrize("case", names("hardware_arithmetic.py", r"^    (\w+),$"))
def test_arithmetic_of_the_hardware(case):
    verdict, said = lines("hardware_arithmetic.py")[case]
    assert verdict == "ok", said


def test_nothing_is_left_out():
    said = lines("planted_bugs.py")
    assert len(said) == len(names("planted_bugs.py", r'"([^"]+)": (?=["\'])')) + len(
        names("planted_bugs.py", r"^def run_(\w+)")
    )
    assert len(said) > 35 and len(lines("hardware_arithmetic.py")) >= 12


def test_import_after_triton_is_refused():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(HERE)}
    out = subprocess.run([sys.executable, "-c", "import triton, triton_check"], capture_output=True, text=True, env=env)
    assert out.returncode == 1 and "import triton_check before triton" in out.stderr
