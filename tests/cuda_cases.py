"""Inputs for the emulated CUDA kernels beside the registry's: those that reach every kernel and every branch of a launcher.

{operator: a function of the dtype that returns [(label, args)]}; samples.py has the tools.
"""

from __future__ import annotations

from hostile_search import hostile_search

from vqkernels.samples import _misaligned, _randn


def rotation_trick_backward(dtype):
    """One and two pieces a lane, and rows that are read again; the whole number of pieces and not."""
    width = 16 // dtype.itemsize
    return [
        (f"N{N} D{D} estimator{e}", (*(_randn(N, D, seed=51 + i, dtype=dtype) for i in range(3)), e))
        for N, D, e in ((9, 32 * width, 1), (9, 33 * width, 2), (3, 64 * width, 1), (3, 65 * width, 2), (30, 4096, 1))
    ]


def codebook_usage(dtype):
    from vqkernels.samples import _integers

    return [
        ("more columns than a block counts", (_integers(5, 1, 9000, seed=52, low=-1), 5)),
        ("too many codes for shared memory", (_integers(13000, 1, 900, seed=53, low=-1), 13000)),
        ("misaligned", (_misaligned(_integers(9, 2, 33, seed=54)), 9)),
    ]


CASES = {
    "rotation_trick_backward": rotation_trick_backward,
    "codebook_usage": codebook_usage,
}


def more_cases(op: str, dtype) -> list:
    return CASES.get(op, lambda dtype: [])(dtype) + hostile_search(dtype).get(op, [])
