"""nearest_codeword in Triton, stage by stage and in every arithmetic: in the interpreter (interpreted_search.py, a
process of its own because the interpreter is chosen at import) and its PTX on the emulator."""

import importlib.util

import pytest
import torch
from triton_scripts import interpreted

from vqkernels import verify
from vqkernels.registry import SPECS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
printed: list[str] = []  # conftest writes it at the end of the run


CHECKS = (
    "hostile_rows_in_every_arithmetic edges sixteen_bit_inputs every_plan order_of_programs many_features"
    " every_codeword_equal_or_unusable ties_but_for_rounding scan most_rows_are_decided fast bound_holds bound_in_python"
).split()


def test_search_in_the_interpreter():
    printed.extend(interpreted("interpreted_search.py", CHECKS))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("arithmetic", ["fma", "ieee", "tf32", "bf16", "fp16", "gemm"])
def test_ptx(monkeypatch, target, arithmetic):
    """Rows between two codewords, on one, at zero, far larger and smaller than all, without a number. Of masked rows
    under the cosine and plain rows under l2, one target gets these and the other those."""
    from ptx import emulated
    from vqkernels.triton_kernels import nearest_codeword as module
    from vqkernels.triton_kernels import search, tuning

    g = torch.Generator().manual_seed(0)
    z, c = torch.randn(1, 24, 20, generator=g), torch.randn(1, 40, 20, generator=g)
    c[0, 20:24] = c[0, 2:6]
    z[0, :6] = (c[0, 7:13] + c[0, 13:19]) / 2
    z[0, 6], z[0, 7] = c[0, 3], 0
    z[0, 8] *= 1e30
    z[0, 9] *= 1e-30
    z[0, 10, 3], c[0, 30, 0] = torch.nan, torch.inf
    name = "tf32" if arithmetic == "gemm" else arithmetic
    row = {"ROWS": 64, "CODES": 32, "FEATURES": 32, "GEMM": int(arithmetic == "gemm"), "num_warps": 4, "num_stages": 2}
    row["ARITHMETIC"] = search.ARITHMETICS.index(name)
    monkeypatch.setattr(module, "SCAN_WORK", 0)  # small inputs go through all stages
    spec = SPECS["nearest_codeword"]
    plain = (target == "sm_80") == (arithmetic in ("fma", "tf32", "fp16"))
    args = (z, c, None, 0, True) if plain else (z, c, torch.arange(24)[None] != 5, 1, True)
    with emulated(target), tuning.using({spec.name: {"*": row}}):
        got = module.nearest_codeword(*args)
    for g, w in zip(got, spec.reference(*args), strict=True):
        assert verify._first_difference(g, w) is None


def test_canonical_sums_are_not_fused():
    from vqkernels.triton_kernels.nearest_codeword import nearest_codeword
    from vqkernels.triton_kernels.offline import compiled_for

    with compiled_for("sm_80") as launches:
        for dtype in (torch.float32, torch.float64):
            nearest_codeword(torch.zeros(1, 128, 64, dtype=dtype), torch.zeros(1, 64, 64, dtype=dtype), None, 0, True)
    canonical = {launch.name: launch.compiled.asm["ptx"] for launch in launches}
    for name in ("_select_kernel", "_compare_kernel", "_scan_kernel"):
        assert "mul" in canonical[name] and "fma.rn.f64" not in canonical[name], name
