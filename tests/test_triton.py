"""Every Triton kernel of the registry in Triton's interpreter, under the checking layer, on CPU tensors.

A new operator joins with "triton" in its spec's ``compiled``. Each operator runs in a process of its own, because the
interpreter is chosen at import; the lines it prints stand at the end of the test run.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqkernels.registry import SPECS

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
OPS = [name for name, spec in SPECS.items() if "triton" in spec.compiled]
printed: list[str] = []  # conftest writes it at the end of the run


def run(script: str, *arguments: str) -> list[str]:
    """The script's output by lines; fails with all that it said."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, HERE / script, *arguments], capture_output=True, text=True, env=env)
    lines = out.stdout.splitlines()
    printed.extend(line for line in lines if line.startswith("triton "))
    assert out.returncode == 0, out.stdout[-6000:] + out.stderr[-3000:]
    return lines


@pytest.mark.parametrize("name", OPS)
def test_op_under_the_checking_layer(name):
    lines = [line for line in run("interpreted_registry.py", name) if line.startswith("triton ")]
    assert len(lines) == len(SPECS[name].dtypes)
    assert all(line.endswith(": ok") for line in lines), lines
