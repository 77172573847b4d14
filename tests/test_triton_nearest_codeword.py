"""nearest_codeword in Triton, stage by stage: the checks are in interpreted_search.py, in a process of their own because
the interpreter is chosen at import."""

import importlib.util

import pytest
from test_triton import run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_search_in_the_interpreter():
    lines = run("interpreted_search.py")
    assert len(lines) == 11 and all(": ok," in line for line in lines), lines
