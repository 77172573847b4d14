"""The operators under pytest-benchmark, for comparing two commits on one machine:

python -m pytest bench --benchmark-save=before        # then, on the other commit
python -m pytest bench --benchmark-compare
"""

import pytest
import torch

from vqkernels.bench import ops

CASES = [(name, shape) for name in ops.ROWS for shape in ops.SHAPES[name]]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_speed(benchmark, name, shape):
    torch.manual_seed(0)
    row = next(ops.ROWS[name](shapes=(shape,)))
    call = row.contenders["vqkernels"]()
    assert not row.gate(call())
    benchmark(call)
