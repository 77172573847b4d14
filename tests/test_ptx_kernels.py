"""Every Triton operator x dtype x chip on the PTX emulator: the JIT's own code for sm_80 (mma.sync) and sm_90 (wgmma)
gives what the registry's specification says. The registry drives it: a new operator joins by itself."""

import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from ptx import matrix

WORKERS = 2


@pytest.fixture(scope="module")
def results(request):
    """{row: future}: the rows of the tests that were asked for, in worker processes, the long ones first."""
    asked = [item for item in request.session.items if item.name.startswith("test_kernels[")]
    rows = {item.callspec.params["row"] for item in asked if item.fspath == request.fspath}
    order = [row for row in matrix.rows() if row in rows]
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("TRITON_INTERPRET", raising=False)
        with ProcessPoolExecutor(min(WORKERS, os.cpu_count() or 1), context) as pool:
            yield {row: pool.submit(matrix.check, *row) for row in order}
            pool.shutdown(cancel_futures=True)


printed: list[str] = []


@pytest.mark.parametrize("row", matrix.rows(), ids=lambda row: "-".join(row))
def test_kernels(row, results):
    result = results[row].result()
    printed.append(str(result))
    assert not result.wrong, "\n".join(result.wrong)
    assert result.cases > 2 and result.launches > 1


def test_every_operator_that_is_compiled_for_triton_is_here():
    from vqkernels.registry import SPECS

    assert {op for op, _, _ in matrix.rows()} == {s.name for s in SPECS.values() if "triton" in s.compiled}
