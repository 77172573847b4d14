"""Triton kernels, installed as ``vqkernels.triton_kernels``. One file per op: kernel above, launcher below."""

import functools
import importlib
import os

import torch


def launcher(name: str):
    """The launcher of an operator has its name and is in the module of that name; a backward is in its forward's."""
    return getattr(importlib.import_module(f".{name.removesuffix('_backward')}", __name__), name)


def on_device(launch):
    """Launches go to the current device: for the call, that is the first argument's."""

    @functools.wraps(launch)
    def run(*args):
        with torch.cuda.device_of(args[0]):
            return launch(*args)

    return run


def register(lib, names) -> None:
    """Registers the ``.triton`` overloads of the operators ``names`` (called once by vqkernels.registry where Triton
    can run)."""
    from .inductor import SEEN_THROUGH, see_through

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for name in names:
        lib.impl(f"{name}.triton", on_device(launcher(name)), "CUDA")
        if interpreted:
            lib.impl(f"{name}.triton", launcher(name), "CPU")
        if name in SEEN_THROUGH and not interpreted:
            see_through(lib, getattr(getattr(torch.ops, lib.ns), name).triton, launcher(name))
