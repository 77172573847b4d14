"""Every test runs with fresh memory poisoned with NaN and a fixed seed."""

import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory_and_seed():
    """torch.empty, also inside our C++ bindings, returns NaN (floats) or the largest value (integers): a kernel that
    forgets to write an output cannot pass by luck."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_sessionfinish(session):
    """A worker of pytest-xdist hands over what its tests noted, for the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["noted"] = noted()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    from_workers.append(getattr(node, "workeroutput", {}).get("noted", {}))


from_workers: list[dict] = []


def noted() -> dict:
    """In this process: the lines that each test module printed, and what was compared with vector-quantize-pytorch."""
    tests = {name: module for name, module in list(sys.modules.items()) if name.startswith("test_")}
    modules = {name: module.printed for name, module in tests.items() if hasattr(module, "printed")}
    pairs = sys.modules.get("layer_pairs")
    return {"printed": modules, "pairs": pairs.record.state() if pairs else None}


def pytest_terminal_summary(terminalreporter):
    """What the differential tests and the GPU kernels under check compared, if this run had any; how long each file
    of the latter took."""
    notes = [noted(), *from_workers]
    if states := [note["pairs"] for note in notes if note.get("pairs")]:
        from layer_pairs import Record

        if (record := Record.of(states)).comparisons:
            terminalreporter.write_line(record.summary())
    printed: dict[str, list[str]] = {}
    for note in notes:
        for name, lines in note.get("printed", {}).items():
            printed.setdefault(name, []).extend(lines)
    reports = [r for some in terminalreporter.stats.values() for r in some if isinstance(r, pytest.TestReport)]
    totals: dict[str, float] = {}
    for file in sorted({r.nodeid.split("::")[0] for r in reports}):
        module = Path(file).stem
        if not module.startswith(("test_triton", "test_ptx", "test_tuning", "test_cuda")):
            continue
        for line in printed.get(module, ()):
            terminalreporter.write_line(line)
        of_file = [r for r in reports if r.nodeid.startswith(f"{file}::")]
        seconds, passed = sum(r.duration for r in of_file), sum(r.passed and r.when == "call" for r in of_file)
        terminalreporter.write_line(f"{file}: {passed} tests passed in {seconds:.0f} s")
        kernels = "CUDA" if module.startswith("test_cuda") or module == "test_ptx_nvcc" else "Triton"
        totals[kernels] = totals.get(kernels, 0.0) + seconds
    for kernels, seconds in totals.items():
        terminalreporter.write_line(f"{kernels} kernels: {seconds:.0f} s")
