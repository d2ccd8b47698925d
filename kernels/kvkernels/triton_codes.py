"""What the Triton kernels share about codes: reading each precision as floats, and rounding to it.

fp8 pools are passed as e4m3, int4 pools as bytes; a layout is `kvkernels.codec`'s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvkernels.precision import FINE_STEPS, FP8, Precision

_TO_INTEGER: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2**23: a smaller fp32 plus this has no fraction left; so adding and subtracting it rounds to even."""
_TO_FP8_SUBNORMAL: tl.constexpr = tl.constexpr(24576.0)
"""1.5 * 2**14: the same to multiples of 2**-9."""


@triton.jit
def load_values(pool, rows, dims, mask, DIM: tl.constexpr, INT4: tl.constexpr):
    """Elements `dims` of the vectors that begin at element `rows`, as fp32; 0 where the mask hides."""
    if INT4:
        half: tl.constexpr = DIM // 2
        byte = tl.load(pool + rows // 2 + dims % half, mask=mask, other=0).to(tl.int32)
        return ((byte << tl.where(dims < half, 28, 24)) >> 28).to(tl.float32)
    return tl.load(pool + rows + dims, mask=mask, other=0.0).to(tl.float32)


_FINE_OCTAVE: tl.constexpr = tl.constexpr(1 / FINE_STEPS)


@triton.jit
def load_factors(fine, blocks, within, head, mask, HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """What the steps of vectors multiply their heads' scales by; `head` counts K's, then V's."""
    at = (blocks.to(tl.int64) * HEADS + head) * BLOCK_SIZE + within
    return tl.exp2(tl.load(fine + at, mask=mask, other=0).to(tl.float32) * _FINE_OCTAVE)


@triton.jit
def round_even(x):
    return (x + _TO_INTEGER) - _TO_INTEGER


@triton.jit
def round_fp8(x):
    """To the nearest e4m3 number, ties to even; |x| is at most 448. Casting the result then loses nothing."""
    bits = x.to(tl.int32, bitcast=True)
    odd = (bits >> 20) & 1
    normal = (bits + 0x7FFFF + odd) & -1048576
    tiny = ((x + _TO_FP8_SUBNORMAL) - _TO_FP8_SUBNORMAL).to(tl.int32, bitcast=True)
    tiny = tiny | (bits & -2147483648)  # What is rounded to zero keeps its sign.
    return tl.where(tl.abs(x) < 0.015625, tiny, normal).to(tl.float32, bitcast=True)


@triton.jit
def round_bf16(x):
    """To the nearest bf16 number, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


def as_kernel_pool(blocks: Tensor, precision: Precision) -> Tensor:
    """A pool viewed as the type that kernels load and store."""
    return blocks.view(torch.float8_e4m3fn) if precision is FP8 else blocks
