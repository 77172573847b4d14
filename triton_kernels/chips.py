"""What the chips of the report allow, how many blocks fit on one of their processors, and the time no launch can beat.

Limits: CUDA programming guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 instruction set guide and
LLVM's AMDGPU backend. Peaks: the makers' data sheets, dense, without sparsity; tensor rates with float32 accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """``shared_*`` in bytes; NVIDIA keeps 1 KB of each block's share for itself. Peaks in TFLOP/s and GB/s."""

    card: str  # whose data sheet the peaks are from
    processors: int
    warp: int
    warps: int  # resident on one processor, at most
    blocks: int
    shared_processor: int
    shared_block: int
    registers: int  # a lane: the most that one thread may hold
    bandwidth: float
    fp32: float
    fp64: float
    tf32: float
    half: float  # bfloat16 and float16


CHIPS = {
    "sm_80": Chip("A100 SXM 80 GB", 108, 32, 64, 32, 164 << 10, 163 << 10, 255, 2039, 19.5, 9.7, 156, 312),
    "sm_89": Chip("RTX 4090", 128, 32, 48, 24, 100 << 10, 99 << 10, 255, 1008, 82.6, 1.29, 82.6, 165.2),
    "sm_90": Chip("H100 SXM", 132, 32, 64, 32, 228 << 10, 227 << 10, 255, 3350, 67, 34, 494.7, 989.4),
    "sm_100": Chip("B200", 148, 32, 64, 32, 228 << 10, 227 << 10, 255, 8000, 80, 40, 1125, 2250),
    "sm_120": Chip("RTX 5090", 170, 32, 48, 24, 100 << 10, 99 << 10, 255, 1792, 104.8, 1.64, 104.8, 209.5),
    "gfx942": Chip("MI300X", 304, 64, 32, 32, 64 << 10, 64 << 10, 512, 5300, 163.4, 81.7, 653.7, 1307.4),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks on one processor, the share of its warps that they fill, and what there is no more of."""

    blocks: int
    share: float
    limit: str


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def occupancy(target: str, registers: int, shared: int, warps: int) -> Occupancy:
    """For blocks of ``warps`` warps with ``registers`` a lane and ``shared`` bytes, static and dynamic together.

    NVIDIA: a processor has four partitions of 16384 registers; a warp takes its registers in steps of 256 from one
    of them. Shared memory goes in steps of 128 bytes, 1 KB a block on top.
    AMD: a compute unit has four SIMDs with 512 vector registers a lane, in steps of 8, and 8 wavefronts; local memory
    goes in steps of 512 bytes. Scalar registers never limit CDNA 3.
    """
    chip = CHIPS[target]
    if target.startswith("sm_"):
        warps_of_registers = 4 * (16384 // _up(max(registers, 1) * 32, 256))
        taken = _up(shared + 1024, 128)
    else:
        warps_of_registers = 4 * (512 // _up(max(registers, 1), 8))
        taken = _up(shared, 512)
    limits = {
        "warps": chip.warps // warps,
        "blocks": chip.blocks,
        "registers": warps_of_registers // warps,
        "shared memory": chip.shared_processor // taken if taken else chip.blocks,
    }
    limit = min(limits, key=limits.get)
    return Occupancy(limits[limit], limits[limit] * warps / chip.warps, limit)


def roofline(target: str, flops: float, bytes_: float, arithmetic: str) -> tuple[float, str]:
    """Microseconds below which no launch can be on this chip, and what sets them: "memory", or ``arithmetic``, one of
    "fp32", "fp64", "tf32", "half". A model from data-sheet peaks, not a measurement."""
    chip = CHIPS[target]
    times = {"memory": bytes_ / chip.bandwidth * 1e-3, arithmetic: flops / getattr(chip, arithmetic) * 1e-6}
    bound = max(times, key=times.get)
    return times[bound], bound
