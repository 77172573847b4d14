"""The Triton kernels in Triton's interpreter, on CPU tensors. A process of its own: the interpreter is chosen at
import."""

import importlib.util
import os
import subprocess
import sys

import pytest

CODE = """
import torch
from vqkernels import registry, verify

# the interpreter computes bfloat16 as integers, so it is left out here
dtypes = {torch.float32, torch.float64, torch.float16, torch.int64}
ran = 0
for name in ("codebook_usage", "rotation_trick_backward"):
    spec = registry.SPECS[name]
    assert registry.AVAILABLE[name]["triton"] is True, registry.AVAILABLE[name]["triton"]
    for dtype in dtypes.intersection(spec.dtypes):
        for case, args in verify.cases(spec, dtype):
            detail, _ = verify.compare(spec, "triton", args)
            assert not detail, (name, dtype, case, detail)
            ran += 1

usage = registry.SPECS["codebook_usage"].op
indices = torch.randint(-2, 5000, (2, 20000), generator=torch.Generator().manual_seed(0))
for size in (1, 100, 2048, 2049, 5000):  # histogram and atomics, indices beyond K skipped
    inside = torch.where(indices < size, indices, -1)
    assert torch.equal(usage.triton(indices, size), usage.reference(inside, size)), size
print("cases", ran)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_in_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    assert int(out.stdout.split()[-1]) > 30
