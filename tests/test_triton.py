"""Every Triton kernel of the registry in Triton's interpreter, under the checking layer, on CPU tensors.

A new operator joins with "triton" in its spec's ``compiled``. Scripts run in processes of their own, because the
interpreter is chosen at import; the lines they print stand at the end of the test run.
"""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vqkernels.registry import SPECS

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
OPS = [name for name, spec in SPECS.items() if "triton" in spec.compiled]
printed: list[str] = []  # conftest writes it at the end of the run
SCRIPTS = [("interpreted_registry.py", name) for name in OPS] + [("triton_mutants.py",), ("three_backends.py",)]


@pytest.fixture(scope="module")
def results(request):
    """{script and arguments: its lines}; two processes run at a time."""
    wanted = {item.callspec.params["script"] for item in request.session.items if item.path == Path(__file__)}
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    def run(script):
        command = [sys.executable, HERE / script[0], *script[1:]]
        return subprocess.run(command, capture_output=True, text=True, env=env)

    with ThreadPoolExecutor(2) as pool:
        yield {script: pool.submit(run, script) for script in SCRIPTS if script in wanted}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script[-1].removesuffix(".py"))
def test_in_the_interpreter(script, results):
    """All cases of an operator; faults put into the real kernels; 10^5 rows against reference and cpu."""
    out = results[script].result()
    lines = [line for line in out.stdout.splitlines() if line.startswith("triton ")]
    printed.extend(lines)
    assert out.returncode == 0, out.stdout[-6000:] + out.stderr[-3000:]
    assert len(lines) >= (len(SPECS[script[1]].dtypes) if script[1:] else 20)
    assert not any("SURVIVED" in line or "WRONG" in line for line in lines), lines
