"""CPU kernels without torch, against naive scalar oracles: hostile data, every SIMD level, the search's coarse passes
forced."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_drivers():
    run = Path(__file__).parent / "cpp" / "run"
    out = subprocess.run([run], capture_output=True, text=True)
    assert out.returncode == 0, (out.stdout + out.stderr)[-3000:]
    rows, failures = map(int, re.search(r"(\d+) rows compared, (\d+) failures", out.stdout).groups())
    assert rows > 1_000_000 and failures == 0
    users, failures = map(int, re.search(r"(\d+) users compared, (\d+) failures", out.stdout).groups())
    assert users > 4000 and failures == 0
