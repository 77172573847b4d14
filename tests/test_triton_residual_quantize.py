"""residual_quantize, its backward and rotation_trick in Triton, beyond the registry's cases: in the interpreter
(interpreted_residual.py), their PTX on the emulator, and how often they compile."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from triton_scripts import interpreted

from vqkernels import verify
from vqkernels.registry import SPECS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
printed: list[str] = []  # conftest writes it at the end of the run
CHECKS = (
    "hostile_residuals other_dtypes magnitudes_of_float64 survivors_hidden_behind_a_lane levels_and_sizes many_features"
    " rows_that_stop_being_finite losses_add_in_one_order backward rotation_in_steps"
).split()

ONE_KERNEL = """
import torch
from vqkernels.triton_kernels.offline import compiled_for
from vqkernels.triton_kernels.residual_quantize import residual_quantize, residual_quantize_backward

def books(*sizes):
    return [torch.randn(1, size, 24) for size in sizes]

def both(N, codebooks):
    z = torch.randn(1, N, 24)
    residual_quantize(z, codebooks, None, 0)
    indices = torch.zeros(1, N, len(codebooks), dtype=torch.int64)
    residual_quantize_backward(z, codebooks, indices, z, torch.ones(len(codebooks)), 1, False)

with compiled_for("sm_90") as launches:
    shared = books(48)
    for N, codebooks in ((100, books(48, 48)), (64, books(48, 17, 3)), (1, shared * 5), (7777, books(2, 48) * 4)):
        both(N, codebooks)
    compiled = len(launches)
    mask = torch.ones(1, 50, dtype=torch.bool)
    for dtype, metric in ((torch.bfloat16, 1), (torch.float64, 2)):
        residual_quantize(torch.randn(1, 50, 100, dtype=dtype), [torch.randn(1, 20, 100, dtype=dtype)], mask, metric)
variants = {}
for launch in launches[:compiled]:
    variants.setdefault(launch.name, set()).add(id(launch.compiled))
for name in ("_residual_quantize_kernel", "_residual_quantize_backward_kernel", "_losses_kernel"):
    print(name, len(variants[name]))
"""


def test_in_the_interpreter():
    printed.extend(interpreted("interpreted_residual.py", CHECKS))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype, metric, whole", [(torch.bfloat16, 1, 128), (torch.float64, 0, 0)])
def test_ptx(target, dtype, metric, whole):
    """Cosine; float64 with a row's features in steps. Masked and broken rows, codewords that are twice there, a residual
    of zero; unordered accesses between a program's threads would be reported."""
    from ptx import emulated
    from vqkernels.triton_kernels import tuning
    from vqkernels.triton_kernels.residual_quantize import residual_quantize, residual_quantize_backward

    z = torch.randn(1, 12, 40).to(dtype)
    books = [(torch.randn(1, size, 40) * 0.7).to(dtype) for size in (70, 5)]
    books[0][:, 66] = books[0][:, 2]
    z[0, 0], z[0, 1, 3] = books[0][0, 2], torch.nan
    mask = torch.arange(12)[None] != 7
    tiles = {"ROWS": 16, "CODES": 64, "WHOLE": whole, "FEATURES": 32, "num_warps": 4, "num_stages": 2}
    args = (z, books, mask, metric)
    want = SPECS["residual_quantize"].reference(*args)
    with tuning.using({"residual_quantize": {"*": tiles}}), emulated(target, racecheck=True, seed=1):
        got = residual_quantize(*args)
        back = (z.nan_to_num(), books, want[0], z.flip(1).nan_to_num(), torch.ones(2, dtype=want[2].dtype), 1, True)
        dz = residual_quantize_backward(*back)
    for i in (0, 1, 3):
        assert verify._first_difference(got[i], want[i]) is None
    torch.testing.assert_close(got[2], want[2], rtol=1e-6, atol=0)
    spec = SPECS["residual_quantize_backward"]
    assert verify._error(dz, spec.reference(*verify._map(back, verify._double))) <= spec.tolerance


def test_one_kernel_for_every_length_level_count_and_mix_of_sizes():
    out = subprocess.run([sys.executable, "-c", ONE_KERNEL], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    lines = [line.split() for line in out.stdout.splitlines()]
    assert len(lines) == 3 and all(count == "1" for _, count in lines), lines


@pytest.mark.parametrize("features, message", [(1 << 16, None), ((1 << 16) + 1, "at most 65536")])
def test_too_many_features_are_refused(features, message):
    from vqkernels.triton_kernels.residual_quantize import residual_quantize

    z, book = torch.zeros(1, 0, features), torch.zeros(1, 1, features)
    if message is None:
        assert residual_quantize(z, [book], None, 0)[0].shape == (1, 0, 1)
    else:
        with pytest.raises(ValueError, match=message):
            residual_quantize(z, [book], None, 0)
