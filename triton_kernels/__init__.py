"""Triton kernels, installed as ``vqkernels.triton_kernels``. One file per op: kernel above, launcher below."""


def register(lib) -> None:
    """Registers the ``.triton`` overloads (called once by vqkernels.registry where Triton can run)."""
