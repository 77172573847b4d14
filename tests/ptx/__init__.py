"""The Triton kernels' own PTX, run on CPU tensors: an emulator of NVIDIA's virtual instruction set in numpy.

    with emulated("sm_80") as launches:
        codebook_usage(indices, 1024)        # an ordinary launcher; its result is there afterwards

Triton's JIT compiles as for that chip, with its specialisation, and the emulator executes what it made: mma.sync on
sm_80, wgmma on sm_90. It reports, with kernel, instruction and address: accesses out of bounds or misaligned, reads of
shared memory that nothing wrote, barriers and warp instructions that not all threads reach; with ``racecheck`` also
unordered accesses, with the warps in random order. The same emulator runs what nvcc makes of csrc/cuda (run_ptx).

Not covered: TMA, mbarrier, clusters, tcgen05, 8-bit and integer tensor cores; what ptxas does afterwards; time.

    values      types, roundings            integers, floats   arithmetic       launch   arguments, entry
    parse       text -> instructions        warps              shfl, ldmatrix   races    who touched which byte
    machine     registers, scheduling       tensor             mma, wgmma
    memory      ld, st, checks              transfers          atomics, cp.async
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton

from .launch import Launch, operations, run_ptx
from .values import PtxError

__all__ = ["Launch", "PtxError", "emulated", "operations", "run_ptx"]


def _without_ptxas(*stage):
    """Triton's hook into its compiler: the machine code is not needed, and it takes most of the time."""
    if not stage:
        return "ptx only", "ptx only"
    stages = stage[1]
    stages["cubin"] = lambda source, metadata: b""


@contextmanager
def emulated(target: str, racecheck: bool = False, seed: int = 0) -> Iterator[list[Launch]]:
    """Inside, launches of @triton.jit kernels on CPU tensors run on the emulator as "sm_80" or "sm_90" code would.
    Yields the list of launches; their configs come from the default table. See run_ptx for racecheck and seed."""
    from vqkernels.triton_kernels import offline, tuning

    launches: list[Launch] = []

    def execute(launch) -> None:
        arguments = {k: v for k, v in launch.arguments.items() if launch.signature[k] != "constexpr"}
        metadata = launch.compiled.metadata
        if metadata.num_ctas != 1:
            raise PtxError(f"{launch.name}: clusters are not emulated")
        if metadata.global_scratch_size:
            size = metadata.global_scratch_size * launch.grid[0] * launch.grid[1] * launch.grid[2]
            arguments["global scratch"] = torch.empty(size, dtype=torch.uint8)
        threads = 32 * metadata.num_warps
        launches.append(
            run_ptx(
                launch.compiled.asm["ptx"], None, launch.grid, (threads,), arguments,
                shared=metadata.shared, racecheck=racecheck, seed=seed,
            )
        )  # fmt: skip

    knobs = triton.knobs
    before = knobs.runtime.add_stages_inspection_hook, knobs.compilation.disable_line_info
    # line information would double the time to compile
    knobs.runtime.add_stages_inspection_hook, knobs.compilation.disable_line_info = _without_ptxas, True
    try:
        with tuning.using({}), offline.compiled_for(target, execute):
            yield launches
    finally:
        knobs.runtime.add_stages_inspection_hook, knobs.compilation.disable_line_info = before
