"""Gives Triton's interpreter the arithmetic of the hardware. Imported by triton_check, before any kernel.

What the stock interpreter (3.8, 3.9) computes differently, and what is done here instead:

    bfloat16           bits taken for integers        computed in float32, rounded to nearest even
    casts to bfloat16  truncate                       round to nearest even, once, from float64 too
    tl.dot tf32        full float32                   both operands lose their low 13 bits; tf32x3, bf16x3 as compiled
    tl.dot sums        nearly exact                   an error that tensor cores may make
    tl.dot sizes       any                            the inner dimension must fill a tensor-core instruction
    a b + c            rounded twice                  fused where the compiler may (no enable_fp_fusion=False)
    approximations     / sqrt exp log exact           float32 / and sqrt, every exp and log: here and there one ulp off
    sums and scans     left to right, or numpy's way  a tree, as lanes and warps do it
    ties               tie_break_left=False ignored   refused: compiled code returns some index of the row
    NaN in argmin      skipped                        refused: compiled code returns an index that does not exist
    atomics            bfloat16 refused               bfloat16 add; acquire-release, the costly default, is refused
    float arguments    float64                        float32, as they are passed to the device
    masked-off lanes   0 when there is no ``other``   garbage
"""

import os
import sys

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("import triton_check before triton (and before vqkernels): kernels choose the interpreter early")
os.environ["TRITON_INTERPRET"] = "1"

import functools

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
import triton_interpreter_speed  # noqa: F401
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

BF16 = tl.bfloat16
PRECISION = interpreter._ir.INPUT_PRECISION
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


class KernelError(AssertionError):
    """A kernel did something that a GPU forbids, leaves undefined or does in another way than the interpreter."""


fuse = True  # whether the launch at hand lets the compiler contract a b + c; set by triton_check


# ------------------------------------------------------------------------------------------------ bfloat16


def widen(bits):
    """bfloat16 bits -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x):
    """Any number -> bfloat16 bits, to nearest even. float64 is rounded once: through float32 rounded to odd."""
    single = np.asarray(x).astype(np.float32)
    bits = np.array(single, ndmin=1).view(np.uint32).reshape(single.shape)
    if np.asarray(x).dtype == np.float64:
        step = np.where(np.abs(single.astype(np.float64)) > np.abs(x), -1, 1).astype(np.int64)
        odd = (bits.astype(np.int64) + np.where(bits & 1, 0, step)).astype(np.uint32)
        inexact = (single.astype(np.float64) != x) & np.isfinite(x) & np.isfinite(single)
        bits = np.where(inexact, odd, bits)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


def is_bf16(handle):
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == BF16


def as_fp32(handle):
    return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def through_fp32(method):
    """A builder method that computes: bfloat16 operands in float32, a float32 result rounded back."""

    @functools.wraps(method)
    def wrapped(self, *args):
        if not any(map(is_bf16, args)):
            return method(self, *args)
        result = method(self, *map(as_fp32, args))
        if result.data.dtype == np.bool_ or result.dtype.scalar != tl.float32:
            return result
        return TensorHandle(narrow(result.data), BF16)

    return wrapped


def cast(method):
    @functools.wraps(method)
    def wrapped(self, source, target):
        source, target = as_fp32(source), target.scalar
        if target == BF16:
            data = source.data if source.data.dtype == np.float64 else source.data.astype(np.float32)
            return TensorHandle(narrow(data), BF16)
        return source if source.dtype.scalar == target else method(self, source, target)

    return wrapped


def float_to_float(method):
    """tl.cast with a rounding mode: only to-nearest exists for bfloat16 here."""

    @functools.wraps(method)
    def wrapped(self, source, target, mode):
        if BF16 not in (source.dtype.scalar, target.scalar):
            return method(self, source, target, mode)
        if mode is not None and mode != interpreter._ir.ROUNDING_MODE.RTNE:
            raise KernelError(f"cast to {target} with rounding mode {mode}: only round to nearest even is emulated")
        return self.cast_impl(source, target)

    return wrapped


# ------------------------------------------------------------------------- fused and approximate arithmetic


def binary(method):
    """Comparisons give int1; a product remembers its factors, so that an addition can be fused with it."""

    @functools.wraps(method)
    def wrapped(self, left, right, op):
        if op in COMPARISONS:
            return TensorHandle(op(left.data, right.data), tl.int1)
        if fuse and op in (np.add, np.subtract) and left.data.dtype in (np.float32, np.float64):
            for factors, other, sign in ((left, right, 1), (right, left, -1)):
                if "factors" in factors.attr:
                    a, b = factors.attr["factors"]
                    c = other.data
                    if op is np.subtract:
                        a, c = (a, -c) if sign == 1 else (-a, c)
                    return TensorHandle(multiply_add(a, b, c), left.dtype.scalar)
        result = method(self, left, right, op)
        if op is np.multiply and result.data.dtype in (np.float32, np.float64):
            result.attr["factors"] = (left.data, right.data)
        return result

    return wrapped


def multiply_add(a, b, c):
    """a b + c rounded once (float64: but for a last bit in rare cases)."""
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b + c).astype(np.float32)
    product = a * b
    split = [x * 134217729.0 for x in (a, b)]
    (a1, b1) = (s - (s - x) for s, x in zip(split, (a, b)))
    a2, b2 = a - a1, b - b1
    low = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2
    total = product + c
    virtual = total - product
    low = low + ((product - (total - virtual)) + (c - virtual))
    return np.where(np.isfinite(low), total + low, total)


def scrambled(x):
    """64 bits that look random, always the same for the same float."""
    bits = np.array(x, ndmin=1).view(np.uint32 if x.dtype == np.float32 else np.uint64).reshape(x.shape)
    return bits.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def off_by_an_ulp(x):
    """About half of the values one ulp up or down, always the same ones: what may be expected of an approximation."""
    draw = scrambled(x) >> np.uint64(62)
    moved = np.nextafter(x, np.where(draw == 1, np.inf, -np.inf).astype(x.dtype))
    return np.where((draw == 0) | (draw == 2) | ~np.isfinite(x) | (x == 0), x, moved)


def approximate(name, dtypes):
    method = getattr(InterpreterBuilder, name)

    @functools.wraps(method)
    def wrapped(self, *args):
        result = method(self, *args)
        if result.data.dtype not in dtypes:
            return result
        inexact = off_by_an_ulp(result.data)
        if name == "create_fdiv":  # a reciprocal that is a power of two is exact
            inexact = np.where(np.abs(np.frexp(args[1].data)[0]) == 0.5, result.data, inexact)
        elif "sqrt" in name:
            inexact = np.where(np.frexp(args[0].data)[0] == 0.25, result.data, inexact)
        return TensorHandle(inexact.astype(result.data.dtype), result.dtype)

    setattr(InterpreterBuilder, name, wrapped)


# ------------------------------------------------------------------------------------------------ tl.dot


def drop(x):
    """tf32 as a tensor core reads a float32 register: the low 13 bits do not exist."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def nearest_tf32(x):
    """cvt.rna.tf32: to nearest, ties away from zero."""
    x = np.ascontiguousarray(x, np.float32)
    return np.where(np.isfinite(x), drop((x.view(np.uint32) + np.uint32(0x1000)).view(np.float32)), x)


def dot(method):
    @functools.wraps(method)
    def wrapped(self, a, b, d, precision, imprecise):
        if d.data.dtype == np.float16:
            raise KernelError("tl.dot with a float16 accumulator loses what it sums; leave out_dtype at float32")
        if not a.dtype.scalar.is_floating() or a.dtype.primitive_bitwidth == 8:
            return method(self, a, b, d, precision, imprecise)
        x, y = as_fp32(a).data, as_fp32(b).data
        accumulate = d.data.dtype

        def product(p, q):
            return np.matmul(p, q, dtype=accumulate)

        fp32 = a.dtype.scalar == tl.float32
        if fp32 and precision == PRECISION.TF32:
            value = product(drop(x), drop(y))
        elif fp32 and precision in (PRECISION.TF32x3, PRECISION.BF16x3):
            high = nearest_tf32 if precision == PRECISION.TF32x3 else lambda t: widen(narrow(t))
            low = drop if precision == PRECISION.TF32x3 else high
            x1, y1 = high(x), high(y)
            x2, y2 = low(x - x1), low(y - y1)
            small = product(x2, y1) + product(x1, y2)
            value = np.where(np.isnan(small), 0, small).astype(accumulate) + product(x1, y1)
        elif fp32 and precision != PRECISION.IEEE:
            raise KernelError(f"tl.dot with input_precision {precision} is not emulated")
        else:
            value = product(x, y)
        size = product(np.abs(x), np.abs(y)) + np.abs(d.data)
        return TensorHandle(
            value
            + d.data
            + some_error(value, size, x.shape[-1] * (0.5 if fp32 and precision == PRECISION.IEEE else 1)),
            d.dtype.scalar,
        )

    return wrapped


def some_error(value, size, terms):
    """A tensor core adds in an order of its own and cuts off: up to 2^-23 of what is added, for every term (float32
    without tensor cores rounds: half of that). A different fraction for every value, up or down, the same each time.
    What is exact here need not be there."""
    if value.dtype != np.float32:
        return 0
    fraction = (scrambled(value) >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - 1
    error = fraction * np.float32(terms * 2**-23) * size
    return np.where(np.isfinite(error), error, np.float32(0))


def min_dot_size(left, right):
    """The least [M, N, K]: that of the CUDA compiler."""
    return 1, 1, {8: 32, 16: 16, 32: 8, 64: 4}[left.scalar.primitive_bitwidth]


# ------------------------------------------------------------------------------------- reductions and scans


def halves(x, axis):
    n = x.shape[axis] // 2
    return np.take(x, range(n), axis), np.take(x, range(n, 2 * n), axis)


def combine(combine_fn, left, right, dtypes):
    """The combining function of a reduction on whole arrays; tuples in, tuple out."""

    def wrap(x, dtype):
        return tl.core.tensor(TensorHandle(x, dtype.scalar), tl.block_type(dtype, list(x.shape)))

    out = combine_fn.fn(*map(wrap, left, dtypes), *map(wrap, right, dtypes))
    out = out if isinstance(out, tuple) else (out,)
    to = interpreter.interpreter_builder.cast_impl
    return [to(o.handle, dtype).data.astype(x.dtype) for o, dtype, x in zip(out, dtypes, left)]


def reduce_impl(stock):
    """Folds halves onto each other, as lanes do it; the stock loop runs element after element."""
    standard = tl.standard
    indexed = {
        standard._argmin_combine_tie_break_left: np.nanargmin,
        standard._argmax_combine_tie_break_left: np.nanargmax,
    }
    fast = (standard._argmin_combine_tie_break_fast, standard._argmax_combine_tie_break_fast)

    @functools.wraps(stock)
    def wrapped(self, inputs):
        if any(self.combine_fn is f for f in fast):
            raise KernelError("tie_break_left=False returns an arbitrary index when compiled; leave it at True")
        dtypes = [x.dtype for x in inputs]
        first = as_fp32(inputs[0].handle)
        if (
            any(self.combine_fn is f for f in indexed)
            and first.dtype.scalar.is_floating()
            and np.isnan(first.data).any()
        ):
            raise KernelError("NaN reaches an argmin or argmax: compiled code may return an index that does not exist")
        extremes = (*indexed, standard._elementwise_max, standard._elementwise_min)
        if any(self.combine_fn is f for f in extremes):
            if dtypes[0] != BF16:
                return stock(self, inputs)
            wide = (tl.core.tensor(first, tl.block_type(tl.float32, list(first.data.shape))), *inputs[1:])
            out = stock(self, wide)
            value, *index = out if isinstance(out, (tuple, list)) else (out,)
            bits = narrow(value.handle.data)
            return (self.to_tensor(bits if value.type.is_block() else bits.item(), BF16), *index)
        arrays = [x.handle.data for x in inputs]
        rank, axis = arrays[0].ndim, self.axis
        if axis is None:
            arrays, axis = [x.reshape(-1) for x in arrays], 0
        axis %= arrays[0].ndim
        while arrays[0].shape[axis] > 1:
            left, right = zip(*(halves(x, axis) for x in arrays))
            arrays = combine(self.combine_fn, left, right, dtypes)
        if self.axis is None:
            arrays = [x.reshape((1,) * rank if self.keep_dims else ()) for x in arrays]
        elif not self.keep_dims:
            arrays = [np.squeeze(x, axis) for x in arrays]
        return [self.to_tensor(x if x.ndim else x.item(), dtype) for x, dtype in zip(arrays, dtypes)]

    return wrapped


def scan_impl(stock):
    """Doubles the reach of every element at each step, as lanes do it."""

    @functools.wraps(stock)
    def wrapped(self, inputs):
        dtypes = [x.dtype for x in inputs]
        arrays = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
        arrays = [np.ascontiguousarray(x[::-1] if self.reverse else x) for x in arrays]
        reach = 1
        while reach < len(arrays[0]):
            later = combine(self.combine_fn, [np.roll(x, reach, 0) for x in arrays], arrays, dtypes)
            arrays = [np.concatenate([x[:reach], y[reach:]]) for x, y in zip(arrays, later)]
            reach *= 2
        arrays = [np.moveaxis(x[::-1] if self.reverse else x, 0, self.axis) for x in arrays]
        return [self.to_tensor(np.ascontiguousarray(x), dtype) for x, dtype in zip(arrays, dtypes)]

    return wrapped


# ---------------------------------------------------------------------------------- atomics, loads, arguments


def atomic_rmw(method):
    @functools.wraps(method)
    def wrapped(self, op, pointer, value, mask, semantics, scope):
        refuse_default(semantics)
        if not is_bf16(value):
            return method(self, op, pointer, value, mask, semantics, scope)
        if op != interpreter._ir.ATOMIC_OP.FADD:
            raise KernelError(f"{op} on bfloat16: only tl.atomic_add exists")
        old = np.zeros(pointer.data.shape, np.uint16)
        for at in zip(*np.nonzero(np.broadcast_to(mask.data, pointer.data.shape))):
            address, here = pointer.data[at].reshape(1), np.ones(1, bool)
            was = interpreter._interpreter.load(address, here, np.zeros(1, np.uint16), np.dtype(np.uint16))
            term = np.broadcast_to(value.data, old.shape)[at].reshape(1)
            interpreter._interpreter.store(address, narrow(widen(was) + widen(term)), here)
            old[at] = was[0]
        return TensorHandle(old, BF16)

    return wrapped


def refuse_default(semantics):
    if semantics == interpreter._ir.MEM_SEMANTIC.ACQUIRE_RELEASE:
        raise KernelError('an atomic with the default semantics fences all of memory; pass sem="relaxed"')


def atomic_cas(method):
    @functools.wraps(method)
    def wrapped(self, pointer, compare, value, semantics, scope):
        refuse_default(semantics)
        return method(self, pointer, compare, value, semantics, scope)

    return wrapped


def masked_load(method):
    """Lanes that are masked off hold garbage unless ``other`` is given."""

    @functools.wraps(method)
    def wrapped(self, pointer, mask, other, *policy):
        if other is None and not np.all(mask.data):
            kind = interpreter._get_np_dtype(pointer.get_element_ty())
            garbage = np.nan if kind.kind == "f" else 0x7FC1 if pointer.get_element_ty() == BF16 else 0x2A
            other = TensorHandle(np.full(pointer.data.shape, garbage, kind), pointer.get_element_ty())
        return method(self, pointer, mask, other, *policy)

    return wrapped


def masked_store(method):
    """The stock store writes as many bytes as the value has, whatever the pointer says."""

    @functools.wraps(method)
    def wrapped(self, pointer, value, mask, *policy):
        kind = interpreter._get_np_dtype(pointer.get_element_ty())
        if value.data.dtype.itemsize != kind.itemsize:
            value = TensorHandle(value.data.astype(kind), pointer.get_element_ty())
        return method(self, pointer, value, mask, *policy)

    return wrapped


def as_argument(method):
    @functools.wraps(method)
    def wrapped(argument):
        if isinstance(argument, float):
            return tl.tensor(TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return method(argument)

    return wrapped


def mend():
    """Replaces the methods, once."""
    builder = InterpreterBuilder
    for name in ("create_fma", "create_clampf", "create_erf", "create_rsqrt", "unary_op"):
        setattr(builder, name, through_fp32(getattr(builder, name)))
    builder.binary_op = through_fp32(binary(builder.binary_op))
    builder.cast_impl = cast(builder.cast_impl)
    builder.create_fp_to_fp = float_to_float(builder.create_fp_to_fp)
    builder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), BF16)
    single, both = (np.float32,), (np.float32, np.float64)
    for name in ("create_fdiv", "create_sqrt"):
        approximate(name, single)
    for name in (
        "create_exp",
        "create_exp2",
        "create_log",
        "create_log2",
        "create_rsqrt",
        "create_erf",
        "create_sin",
        "create_cos",
    ):
        approximate(name, both)
    builder.create_dot = dot(builder.create_dot)
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = min_dot_size
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        allowed_dot_input_precisions=("tf32", "tf32x3", "bf16x3", "ieee")
    )
    ReduceOps.apply_impl = reduce_impl(ReduceOps.apply_impl)
    ScanOps.apply_impl = scan_impl(ScanOps.apply_impl)
    builder.create_atomic_rmw = atomic_rmw(builder.create_atomic_rmw)
    builder.create_atomic_cas = atomic_cas(builder.create_atomic_cas)
    builder.create_masked_load = masked_load(builder.create_masked_load)
    builder.create_masked_store = masked_store(builder.create_masked_store)
    interpreter._implicit_cvt = as_argument(interpreter._implicit_cvt)


mend()
