"""Triton's interpreter, several times faster and otherwise the same: what it makes anew at every operation is kept.

The types, shapes and tables here are values: equal ones may be one. triton_arithmetic imports this.
"""

import atexit
import functools
import gc

import triton.language as tl
import triton.runtime.interpreter as interpreter


def numpy_type(stock):
    """The stock function builds its table at every call."""
    known = {}

    @functools.wraps(stock)
    def wrapped(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = stock(dtype)
        return known[name]

    return wrapped


def tensor_init(stock):
    """A tensor's shape is a tuple of constants with a type of its own, made twice."""
    known = {}

    @functools.wraps(stock)
    def wrapped(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in known:
            stock(self, handle, type)
            known[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[key]

    return wrapped


def block_type_init(stock):
    """The type of a block writes its own name."""
    known = {}

    @functools.wraps(stock)
    def wrapped(self, element_ty, shape):
        key = element_ty.name, getattr(element_ty, "address_space", ""), *[int(getattr(n, "value", n)) for n in shape]
        if key not in known:
            stock(self, element_ty, shape)
            known[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = known[key]

    return wrapped


def install():
    interpreter._get_np_dtype = numpy_type(interpreter._get_np_dtype)
    tl.tensor.__init__ = tensor_init(tl.tensor.__init__)
    tl.block_type.__init__ = block_type_init(tl.block_type.__init__)
    gc.freeze()  # what torch and triton consist of need not be searched again and again
    atexit.register(gc.unfreeze)
    gc.set_threshold(100_000, 20, 20)


install()
