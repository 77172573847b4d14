"""The machine that runs a kernel: registers, masks, program counters and the order in which warps advance.

Several blocks run at once. A register is one numpy array with an element for every thread of all of them, so an
instruction costs a few numpy calls however many threads execute it; ``mask`` says which do. Threads of a group (all
warps, or with ``warp_order`` one warp of each block at a time) advance from the lowest program counter, so diverged
threads meet again where their paths join.

An instruction is compiled once into ``run(t, mask)``; the builders stand in the other modules and register themselves
with ``@operation("name", ...)``.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from .parse import Instruction, Kernel, operands_of
from .values import RAW, PtxError, kind

BUILDERS: dict[str, Callable] = {}
SPECIAL = {"%tid": 0, "%ntid": 1, "%ctaid": 2, "%nctaid": 3}
SHARED_WINDOW = 1 << 60  # generic addresses of shared and local memory
LOCAL_WINDOW = 1 << 61
BATCH = 2048  # threads run at once
_NOT_WAITING, _AT_BARRIER, _AT_WARPGROUP = 0, 1, 2


def operation(*names: str):
    """Registers ``build(c, i) -> run(t, mask)`` for every instruction whose first word is one of ``names``."""

    def add(build):
        for name in names:
            BUILDERS[name] = build
        return build

    return add


class Program:
    """A kernel whose instructions are compiled. ``c`` in the builders: it makes readers and writers of operands."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.read_registers = {
            name
            for i in kernel.instructions
            for operand in ((i.operands if i.parts[0] in ("st", "red") else i.operands[1:]) + (i.predicate or "",))
            for name in operands_of(operand.strip("![]").replace("+", ",").replace("!", ""))
        }
        offset = 0
        self.param_offsets: dict[str, int] = {}
        for name, type_, size in kernel.params:
            align = kind(type_)[0] if kind(type_)[0] == size else 16  # a struct has the alignment of its members
            offset = (offset + align - 1) // align * align
            self.param_offsets[name] = offset
            offset += size
        self.param_size = offset
        self.constant_addresses: dict[str, int] = {}  # filled at the launch, before anything is compiled
        self.code: list[tuple[Callable, bool]] = []

    def compile(self) -> None:
        self.code = [self._compile(i) for i in self.kernel.instructions]

    def _compile(self, i: Instruction) -> tuple[Callable, bool]:
        """-> (run, whether it changes the program counter)"""
        word = i.parts[0]
        control = word in ("bra", "ret", "exit", "bar", "barrier", "wgmma", "trap", "call")
        build = BUILDERS.get(word)
        if build is None:
            raise PtxError(f"{self.kernel.name}: no such instruction in the emulator: {i.text} (PTX line {i.line})")
        try:
            run = build(self, i)
        except (PtxError, KeyError, ValueError, IndexError, StopIteration) as error:
            raise PtxError(
                f"{self.kernel.name}: not supported: {i.text} (PTX line {i.line}): {type(error).__name__} {error}"
            ) from error
        if i.predicate is None:
            return run, control
        test, wanted = self.source(i.predicate, "pred"), not i.negated

        def guarded(t, mask):
            active = mask & (test(t) if wanted else ~test(t))
            count = np.count_nonzero(active)
            if count:
                run(t, t.everyone if count == t.n else active)

        return guarded, control

    # ------------------------------------------------------------------------------------------------------ operands
    def source(self, operand: str, type_: str) -> Callable:
        """A reader t -> array of type ``type_``, one element a thread."""
        size, dtype = kind(type_)
        raw = np.dtype(RAW[size])
        if operand.startswith("!"):
            positive = self.source(operand[1:], "pred")
            return lambda t: ~positive(t)
        if self.kernel.register_type(operand):

            def read(t):
                value = t.registers.get(operand)
                if value is None:
                    value = t.undefined(operand)
                if value.dtype is dtype:
                    return value
                if value.dtype.itemsize == size:
                    return value.view(dtype)
                return value.view(RAW[value.dtype.itemsize]).astype(raw).view(dtype)

            return read
        base, _, axis = operand.partition(".")
        if base in SPECIAL or operand in ("%laneid", "%warpid", "%clock", "%clock64", "%globaltimer"):
            return lambda t: t.special(base, axis).astype(raw).view(dtype)
        number = self._number(operand)
        if type_ == "pred":
            return lambda t: t.constant(bool(number), dtype)
        value = np.array(number % (1 << 8 * size), raw).view(dtype)[()]
        return lambda t: t.constant(value, dtype)

    def _number(self, operand: str) -> int:
        for table in (self.kernel.shared, self.kernel.local, self.constant_addresses, self.param_offsets):
            if operand in table:
                return table[operand]
        if operand[:2] in ("0f", "0F", "0d", "0D"):
            return int(operand[2:], 16)
        if operand == "WARP_SZ":
            return 32
        return int(operand.rstrip("U"), 0)

    def target(self, operand: str, type_: str) -> Callable:
        """A writer (t, value, mask); a value narrower than its register is extended by its own sign."""
        if operand == "_":
            return lambda t, value, mask: None
        declared = self.kernel.register_type(operand)
        if declared is None:
            raise PtxError(f"{operand} is not a register")
        size = kind(declared)[0]

        def write(t, value, mask):
            if value.dtype.itemsize < size and declared != "pred":
                value = value.astype({"i": f"i{size}"}.get(value.dtype.kind, RAW[size]))
            if mask is not t.everyone:
                old = t.registers.get(operand)
                if old is None:
                    old = t.undefined(operand)
                if old.dtype is not value.dtype:
                    old = old.view(value.dtype)
                value = np.where(mask, value, old)
            t.registers[operand] = value

        return write

    def address(self, operand: str) -> Callable:
        """A reader of ``[register + offset]`` or ``[symbol + offset]`` as int64."""
        base, _, offset = operand.strip("[] ").partition("+")
        base, shift = base.strip(), int(offset.strip() or "0", 0)
        if base in self.param_offsets:
            return lambda t: t.constant(self.param_offsets[base] + shift, np.dtype(np.int64))
        if not self.kernel.register_type(base):
            number = self._number(base) + shift
            return lambda t: t.constant(number, np.dtype(np.int64))

        def read(t):
            value = t.registers.get(base)
            if value is None:
                value = t.undefined(base)
            if value.dtype.itemsize == 4:  # of shared memory; the sum wraps around
                return (value.view(np.uint32) + np.uint32(shift & 0xFFFFFFFF)).astype(np.int64)
            if value.dtype is not _INT64:
                value = value.view(RAW[value.dtype.itemsize]).astype(np.int64)
            return value + shift if shift else value

        return read


_INT64 = np.dtype(np.int64)


class Threads:
    """A batch of blocks: their registers, memories and program counters. ``t`` in every ``run``."""

    def __init__(self, launch, blocks: list[tuple[int, int, int]], number: int):
        self.launch, self.memory, self.blocks = launch, launch.memory, len(blocks)
        self.threads = threads = launch.threads
        self.n = n = threads * len(blocks)
        self.rng = random.Random(f"{launch.seed} {number}")
        self.registers: dict[str, np.ndarray] = {}
        self.everyone = np.ones(n, bool)
        self.lane = np.arange(n)
        self.block = self.lane // threads
        self.warp = self.lane // 32  # of the batch
        self.warps = n // 32
        self.warps_a_block = threads // 32
        self.first_block = number
        self.pc = np.zeros(n, np.int64)
        self.exited = np.zeros(n, bool)
        self.waiting = np.zeros(n, np.int8)
        self.waits_at = np.zeros(n, np.int64)
        self.reductions: dict = {}  # of barriers, by where they stand
        self.epoch = np.zeros(len(blocks), np.int64)  # barriers passed by each block
        self.copies, self.committed = [], np.zeros(n, np.int64)  # cp.async
        self.products, self.products_committed = [], np.zeros(n, np.int64)  # wgmma
        self._constants: dict = {}
        x, y, _ = launch.block
        thread = self.lane % threads
        self._special = {
            "%tid": (thread % x, thread // x % y, thread // (x * y)),
            "%ntid": launch.block,
            "%ctaid": np.array(blocks).T[:, self.block],
            "%nctaid": launch.grid,
            "%laneid": self.lane % 32,
            "%warpid": thread // 32,
        }
        launch.memory.begin_batch(self)

    def special(self, base: str, axis: str) -> np.ndarray:
        value = self._special.get(base, 0)
        value = value["xyz".index(axis)] if axis else value
        return np.broadcast_to(value, self.n)

    def constant(self, value, dtype) -> np.ndarray:
        key = (value, dtype) if value == value else ("nan", bits_of(value), dtype)
        if value == 0 and dtype.kind == "f":
            key = (bits_of(value), "zero", dtype)
        array = self._constants.get(key)
        if array is None:
            array = self._constants[key] = np.full(self.n, value, dtype)
        return array

    def undefined(self, register: str) -> np.ndarray:
        """A register that nothing has written holds ones in every bit: NaN, or the largest number."""
        type_ = self.launch.program.kernel.register_type(register)
        if type_ == "pred":
            return np.zeros(self.n, bool)
        raw = RAW[kind(type_)[0]]
        return np.full(self.n, np.iinfo(raw).max, raw)

    # ------------------------------------------------------------------------------------------------------ schedule
    def run(self) -> None:
        groups = [self.everyone]
        if self.launch.warp_order:
            warp_in_block = np.stack(
                [self.rng.sample(range(self.warps_a_block), self.warps_a_block) for _ in range(self.blocks)]
            )
            own = warp_in_block[self.block, self.warp % self.warps_a_block]
            groups = [own == w for w in range(self.warps_a_block)]
        while not self.exited.all():
            self.rng.shuffle(groups)
            moved = False
            for group in groups:
                moved |= self._advance(group)
            moved |= self._release_barriers()
            if not moved:
                self._deadlock()

    def _advance(self, group: np.ndarray) -> bool:
        """Runs the threads of a group until all have ended or wait."""
        moved = False
        while True:
            ready = group & ~self.exited & (self.waiting == _NOT_WAITING)
            counters = self.pc[ready]
            if not counters.size:
                return moved
            moved = True
            p = int(counters.min())
            here = ready & (self.pc == p)
            if np.count_nonzero(here) == self.n:
                here = self.everyone
            later = counters[counters > p]
            self._segment(p, here, int(later.min()) if later.size else -1)

    def _segment(self, p: int, mask: np.ndarray, stop: int) -> None:
        """Executes from ``p`` to the next jump, or to ``stop`` where other threads of the group are."""
        code, start = self.launch.program.code, p
        try:
            while True:
                run, control = code[p]
                if control:
                    self.pc[mask] = p + 1
                    self.here = p
                    run(self, mask)
                    break
                run(self, mask)
                p += 1
                if p == stop:
                    self.pc[mask] = p
                    break
        except PtxError as error:
            i = self.launch.program.kernel.instructions[p]
            raise PtxError(f"{self.launch.program.kernel.name}: {i.text} (PTX line {i.line}): {error}") from None
        self.launch.executed += p - start + 1

    def wait_at_barrier(self, mask: np.ndarray, reduction=None) -> None:
        """``reduction``: (function of the block's predicates, how they are read, how the result is written)."""
        self.waiting[mask] = _AT_BARRIER
        self.waits_at[mask] = self.here
        self.reductions[self.here] = reduction

    def gather_warpgroup(self, mask: np.ndarray) -> np.ndarray | None:
        """Waits for all 128 threads of a warpgroup; returns the mask of groups that are complete, if any."""
        here = mask | ((self.waiting == _AT_WARPGROUP) & (self.waits_at == self.here))
        complete = here.reshape(-1, 128).all(1)
        ready = np.repeat(complete, 128) & here
        rest = mask & ~ready
        self.waiting[rest], self.waits_at[rest] = _AT_WARPGROUP, self.here
        self.waiting[ready] = _NOT_WAITING
        if not ready.any():
            return None
        self.pc[ready] = self.here + 1
        return self.everyone if ready.all() else ready

    def _release_barriers(self) -> bool:
        waiting = (self.waiting == _AT_BARRIER).reshape(self.blocks, -1)
        exited = self.exited.reshape(self.blocks, -1)
        done = waiting.any(1) & (waiting | exited).all(1)
        for block in np.flatnonzero(done):
            threads = slice(block * self.threads, (block + 1) * self.threads)
            if exited[block].any():
                self._fault_at(threads, f"barrier divergence: {int(exited[block].sum())} threads have already ended")
            if np.ptp(self.waits_at[threads]):
                self._fault_at(threads, "barrier divergence: threads of one block wait at different barriers")
            if reduction := self.reductions[self.waits_at[threads.start]]:
                how, read, write = reduction
                result = how(read(self)[threads])
                kind_ = bool if isinstance(result, np.bool_) else np.uint32
                write(self, np.full(self.n, result, kind_), self.block == block)
            self.waiting[threads] = _NOT_WAITING
            self.epoch[block] += 1
        return bool(done.any())

    def _deadlock(self) -> None:
        stuck = np.flatnonzero(~self.exited)[:1]
        kind_ = {_AT_BARRIER: "a barrier", _AT_WARPGROUP: "a wgmma instruction"}[int(self.waiting[stuck[0]])]
        self._fault_at(slice(stuck[0], stuck[0] + 1), f"deadlock: threads wait for others at {kind_}")

    def _fault_at(self, threads: slice, message: str) -> None:
        kernel = self.launch.program.kernel
        at = self.waits_at[threads][self.waiting[threads] != _NOT_WAITING]
        i = kernel.instructions[int(at[0])]
        raise PtxError(f"{kernel.name}: {i.text} (PTX line {i.line}): {message}")

    def whole_warps(self, mask: np.ndarray) -> np.ndarray:
        """The warps in the mask, for instructions that need all 32 threads."""
        rows = mask.reshape(-1, 32)
        warps = rows.any(1)
        if not rows[warps].all():
            raise PtxError("warp divergence: the instruction needs all 32 threads of the warp")
        return np.flatnonzero(warps)


def bits_of(value) -> int:
    return int(value.view(RAW[value.dtype.itemsize]))


@operation("bra")
def _branch(c, i):
    def run(t, mask):
        t.pc[mask] = c.kernel.labels[i.operands[0]]

    return run


@operation("ret", "exit")
def _return(c, i):
    def run(t, mask):
        t.exited |= mask

    return run


@operation("trap", "call")
def _trap(c, i):
    def run(t, mask):
        raise PtxError("the kernel stopped itself (assertion or call)")

    return run


@operation("bar", "barrier")
def _barrier(c, i):
    if "warp" in i.parts:
        return lambda t, mask: t.whole_warps(mask)
    if i.parts[1] == "red" and i.operands[1] == "0" and len(i.operands) == 3:
        how = {"or": np.any, "and": np.all, "popc": np.count_nonzero}[i.parts[2]]
        reduction = how, c.source(i.operands[2], "pred"), c.target(i.operands[0], i.parts[-1])
        return lambda t, mask: t.wait_at_barrier(mask, reduction)
    if i.parts[1] not in ("sync", "cta") or i.operands[0] != "0" or len(i.operands) > 1:
        raise PtxError("only bar.sync 0 and bar.red 0 of the whole block")
    return lambda t, mask: t.wait_at_barrier(mask)


@operation("membar", "fence", "griddepcontrol", "nanosleep", "discard", "prefetch", "setmaxnreg")
def _nothing(c, i):
    return lambda t, mask: None
