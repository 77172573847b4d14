"""Runs Triton kernels in the interpreter as a suspicious GPU would, and reports what they do wrong.

    import triton_check                        # first: before triton, before vqkernels
    with triton_check.checked(seed=0) as seen:
        kernel[grid](x, y, N)                  # or any launcher, on CPU tensors
    same = triton_check.in_any_order(lambda: launcher(x))     # several program orders, bit-equal results

Reported as :class:`KernelError`, with the kernel's line, the program and the argument:

    outside     an unmasked address outside the argument it was computed from; a strided view owns its elements only
    alignment   an address that is no multiple of the element size
    unwritten   a load from torch.empty memory that nothing has written
    duplicate   one store that writes an address twice: which lane wins is unknown
    race        two programs at one byte, one of them writing, or one atomic and one not
    no barrier  a program loads what it stored itself: other lanes may be behind; tl.debug_barrier() orders them
    launch      an option Triton does not know, a grid that CUDA refuses

Programs run in a random order drawn from the seed (None: ascending). The arithmetic is mended by triton_arithmetic.
"""

import contextlib
import ctypes
import sys
from types import SimpleNamespace

import triton_arithmetic as arithmetic
from triton_arithmetic import KernelError

# isort: split
import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

__all__ = ["KernelError", "checked", "in_any_order"]

MANY = -1  # more than one program
OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "launch_cooperative_grid", "warmup"}


class Memory:
    """What is known of one storage, in units of its smallest element: who read, wrote and updated it in this launch."""

    def __init__(self, start: int, size: int, unit: int):
        self.start, self.size, self.unit = start, size, unit
        self.read, self.wrote, self.updated, self.when = (np.zeros(-(-size // unit), np.int32) for _ in range(4))

    def units(self, address, width: int):
        if width < self.unit:  # a pointer was cast to a narrower type
            for name in ("read", "wrote", "updated", "when"):
                setattr(self, name, np.repeat(getattr(self, name), self.unit // width))
            self.unit = width
        first = (address - self.start) // self.unit
        return first if width == self.unit else (first[:, None] + np.arange(width // self.unit)).ravel()


class Argument:
    """A tensor passed to the launch: the bytes it may touch."""

    def __init__(self, name: str, tensor: torch.Tensor, memory: Memory):
        self.name, self.memory = name, memory
        self.shape, self.dtype, self.item = tuple(tensor.shape), tensor.dtype, tensor.element_size()
        self.start = tensor.data_ptr()
        elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        self.size = elements * self.item
        self.own = None  # for views with gaps: whether each element of the extent belongs to it
        if elements > tensor.numel():
            self.own = np.zeros(elements, bool)
            np.lib.stride_tricks.as_strided(self.own, tensor.shape, tensor.stride())[...] = True

    def outside(self, address, width: int):
        offset = address - self.start
        bad = (offset < 0) | (offset + width > self.size)
        if self.own is not None:
            bad |= ~self.own[np.where(bad, 0, offset) // self.item]
        return bad


class Fresh:
    """torch.empty memory, filled with noise; which bytes have been written since."""

    def __init__(self, tensor: torch.Tensor, noise: np.ndarray):
        self.tensor, self.noise = tensor, noise  # the tensor is kept, so its address is not given to another
        self.written = np.zeros(noise.size, bool)

    def refresh(self):
        """torch operators write unseen: what is no longer noise was written, eight bytes at a time."""
        now = bytes_of(self.tensor)
        changed = np.zeros(-(-now.size // 8) * 8, bool)
        changed[: now.size] = now != self.noise
        self.written |= changed.reshape(-1, 8).any(1).repeat(8)[: now.size]


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor's storage, shared."""
    storage = tensor.untyped_storage()
    return np.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)


class Launch:
    """The bookkeeping of one kernel launch."""

    def __init__(self, checker, name: str, named: dict):
        self.checker, self.name = checker, name
        self.arguments: list[Argument] = []
        self.by_identity = {}
        self.epoch = 1  # advances at every barrier
        smallest, storages = {}, {}
        tensors = list(_tensors(named))
        for _, t in tensors:
            key = t.untyped_storage().data_ptr()
            smallest[key] = min(smallest.get(key, 8), t.element_size())
        for label, t in tensors:
            storage = t.untyped_storage()
            key = storage.data_ptr()
            if key not in storages:
                storages[key] = Memory(key, storage.nbytes(), smallest[key])
            argument = Argument(label, t, storages[key])
            self.arguments.append(argument)
            self.by_identity[_identity(t)] = argument
        for key in storages:
            if key in checker.fresh:
                checker.fresh[key].refresh()

    def owner(self, pointer, address, width: int) -> Argument:
        """The argument that a pointer was computed from; where that is lost, the first that holds all addresses."""
        known = pointer.attr.get("argument")
        if known is not None:
            return known
        for argument in self.arguments:
            if not argument.outside(address, width).any():
                return argument
        raise self.error(f"{len(address)} addresses lie in none of the arguments")

    def error(self, what: str) -> KernelError:
        x, y, z = interpreter.interpreter_builder.grid_idx
        return KernelError(f"{_line()}{self.name}, program ({x}, {y}, {z}): {what}")

    def access(self, kind: str, pointer, mask) -> None:
        address = np.asarray(pointer.data)
        if mask is not None:
            address = np.broadcast_to(address, np.broadcast_shapes(address.shape, mask.data.shape))
            address = address[np.broadcast_to(mask.data, address.shape).astype(bool)]
        address = address.ravel().astype(np.int64)
        if address.size == 0:
            return
        width = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        self.checker.counts.accesses += address.size
        owner = self.owner(pointer, address, width)
        of = f"{kind} of {owner.name} {list(owner.shape)} {str(owner.dtype).removeprefix('torch.')}"
        if (bad := owner.outside(address, width)).any():
            at = (int(address[bad][0]) - owner.start) / owner.item
            raise self.error(
                f"{of}: {int(bad.sum())} of {address.size} unmasked addresses are outside; the first is element {at:g}"
                + (" (a gap of the view)" if 0 <= at * owner.item < owner.size else "")
            )
        if (address % width).any():
            raise self.error(f"{of}: an address is not a multiple of its {width} bytes")
        memory = owner.memory
        units = memory.units(address, width)
        me = 1 + interpreter.interpreter_builder.linear
        fresh = self.checker.fresh.get(memory.start)
        if fresh is not None:
            bytes_ = units if memory.unit == 1 else (units[:, None] * memory.unit + np.arange(memory.unit)).ravel()
            if kind == "store":
                fresh.written[bytes_] = True
            elif not fresh.written[bytes_].all():
                at = int(np.flatnonzero(~fresh.written[bytes_])[0]) // width
                raise self.error(
                    f"{of}: reads memory from torch.empty that nothing has written, element "
                    f"{(int(address[at]) - owner.start) // owner.item}"
                )
        if kind == "store" and np.unique(address).size != address.size:
            raise self.error(f"{of}: one store writes an address twice")
        read, wrote, updated = memory.read[units], memory.wrote[units], memory.updated[units]
        conflicts = {
            "load": {"stores": wrote, "updates": updated},
            "store": {"loads": read, "stores": wrote, "updates": updated},
            "atomic": {"loads": read, "stores": wrote},
        }
        for does, program in conflicts[kind].items():
            if (clash := (program != 0) & (program != me)).any():
                first = int(np.flatnonzero(clash)[0])
                at = (int(units[first]) * memory.unit + memory.start - owner.start) // owner.item
                raise self.error(f"{of}: race: {self.program(int(program[first]))} {does} element {at} too")
        if kind == "load" and ((wrote == me) & (memory.when[units] == self.epoch)).any():
            raise self.error(f"{of}: the program stored it itself, and no tl.debug_barrier() stands between")
        if kind == "load":
            memory.read[units] = np.where((read == 0) | (read == me), me, MANY)
        elif kind == "atomic":
            memory.updated[units] = np.where((updated == 0) | (updated == me), me, MANY)
        else:
            memory.wrote[units], memory.when[units] = me, self.epoch

    @staticmethod
    def program(number: int) -> str:
        if number == MANY:
            return "more than one other program"
        return (
            f"program {tuple(int(i) for i in np.unravel_index(number - 1, interpreter.interpreter_builder.grid_dim))}"
        )


def _line() -> str:
    """Where in the kernel's file this is: the innermost frame that is neither Triton's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/triton/" not in file and not file.endswith(("triton_check.py", "triton_arithmetic.py")):
            return f"{file.rsplit('/', 1)[-1]}:{frame.f_lineno}: "
        frame = frame.f_back
    return ""


def _tensors(named: dict):
    for name, value in named.items():
        if isinstance(value, (tuple, list)):
            yield from _tensors({f"{name}[{i}]": v for i, v in enumerate(value)})
        elif isinstance(value, interpreter.TensorDescriptor):
            yield name, value.base
        elif hasattr(value, "untyped_storage"):
            yield name, value
        elif hasattr(value, "data_ptr"):  # a reinterpreted tensor
            yield name, value.base


def _identity(t):
    return t.data_ptr(), tuple(t.shape), tuple(t.stride()), t.dtype


class Counts:
    """What was checked; ``widest`` is the launch with most programs."""

    def __init__(self):
        self.launches = self.programs = self.accesses = self.widest = 0

    def add(self, other):
        self.launches += other.launches
        self.programs += other.programs
        self.accesses += other.accesses
        self.widest = max(self.widest, other.widest)

    def __str__(self):
        return f"{self.launches} launches, {self.programs} programs, {self.accesses} accesses"


class Checker:
    """The state of one ``with checked()``: fresh memory, the launch at hand."""

    def __init__(self, seed, counts: Counts):
        self.random = None if seed is None else np.random.default_rng(seed)
        self.noise = np.random.default_rng(0x5EED)
        self.fresh: dict[int, Fresh] = {}
        self.launch: Launch | None = None
        self.counts = counts

    def remember(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that torch.empty and its kin made: noise until it is written."""
        if tensor.device.type == "cpu" and tensor.untyped_storage().nbytes():
            noise = self.noise.integers(0, 256, tensor.untyped_storage().nbytes(), np.uint8)
            bytes_of(tensor)[:] = noise
            self.fresh[tensor.untyped_storage().data_ptr()] = Fresh(tensor, noise)
        return tensor

    def order(self, programs: int):
        self.counts.programs += programs
        self.counts.widest = max(self.counts.widest, programs)
        return None if self.random is None else self.random.permutation(programs)


active: Checker | None = None
EMPTY = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided")]  # fmt: skip


@contextlib.contextmanager
def checked(seed: int | None = 0):
    """Checks every launch inside. Yields the counts."""
    global active
    counts = Counts()
    previous, active = active, Checker(seed, counts)
    checker, stock = active, [getattr(owner, name) for owner, name in EMPTY]
    for (owner, name), make in zip(EMPTY, stock):
        setattr(owner, name, lambda *a, _make=make, **k: checker.remember(_make(*a, **k)))
    try:
        with np.errstate(all="ignore"):
            yield counts
    finally:
        active = previous
        for (owner, name), make in zip(EMPTY, stock):
            setattr(owner, name, make)


def in_any_order(run, seeds=(None, 0, 1), counts: Counts | None = None):
    """``run()`` under the checks once for every order of programs; its result. KernelError where they differ. One order
    will do where no launch has two programs."""
    results = []
    for seed in seeds:
        with checked(seed) as seen:
            results.append(run())
        if counts is not None:
            counts.add(seen)
        if seen.widest <= 1:
            break
    flat = [r if isinstance(r, (tuple, list)) else (r,) for r in results]
    for seed, other in zip(seeds[1:], flat[1:], strict=False):
        for i, (a, b) in enumerate(zip(flat[0], other, strict=True)):
            if a.shape != b.shape or not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b))):
                raise KernelError(f"output {i} depends on the order of the programs (order {seeds[0]} against {seed})")
    return results[0]


# ------------------------------------------------------------------------------------------ hooks


def _call(stock):
    def wrapped(self, *args, **kwargs):
        unknown = set(kwargs) - set(self.arg_names) - OPTIONS
        if unknown:
            raise KernelError(f"{self.fn.__name__}: Triton knows no launch option {', '.join(sorted(unknown))}")
        arithmetic.fuse = kwargs.get("enable_fp_fusion", True)
        if active is None:
            return stock(self, *args, **kwargs)
        active.counts.launches += 1
        outer = active.launch
        active.launch = Launch(active, self.fn.__name__, {**dict(zip(self.arg_names, args)), **kwargs})
        patched = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        try:
            return stock(self, *args, **kwargs)
        except InterpreterError as error:
            cause = error
            while cause is not None and not isinstance(cause, KernelError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None
        finally:
            patched.restore()
            active.launch = outer

    return wrapped


def _set_grid_dim(stock):
    def wrapped(self, x, y, z):
        stock(self, x, y, z)
        if y > 65535 or z > 65535 or x >= 2**31:
            raise KernelError(f"CUDA refuses the grid ({x}, {y}, {z}): at most (2147483647, 65535, 65535)")
        self.order = active.order(x * y * z) if active is not None else None

    return wrapped


def _set_grid_idx(stock):
    def wrapped(self, x, y, z):
        self.linear = int(np.ravel_multi_index((x, y, z), self.grid_dim))
        if self.order is not None:
            self.linear = int(self.order[self.linear])
            x, y, z = (int(i) for i in np.unravel_index(self.linear, self.grid_dim))
        stock(self, x, y, z)

    return wrapped


def _accesses(kind, stock, mask_at):
    def wrapped(self, pointer, *args):
        at = args if mask_at is None else args[mask_at]
        if active is not None and active.launch is not None:
            active.launch.access(kind, pointer, None if mask_at is None else at)
        return stock(self, pointer, *args)

    return wrapped


def _keeps_argument(stock):
    """Address arithmetic: the result points into the argument that its operand points into."""

    def wrapped(self, *args):
        result = stock(self, *args)
        known = {id(a.attr["argument"]): a.attr["argument"] for a in args if "argument" in getattr(a, "attr", ())}
        if len(known) == 1:
            result.attr["argument"] = next(iter(known.values()))
        return result

    return wrapped


def _barrier(stock):
    def wrapped(self):
        if active is not None and active.launch is not None:
            active.launch.epoch += 1
        return stock(self)

    return wrapped


def _argument(stock):
    def wrapped(argument):
        result = stock(argument)
        if active is not None and active.launch is not None and hasattr(argument, "data_ptr"):
            tensor = argument if hasattr(argument, "untyped_storage") else argument.base
            owner = active.launch.by_identity.get(_identity(tensor))
            if owner is not None:
                result.handle.attr["argument"] = owner
        return result

    return wrapped


def _atomic_rmw(stock):
    def wrapped(self, op, pointer, value, mask, *args):
        if active is not None and active.launch is not None:
            active.launch.access("atomic", pointer, mask)
        return stock(self, op, pointer, value, mask, *args)

    return wrapped


def _device_function(stock):
    """A @triton.jit function called by a kernel. The stock call patches the language anew each time, which takes longer
    than most functions; here the launch does it."""

    def wrapped(self, *args, **kwargs):
        if active is None or active.launch is None:
            return stock(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    return wrapped


def install():
    builder = InterpreterBuilder
    interpreter.InterpretedFunction.__call__ = _device_function(interpreter.InterpretedFunction.__call__)
    GridExecutor.__call__ = _call(GridExecutor.__call__)
    builder.set_grid_dim = _set_grid_dim(builder.set_grid_dim)
    builder.set_grid_idx = _set_grid_idx(builder.set_grid_idx)
    builder.create_masked_load = _accesses("load", builder.create_masked_load, 0)
    builder.create_masked_store = _accesses("store", builder.create_masked_store, 1)
    builder.create_atomic_cas = _accesses("atomic", builder.create_atomic_cas, None)
    builder.create_atomic_rmw = _atomic_rmw(builder.create_atomic_rmw)
    builder.create_barrier = _barrier(builder.create_barrier)
    for name in ("addptr", "splat", "broadcast", "expand_dims", "reshape", "trans", "bitcast", "unsplat", "select"):
        setattr(builder, f"create_{name}", _keeps_argument(getattr(builder, f"create_{name}")))
    interpreter._implicit_cvt = _argument(interpreter._implicit_cvt)


install()
