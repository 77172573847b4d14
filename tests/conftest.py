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


def pytest_terminal_summary(terminalreporter):
    """What the differential tests and the Triton kernels under check compared, if this run had any."""
    pairs = sys.modules.get("layer_pairs")
    if pairs is not None and pairs.record.comparisons:
        terminalreporter.write_line(pairs.record.summary())
    for module in ("test_triton", "test_ptx_kernels", "test_cuda", "test_ptx_nvcc"):
        for line in getattr(sys.modules.get(module), "printed", ()):
            terminalreporter.write_line(line)
