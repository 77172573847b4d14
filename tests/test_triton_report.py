"""The Triton kernels as compiled for six chips: the gate, and that it would see a regression."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from vqkernels.triton_kernels import report, tuning
from vqkernels.triton_kernels.chips import CHIPS, occupancy, roofline
from vqkernels.triton_kernels.machine_code import machine_code
from vqkernels.triton_kernels.offline import TARGETS, compiled_for

from vqkernels.registry import SPECS

ROOT = Path(__file__).parents[1]
FIRST = slice(0, 1)  # the first workload of an operator; the report compiles all


def gate_jobs():
    """Every operator for every chip: the searches in float32 and bfloat16, of the others one dtype after the other, so
    that each dtype comes up on some chip."""
    for i, target in enumerate(TARGETS):
        for j, op in enumerate(report.names()):
            dtypes = SPECS[op].dtypes
            if op in report.SEARCHES:
                for dtype in (torch.float32, torch.bfloat16, *dtypes[1:4:2][i % 2 : i % 2 + 1]):
                    if dtype in (torch.float32, torch.bfloat16) or i < 2:
                        yield target, op, dtype, FIRST
            else:
                yield target, op, dtypes[(i + j) % len(dtypes)], FIRST


@pytest.fixture(scope="module")
def rows():
    start = time.time()
    rows = report.collect(gate_jobs())
    print(f"\n{len(rows)} kernels compiled and read in {time.time() - start:.0f} s")
    return rows


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_has_a_fault(rows, target):
    here = [row for row in rows if row.target == target]
    assert {row.op for row in here} == set(report.names())
    assert not (faults := report.faults(here)), "\n".join(faults)


def test_every_dtype_was_compiled(rows):
    for op in report.names():
        names = {str(dtype).removeprefix("torch.") for dtype in SPECS[op].dtypes}
        assert {row.dtype for row in rows if row.op == op} == names, op


# Planted regressions: each must be the fault that is reported.


def compiled(target, op, dtype=torch.bfloat16):
    return report.faults(report.compile_calls(target, op, dtype, FIRST))


def test_a_tile_that_spills_is_seen():
    table = {"nearest_codeword": {"*": tuning.default()["nearest_codeword"]["*"] | {"ROWS": 128, "CODES": 128}}}
    with tuning.using(table):
        for target, words in (("sm_80", ("spills", "stack frame")), ("gfx942", ("spills",))):
            found = [fault for fault in compiled(target, "nearest_codeword") if "coarse" in fault]
            assert all(any(word in fault for fault in found) for word in words), (target, found)


def test_too_much_shared_memory_is_seen():
    numbers = tuning.default()["nearest_codeword"]["*"] | {"ROWS": 128, "CODES": 32, "FEATURES": 16, "num_stages": 24}
    with tuning.using({"nearest_codeword": {"*": numbers}}):
        assert any("of shared memory, the chip has" in fault for fault in compiled("sm_120", "nearest_codeword"))


def test_a_lost_matrix_instruction_is_seen():
    numbers = tuning.default()["nearest_codeword"]["*"] | {"ARITHMETIC": 1, "ROWS": 64, "CODES": 16, "FEATURES": 16}
    with tuning.using({"nearest_codeword": {"*": numbers}}):
        assert any("no HMMA in any loop" in fault for fault in compiled("sm_80", "nearest_codeword", torch.float32))


@triton.jit
def _fencing_kernel(indices, counts, N, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.load(indices + n, mask=n < N, other=0)
    tl.atomic_add(counts + k, 1, mask=n < N)  # without sem="relaxed"


@triton.jit
def _narrow_kernel(z, out, N, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + n, tl.load(z + 3 * n, mask=n < N), mask=n < N)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_a_fencing_atomic_is_seen(monkeypatch, target):
    def launch(indices, codebook_size):
        _fencing_kernel[(8,)](indices, torch.empty(codebook_size, dtype=torch.int32, device=indices.device), 1000, 128)

    monkeypatch.setattr(report, "launcher", lambda op: launch)
    found = compiled(target, "codebook_usage", torch.int64)
    assert len(found) == 1 and "device-wide fences" in found[0], found


def test_narrow_loads_are_seen(monkeypatch):
    def launch(z, q, grad, estimator):
        _narrow_kernel[(8,)](z, torch.empty_like(z), 1000, 128)

    monkeypatch.setattr(report, "launcher", lambda op: launch)
    found = compiled("sm_80", "rotation_trick_backward")
    assert len(found) == 1 and "allow 128" in found[0], found


# The arithmetic of the report.


CALCULATOR = r"""
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
    int major, minor, regs, threads; long shared, block, processor;
    while (std::scanf("%d %d %d %ld %d %ld %ld", &major, &minor, &regs, &shared, &threads, &block, &processor) == 7) {
        cudaOccDeviceProp p;
        p.computeMajor = major; p.computeMinor = minor; p.maxThreadsPerBlock = 1024; p.warpSize = 32; p.numSms = 1;
        p.maxThreadsPerMultiprocessor = (major == 12 || (major == 8 && minor == 9)) ? 1536 : 2048;
        p.regsPerBlock = p.regsPerMultiprocessor = 65536; p.sharedMemPerBlock = 49152;
        p.sharedMemPerMultiprocessor = processor; p.sharedMemPerBlockOptin = block; p.reservedSharedMemPerBlock = 1024;
        cudaOccFuncAttributes a;
        a.maxThreadsPerBlock = 1024; a.numRegs = regs; a.sharedSizeBytes = 0; a.partitionedGCConfig = PARTITIONED_GC_OFF;
        a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; a.maxDynamicSharedSizeBytes = block; a.numBlockBarriers = 1;
        cudaOccDeviceState s; cudaOccResult r;
        int error = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, shared);
        std::printf("%d\n", error ? -1 : r.activeBlocksPerMultiprocessor);
    }
}
"""


def test_occupancy_is_nvidias(tmp_path):
    """Against the maker's own calculator, a header that triton ships."""
    header = Path(triton.__file__).parent / "backends/nvidia/include/cuda_occupancy.h"
    if not header.is_file() or shutil.which("g++") is None:
        pytest.skip("needs g++ and the cuda_occupancy.h of the triton wheel")
    (tmp_path / "a.cpp").write_text(CALCULATOR)
    subprocess.run(["g++", "-w", "-I", header.parent, "a.cpp", "-o", "a"], cwd=tmp_path, check=True)
    cases = [
        (target, registers, shared, warps)
        for target, chip in CHIPS.items()
        if target.startswith("sm_")
        for registers in (*range(1, 256, 13), 32, 64, 96, 128, 168, 255)
        for shared in (0, 1, 1000, 16384, 33000, 49152, 99 << 10, chip.shared_block)
        for warps in (1, 2, 3, 4, 8, 16, 32)
        if registers * warps * 32 <= 65536
    ]
    lines = "".join(
        f"{int(target[3:]) // 10} {int(target[3:]) % 10} {registers} {shared} {32 * warps}"
        f" {CHIPS[target].shared_block} {CHIPS[target].shared_processor}\n"
        for target, registers, shared, warps in cases
    )
    want = subprocess.run([tmp_path / "a"], input=lines, capture_output=True, text=True, check=True).stdout.split()
    got = [str(occupancy(*case).blocks) for case in cases]
    wrong = [(case, g, w) for case, g, w in zip(cases, got, want) if g != w]
    assert len(want) == len(cases) > 5000 and not wrong, (len(wrong), wrong[:5])


def test_occupancy_of_registers_is_llvms():
    """LLVM writes the wavefronts on a SIMD that an AMD kernel's registers allow."""
    for ops in (("codebook_usage", torch.int64), ("rotation_trick_backward", torch.float64)):
        with compiled_for("gfx942") as launches:
            report.launcher(ops[0])(*report.workloads(*ops, "meta")[0][1])
        for launch in launches:
            waves = int(launch.compiled.asm["amdgcn"].split("; Occupancy: ")[1].split()[0])
            ours = occupancy("gfx942", machine_code(launch.compiled).registers, 0, 4)
            assert ours.blocks == waves, (launch.name, ours, waves)


def test_roofline():
    assert roofline("sm_80", 1e6, 2039e6, "fp32") == (pytest.approx(1000), "memory")
    assert roofline("sm_90", 989.4e9, 1e6, "half") == (pytest.approx(1000), "half")
    assert roofline("sm_89", 1.29e9, 1e3, "fp64") == (pytest.approx(1000), "fp64")


def test_the_driver_is_put_back():
    run, before = triton.runtime.jit.JITFunction.run, triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError), compiled_for("sm_80"):
        assert triton.runtime.driver.active.get_current_target().arch == 80
        _ = 1 / 0
    assert triton.runtime.jit.JITFunction.run is run and triton.runtime.driver._active is before
    with pytest.raises(ValueError, match=r"unknown target 'sm_75'; there are: sm_80"), compiled_for("sm_75"):
        pass


def test_launches_are_what_the_launcher_asked_for():
    seen = []
    indices = torch.zeros(2, 5000, dtype=torch.int64)
    with compiled_for("sm_90", execute=seen.append) as launches:
        report.launcher("codebook_usage")(indices, 100)
    assert launches == seen and len(launches) == 1
    launch = launches[0]
    assert launch.arguments["indices"].data_ptr() == indices.data_ptr() and launch.arguments["N"] == 5000
    assert launch.signature["indices"] == "*i64" and len(launch.grid) == 3
    assert "sm_90" in launch.compiled.asm["ptx"]


def test_the_document(tmp_path):
    out = tmp_path / "docs" / "report.md"
    assert report.main(["--out", str(out), "--op", "codebook_usage", "--target", "sm_80"]) == 0
    text = out.read_text()
    assert "| codebook_usage | int64 |" in text and "No faults." in text and "Nothing here was measured" in text


def test_the_committed_document_knows_every_kernel():
    text = (ROOT / "docs/triton-report.md").read_text()
    missing = [
        f"{op} on {t}"
        for t, part in zip(TARGETS, text.split("\n## sm_")[1:])
        for op in report.names()
        if op not in part
    ]
    assert not missing, f"{missing}; run: python -m vqkernels.triton_kernels.report --out docs/triton-report.md"
    assert "No faults." in text
