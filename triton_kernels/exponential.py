"""e^x for x <= 0 in float32 to about 2 units in the last place, in operations that round alike on every chip and in the
interpreter; the hardware's ex2 loses more the larger |x| is, as does the float32 product that prepares it."""

import triton
import triton.language as tl


@triton.jit
def exp_negative(x):
    """Below -87 the value of -87, which is 1.6e-38. x = n ln 2 + r, a polynomial of degree 6 in r, times 2^n."""
    x = tl.where(x < -87.0, -87.0, x)
    magic = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
    shifted = x * 1.44269502 + magic
    n = shifted - magic
    r = (x - n * 0.693145751953125) - n * 1.42860677e-06
    y = r * 1.38888892e-03 + 8.33333377e-03
    y = y * r + 4.16666679e-02
    y = y * r + 1.66666672e-01
    y = y * r + 0.5
    y = y * r + 1.0
    y = y * r + 1.0
    scale = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return y * scale.to(tl.float32, bitcast=True)
