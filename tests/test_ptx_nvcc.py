"""The CUDA kernels as nvcc translates them, on the PTX emulator, against the reference: the same entries with the same
launch sizes as csrc/cuda's launchers choose."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if shutil.which("nvcc") is None:
    pytest.skip("nvcc is not installed: the CUDA kernels cannot be translated", allow_module_level=True)

from ptx import matrix, run_ptx

from vqkernels import verify
from vqkernels.registry import SPECS

TARGET = "sm_80"
ROOT = Path(__file__).parents[1]
LETTERS = {torch.float32: "f", torch.float64: "d", torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """file name -> PTX text"""
    folder, texts = tmp_path_factory.mktemp("ptx"), {}
    for name in ("rotation_trick", "codebook_usage"):
        out = folder / f"{name}.ptx"
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={TARGET}", f"-I{ROOT / 'csrc/include'}", "-ptx"]
        subprocess.run([*command, "-o", out, ROOT / f"csrc/cuda/{name}.cu"], check=True, capture_output=True)
        texts[name] = out.read_text()
    return texts


@pytest.mark.parametrize("dtype", LETTERS, ids=lambda dtype: str(dtype)[6:])
def test_rotation_trick_backward(dtype, ptx):
    spec = SPECS["rotation_trick_backward"]
    for number, (label, (z, q, grad, estimator)) in enumerate(matrix.chosen(spec, dtype, TARGET)):
        if estimator == 0 or z.numel() == 0:
            continue  # a copy, and nothing
        args = [x.contiguous() for x in (z, q, grad)]
        dz = torch.full_like(args[0], float("nan"))
        N, D = dz.shape
        width = 16 // dz.element_size()
        if D % width or any(x.data_ptr() % 16 for x in (*args, dz)):
            width, kept, pieces = 1, 0, D
        else:
            pieces = D // width
            kept = 1 if pieces <= 32 else 2 if pieces <= 64 else 0
        entry = f"backward_kernelI{LETTERS[dtype]}Li{width}ELi{kept}E"
        names = dict(zip(("z", "q", "grad"), args), dz=dz, N=N, pieces=pieces, estimator=estimator)
        blocks = min(-(-N // 8), 3)  # fewer than the rows need: the loop over rows runs
        run_ptx(ptx["rotation_trick"], entry, (blocks,), (256,), names, racecheck=number == 3, seed=number)
        assert verify.judge(spec, dz, (z, q, grad, estimator))[0] == "", label


def test_codebook_usage(ptx):
    spec = SPECS["codebook_usage"]
    for number, (label, (indices, K)) in enumerate(spec.samples(torch.int64) + spec.edges(torch.int64)):
        S, N = indices.shape
        if N == 0 or N > 5000:
            continue
        counts = torch.zeros(S, K, dtype=torch.int64)
        copies = min((48 << 10) // (4 * K), 8)
        names = {"indices": indices.contiguous(), "counts": counts, "S": S, "N": N, "K": K, "copies": copies}
        for own in {copies, 0}:  # histograms in shared memory, and straight to global memory
            counts.zero_()
            grid, shared = (min(3, -(-N // 256)), S), own * K * 4
            options = {"shared": shared, "racecheck": number == 1, "seed": number}
            run_ptx(ptx["codebook_usage"], "count_kernel", grid, (256,), {**names, "copies": own}, **options)
            assert verify.judge(spec, counts, (indices, K))[0] == "", label
