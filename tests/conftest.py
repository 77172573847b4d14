"""Every test runs with fresh memory poisoned with NaN and a fixed seed."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory_and_seed():
    """torch.empty, also inside our C++ bindings, returns NaN (floats) or the largest value (integers): a kernel that
    forgets to write an
    output cannot pass by luck."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


_workers = []  # what the processes of pytest-xdist compared


def _compared():
    """What this process's differential tests compared, and what its tests of Triton kernels under check printed."""
    pairs = sys.modules.get("layer_pairs")
    printed = [getattr(sys.modules.get(name), "printed", ()) for name in ("test_triton", "test_ptx_kernels")]
    return {"pairs": vars(pairs.record) if pairs else None, "lines": [line for lines in printed for line in lines]}


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        compared = _compared()
        if compared["pairs"]:
            compared["pairs"] = compared["pairs"] | {"configurations": sorted(compared["pairs"]["configurations"])}
        session.config.workeroutput["compared"] = compared


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _workers.append(getattr(node, "workeroutput", {}).get("compared", {"pairs": None, "lines": []}))


def pytest_terminal_summary(terminalreporter):
    everyone = [*_workers, _compared()]
    found = [c["pairs"] for c in everyone if c["pairs"] and c["pairs"]["comparisons"]]
    if found:
        from layer_pairs import Record

        record = Record()
        record.configurations = set().union(*(pairs["configurations"] for pairs in found))
        record.comparisons = sum(pairs["comparisons"] for pairs in found)
        record.largest, record.where = max((pairs["largest"], pairs["where"]) for pairs in found)
        terminalreporter.write_line(record.summary())
    for compared in everyone:
        for line in compared["lines"]:
            terminalreporter.write_line(line)
