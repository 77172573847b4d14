"""residual_quantize, its backward and rotation_trick in Triton, beyond the registry's cases (those: test_triton.py)."""

import subprocess
import sys

import pytest
from test_triton import pytestmark as needs_triton
from test_triton import run

pytestmark = needs_triton
CHECKS = (
    "hostile_residuals other_dtypes magnitudes_of_float64 survivors_hidden_behind_a_lane levels_and_sizes"
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
variants = {}
for launch in launches:
    variants.setdefault(launch.name, set()).add(id(launch.compiled))
for name in ("_residual_quantize_kernel", "_residual_quantize_backward_kernel", "_losses_kernel"):
    print(name, len(variants[name]))
"""


def test_under_the_checking_layer():
    lines = run("interpreted_residual.py")
    assert [line.split()[2].rstrip(":") for line in lines] == CHECKS


def test_one_kernel_for_every_length_level_count_and_mix_of_sizes():
    out = subprocess.run([sys.executable, "-c", ONE_KERNEL], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    lines = [line.split() for line in out.stdout.splitlines()]
    assert len(lines) == 3 and all(count == "1" for _, count in lines), lines


@pytest.mark.parametrize("features, message", [(1 << 16, None), ((1 << 16) + 1, "at most 65536")])
def test_too_many_features_are_refused(features, message):
    import torch
    from vqkernels.triton_kernels.residual_quantize import residual_quantize

    z, book = torch.zeros(1, 0, features), torch.zeros(1, 1, features)
    if message is None:
        assert residual_quantize(z, [book], None, 0)[0].shape == (1, 0, 1)
    else:
        with pytest.raises(ValueError, match=message):
            residual_quantize(z, [book], None, 0)
