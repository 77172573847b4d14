"""Triton kernels, installed as ``vqkernels.triton_kernels``. One file per op: kernel above, launcher below."""

import importlib
import os


def launcher(name: str):
    """The launcher of an operator has its name and is in the module of that name; a backward is in its forward's."""
    return getattr(importlib.import_module(f".{name.removesuffix('_backward')}", __name__), name)


def register(lib, names) -> None:
    """Registers the ``.triton`` overloads of the operators ``names`` (called once by vqkernels.registry where Triton
    can run)."""
    devices = ["CUDA", "CPU"] if os.environ.get("TRITON_INTERPRET") == "1" else ["CUDA"]
    for name in names:
        for device in devices:
            lib.impl(f"{name}.triton", launcher(name), device)
