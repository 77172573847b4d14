"""Runs the checks of a script in Triton's interpreter: processes of their own, because the interpreter is chosen at
import; two at a time."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def interpreted(script: str, checks: list[str]) -> list[str]:
    """What the script prints, in the order of ``checks``, of which every one must be "name: ok"."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    def run(names):
        command = [sys.executable, Path(__file__).with_name(script), *names]
        return subprocess.run(command, capture_output=True, text=True, env=env)

    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(run, (checks[::2], checks[1::2])))
    lines = [line for out in outs for line in out.stdout.splitlines()]
    assert not any(out.returncode for out in outs), "".join(out.stdout + out.stderr[-3000:] for out in outs)
    said = {line.split()[2].rstrip(":"): line for line in lines if ": ok," in line}
    assert sorted(said) == sorted(checks), lines
    return [said[check] for check in checks]
