"""The operator namespace and the compiled library: the only place that knows either.

Schemas are defined by :mod:`vqkernels.registry`; the C++ library only registers implementations, so it is
loaded after them.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import torch

NAMESPACE = "vqkernels"
library = torch.library.Library(NAMESPACE, "DEF")
ops = getattr(torch.ops, NAMESPACE)

_PACKAGE = Path(__file__).parent

# Triton chooses the interpreter when its kernels are defined, so a later change of the variable means nothing.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def build_info() -> dict:
    """What setup.py recorded about the build (compiler, CUDA architectures or why not); empty when never built."""
    path = _PACKAGE / "_build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def load() -> str | None:
    """Loads the compiled kernels. Returns None, or the reason there are none."""
    binaries = sorted(_PACKAGE.glob("_C*.so")) + sorted(_PACKAGE.glob("_C*.pyd"))
    if not binaries:
        return build_info().get("cpu_reason") or (
            "the C++ kernels were not built; install a C++ compiler and run: pip install --no-build-isolation -e ."
        )
    try:
        torch.ops.load_library(str(binaries[0]))
    except OSError as error:
        return f"{binaries[0].name} does not load with torch {torch.__version__}: {error}"
    return None


def triton_reason() -> str | None:
    """None where the Triton kernels can run on this machine, else why they cannot."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if torch.cuda.is_available() or INTERPRETED:
        return None
    return (
        f"no CUDA device for torch {torch.__version__}; for tests, TRITON_INTERPRET=1, set before Python starts, runs"
        " the kernels on CPU tensors in Triton's interpreter"
    )
