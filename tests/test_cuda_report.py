"""The CUDA kernels as compiled: the gate, and that it would see a regression."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed, whose tools read the machine code")

from vqkernels import cuda_report
from vqkernels.cuda_report import Plan, faults, read

ROOT = Path(__file__).parents[1]
INFO = json.loads((ROOT / "vqkernels/_build_info.json").read_text())


@pytest.fixture(scope="module")
def rows():
    if not INFO["cuda"]:
        pytest.skip(f"no CUDA kernels were built: {INFO['cuda_reason']}")
    return read(cuda_report.library())


def test_no_kernel_has_a_fault(rows):
    assert not (found := faults(rows, cuda_report.PLANS)), "\n".join(found)


def test_every_file_was_read_for_every_architecture(rows):
    built = {"sm_" + arch.replace(".", "").split("+")[0].rstrip("a") for arch in INFO["cuda_archs"]}
    files = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert {(row.target, row.file) for row in rows} == {(target, file) for target in built for file in files}


def test_tiles_are_those_of_the_kernels():
    table = (ROOT / "csrc/cuda/tiles.cuh").read_text().split("kTiles[] = {")[1].split("};")[0]
    rows = {int(row[0]): (int(row[2]), int(row[3])) for row in re.findall(r"\{(\d+), (\d+), (\d+), (\d+)\}", table)}
    assert len(rows) == table.count("{")
    for target, tiles in cuda_report.TILES.items():
        assert rows[max(first for first in rows if first <= int(target[3:]))] == tiles, target


# Planted regressions: each must be the fault that is reported.

PLANTED = {
    "spill": (
        "__launch_bounds__(1024, 2) kernel(const float4* x, float4* y) {"
        " float4 v[24]; for (int i = 0; i < 24; ++i) v[i] = x[threadIdx.x + 1024 * i];"
        " __syncthreads(); float s = 0; for (int i = 0; i < 24; ++i) s += v[i].x * v[i].w;"
        " for (int i = 0; i < 24; ++i) y[threadIdx.x + 1024 * i] = make_float4(v[i].x + s, v[i].y, v[i].z, v[i].w * s); }"
    ),
    "stack": (
        "__launch_bounds__(128) kernel(const float4* x, float4* y) {"
        " float v[16]; int n = x[0].y; for (int i = 0; i < n; ++i) v[i % 16] = x[i].x;"
        " y[threadIdx.x] = make_float4(v[threadIdx.x % 16], 0, 0, 0); }"
    ),
    "registers": (
        "__launch_bounds__(128) kernel(const float4* x, float4* y) {"
        " float4 v[24]; for (int i = 0; i < 24; ++i) v[i] = x[threadIdx.x + 128 * i];"
        " __syncthreads(); for (int i = 0; i < 24; ++i) y[threadIdx.x + 128 * i] = v[23 - i]; }"
    ),
    "narrow": "__launch_bounds__(128) kernel(const float* x, float* y) { y[threadIdx.x] = x[3 * threadIdx.x]; }",
    "bounds": "kernel(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }",
    "fence": (
        "__launch_bounds__(128) kernel(const float4* x, float4* y) {"
        " y[threadIdx.x] = x[threadIdx.x]; __threadfence(); y[threadIdx.x + 128] = x[threadIdx.x + 128]; }"
    ),
    "shared": (
        "__launch_bounds__(128) kernel(const float4* x, float4* y) {"
        " __shared__ float4 t[64]; t[threadIdx.x % 64] = x[threadIdx.x]; __syncthreads(); y[threadIdx.x] = t[0]; }"
    ),
    "sound": "__launch_bounds__(128) kernel(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }",
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(name, plan) -> the faults of that kernel"""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: the planted kernels cannot be compiled")
    folder = tmp_path_factory.mktemp("planted")
    for name, code in PLANTED.items():
        (folder / f"{name}.cu").write_text(
            f"namespace {{ __global__ void {code} }}\nvoid* use() {{ return (void*)kernel; }}"
        )
    processes = [
        subprocess.Popen(
            ["nvcc", "-std=c++17", "-arch=sm_80", "-cubin", "-o", folder / f"{name}.cubin", folder / f"{name}.cu"]
        )
        for name in PLANTED
    ]
    assert [process.wait() for process in processes] == [0] * len(processes)

    def look(name, **plan):
        plans = (Plan(name, "kernel", **({"registers": 90} | plan)),)
        return faults(read(folder / f"{name}.cubin", plans), plans)

    return look


@pytest.mark.parametrize(
    ("name", "plan", "words"),
    [
        ("spill", {}, ["accesses to local memory", "a stack frame of"]),
        ("stack", {"load": 32}, ["accesses to local memory", "a stack frame of"]),
        ("registers", {}, ["registers, planned are at most 90"]),
        ("narrow", {}, ["global loads of 32 bits, planned are 128"]),
        ("bounds", {}, ["no launch bounds"]),
        ("fence", {}, ["device-wide fences"]),
        ("fence", {"fences": True}, []),
        ("shared", {"shared": 163 << 10}, ["167936 bytes of shared memory, the chip has 166912 for a block"]),
        ("shared", {"shared": 162 << 10}, []),
        ("shared", {"most": 163 << 10}, ["167936 bytes of shared memory, the chip has 166912 for a block"]),
        ("sound", {"loops": ("HMMA",)}, ["no HMMA in any loop"]),
        ("sound", {}, []),
    ],
)
def test_a_planted_fault_is_seen(planted, name, plan, words):
    found = planted(name, **plan)
    assert len(found) == len(words) and all(word in fault for word, fault in zip(words, found)), found


def test_a_kernel_without_a_plan_and_a_plan_without_a_kernel_are_seen(rows):
    found = faults([replace(rows[0], plan=None)], [Plan("fsq", "gone_kernel", registers=1)])
    assert "no entry in vqkernels.cuda_report.PLANS" in found[0] and "no kernel is called gone_kernel" in found[1]


@pytest.mark.parametrize("loop", [True, False])
def test_instructions_in_loops_are_told_from_others(rows, loop):
    usage = next(row for row in rows if row.file == "codebook_usage")
    wanted = "LDG" if loop else "EXIT"
    plan = Plan("codebook_usage", "", registers=255, load=0, loops=(wanted,))
    found = faults([replace(usage, plan=plan)])
    assert (f"no {wanted} in any loop" in " ".join(found)) != loop


def test_the_document(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cuda_report, "read", lambda path: rows)
    out = tmp_path / "docs" / "report.md"
    assert cuda_report.main(["--out", str(out)]) == 0, capsys.readouterr().err
    text = out.read_text()
    assert "| `backward_kernel<float, 4, 1>` | 256 |" in text and "No faults." in text


def test_the_committed_document_knows_every_kernel(rows):
    text = (ROOT / "docs/cuda-report.md").read_text()
    missing = {row.kernel for row in rows if f"| `{row.kernel}` |" not in text}
    assert not missing, f"{sorted(missing)}; run: python -m vqkernels.cuda_report --out docs/cuda-report.md"
    assert "No faults." in text and "sm_80 / sm_90 / sm_100 / sm_120" in text


def test_without_cuda_kernels_it_says_why(monkeypatch, capsys):
    monkeypatch.setattr(cuda_report._ops, "build_info", lambda: {"cuda": False, "cuda_reason": "nvcc was not found"})
    assert cuda_report.main([]) == 2
    assert "the installed library has no CUDA kernels: nvcc was not found" in capsys.readouterr().err
