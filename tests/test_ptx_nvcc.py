"""The CUDA kernels as nvcc translates them, on the PTX emulator, against the reference: launched by the launchers of csrc/cuda
themselves, every kernel and every template instance at least once, one instance of each with the race check."""

import re
from functools import cache

import cuda_harness
import pytest

pytest.importorskip("triton", reason="triton is not installed")
if reason := cuda_harness.missing():
    pytest.skip(reason, allow_module_level=True)

import cuda_ptx
from ptx import PtxError
from test_cuda import BUGS, planted, short, verdict

CUDA = cuda_harness.ROOT / "csrc/cuda"
printed: list[str] = []


@cache
def library(name, folder=CUDA):
    assert cuda_harness.build([(name, "plain")], kernels=folder) == ""
    return cuda_ptx.Library(name, folder / f"{name}.cu")


@pytest.mark.parametrize("name", cuda_harness.programs())
def test_kernels(name):
    chosen = cuda_ptx.few_cases(library(name), cuda_harness.cases_of(name, "ptx"))
    launches, checked, instances = 0, set(), set()
    for case in chosen:
        kernels = {kernel.split("<")[0] for kernel in library(name).call(case, execute=False)[2]}
        wrong, outputs, launched = library(name).call(case, racecheck=not checked.issuperset(kernels))
        checked |= kernels
        detail = wrong or cuda_harness.judge(case, outputs)[0]
        assert detail == "", f"{case.label}, seed {case.seed}: {detail}"
        launches += len(launched)
        instances.update(launched)
    left = set(library(name).entries) - instances
    assert not left, f"no case launches {sorted(left)}: add one to tests/cuda_cases.py"
    printed.append(f"{name:27} nvcc's PTX for {cuda_ptx.TARGET}  {len(chosen):3} cases {launches:4} launches")


# what is planted: what the emulator says
FOUND = {
    "nothing": "",
    "no barrier before a tile is filled again": "race",
    "rows beyond the end are read": "out of bounds",
    "index beyond a row of shared memory": "out of bounds|race",
    "return before a shuffle of all lanes": "warp divergence",
    "no barrier before the next copy into a stage": "race|uninitialised",
    "rows of a stage are misaligned": "misaligned",
    "waits for one group of copies too few": "uninitialised|wrong result|race",
    "no barrier after bins are set to zero": "race|uninitialised",
    "bins in shared memory without atomics": "race",
    "counts in global memory without atomics": "race",
    "barriers in two branches": "barrier divergence",
    "more shared memory than a block may have": "the device has .* left",
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs(name):
    case = planted(list(BUGS).index(name))
    case.runs = 1
    try:
        wrong, outputs, _ = library("planted", cuda_harness.SOURCES).call(case, racecheck=True)
        said = verdict(case, wrong, outputs)
    except PtxError as error:
        said = str(error)
    printed.append(f"{name:46}{short(said):24} (nvcc's PTX)")
    assert re.search(FOUND[name] or "^$", said), said or "nothing was found"
