"""Running a kernel: from PTX text and arguments, or in the place of the GPU behind Triton's own JIT."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from . import floats, integers, tensor, transfers, warps  # noqa: F401  they register their instructions
from .machine import BATCH, Program, Threads
from .memory import Memory
from .parse import parse
from .values import PtxError

_programs: dict[tuple[str, str | None], Program] = {}


@dataclass
class Launch:
    """One launch on the emulator and what it says about it afterwards."""

    program: Program
    memory: Memory
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    seed: int = 0
    warp_order: bool = False
    early: bool = False  # background copies and wgmma finish at once instead of as late as they may
    rough: bool = False  # tensor cores round as badly as they may
    executed: int = field(default=0, init=False)  # instructions, each for all the threads that meet in it

    @property
    def threads(self) -> int:
        return int(np.prod(self.block))

    def run(self) -> None:
        if self.threads % 32:
            raise PtxError(f"{self.program.kernel.name}: a block of {self.threads} threads is no whole number of warps")
        blocks = list(np.ndindex(*self.grid[::-1]))
        random.Random(self.seed).shuffle(blocks)
        at_once = max(1, BATCH // self.threads)
        for first in range(0, len(blocks), at_once):
            batch = [block[::-1] for block in blocks[first : first + at_once]]
            with np.errstate(all="ignore"):
                Threads(self, batch, first).run()


def storage_of(x: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of what a tensor spans, from its first element to its last."""
    span = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1 if x.numel() else 0
    return x.data_ptr(), span * x.element_size()


def bytes_at(address: int, size: int) -> np.ndarray:
    import ctypes

    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


def _allocations(tensors: dict[str, torch.Tensor]) -> list[tuple[str, int, np.ndarray]]:
    """Disjoint pieces of memory, one for each tensor or group of tensors that overlap."""
    pieces: list[list] = []
    for name, x in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        start, size = storage_of(x)
        if not size:
            continue
        if pieces and start < pieces[-1][1] + pieces[-1][2]:
            pieces[-1][0] += "/" + name
            pieces[-1][2] = max(pieces[-1][2], start + size - pieces[-1][1])
        else:
            pieces.append([name, start, size])
    return [(name, start, bytes_at(start, size)) for name, start, size in pieces]


def _program(ptx: str, name: str | None) -> Program:
    program = _programs.get((ptx, name))
    if program is None:
        program = Program(parse(ptx, name))
        buffers = {k: np.frombuffer(v, np.uint8).copy() for k, v in program.kernel.constants.items()}
        program.constant_buffers = buffers
        program.constant_addresses = {k: b.ctypes.data for k, b in buffers.items()}
        program.compile()
        _programs[ptx, name] = program
    return program


def run_ptx(
    ptx: str, name: str | None, grid, block, arguments: dict, *, shared: int = 0, racecheck=False, seed=0
) -> Launch:
    """Runs the entry whose name contains ``name``. ``arguments``: tensors and numbers in the order of the parameters;
    those that are missing at the end are 0. Results land in the tensors.

    seed: order of blocks and atomics; odd: background work finishes at once and tensor cores round badly. racecheck:
    finds unordered accesses; warps advance one at a time in random order."""
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    return run_entry(
        ptx, name, grid, block, list(arguments.values()), _allocations(tensors),
        shared=shared, racecheck=racecheck, seed=seed,
    )  # fmt: skip


def run_entry(
    ptx: str, name: str | None, grid, block, values: list, allocations, *, shared: int = 0, static_left: int | None = None,
    racecheck=False, seed=0,
) -> Launch:  # fmt: skip
    """run_ptx for memory that belongs to no tensor: ``allocations`` are (name, address, its bytes as uint8 array), which
    must not overlap; ``values`` may be bytes, as they stand in the parameter. ``static_left``: bytes that the device has
    for static shared memory, beside the ``shared`` dynamic ones."""
    program = _program(ptx, name)
    static = program.kernel.static_shared
    if static_left is not None and static > static_left:
        raise PtxError(
            f"{program.kernel.name} has {static} bytes of static shared memory, the device has {static_left} left"
        )
    allocations = list(allocations)
    allocations += [(k, b.ctypes.data, b) for k, b in program.constant_buffers.items() if b.size]
    if len(values) > len(program.kernel.params):
        raise PtxError(f"{program.kernel.name} takes {len(program.kernel.params)} parameters, given: {len(values)}")
    params = np.zeros(program.param_size + 8, np.uint8)
    for (param, type_, size), value in zip(program.kernel.params, values):
        place = program.param_offsets[param]
        params[place : place + size] = np.frombuffer(_encode(value, type_, size), np.uint8)
    memory = Memory(
        sorted(allocations, key=lambda a: a[1]),
        program.kernel.static_shared + shared,
        program.kernel.local_size,
        params.tobytes(),
        racecheck,
    )
    three = lambda x: (*x, 1, 1, 1)[:3]  # noqa: E731
    odd = seed % 2 == 1
    launch = Launch(program, memory, three(grid), three(block), seed, racecheck, odd, odd)
    launch.run()
    memory.write_back()
    return launch


def _encode(value, type_: str, size: int) -> bytes:
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if isinstance(value, bytes):
        return value.ljust(size, b"\0")
    if value is None:
        value = 0
    if isinstance(value, float):
        return np.array(value, np.float64 if size == 8 else np.float32).tobytes()
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")


def operations(program: Program) -> Counter:
    """How often each instruction stands in the kernel, without its operands."""
    return Counter(i.op for i in program.kernel.instructions)
