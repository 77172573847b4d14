"""Triton kernels, installed as ``vqkernels.triton_kernels``. One file per op: kernel above, launcher below."""

import os


def register(lib) -> None:
    """Registers the ``.triton`` overloads (called once by vqkernels.registry where Triton can run)."""
    from .codebook_usage import codebook_usage
    from .rotation_trick import rotation_trick_backward

    devices = ["CUDA", "CPU"] if os.environ.get("TRITON_INTERPRET") == "1" else ["CUDA"]
    for device in devices:
        lib.impl("codebook_usage.triton", codebook_usage, device)
        lib.impl("rotation_trick_backward.triton", rotation_trick_backward, device)
