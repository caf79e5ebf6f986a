"""Rounding and matrix products that mean the same on a GPU and in Triton's interpreter.

Triton 3.6's interpreter truncates float32 to bfloat16 and multiplies the raw bits of bfloat16
operands in `tl.dot`; on a GPU both helpers compile to the plain instruction.
"""

from kernels.launch import INTERPRET, tl, triton

_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 block `x` as DTYPE, rounded to nearest even."""
    if _INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest, bits).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32: a [M, K], b [K, N] of one dtype; float32 operands are not cut to
    TF32."""
    if _INTERPRET and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
