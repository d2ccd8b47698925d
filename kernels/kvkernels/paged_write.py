"""KV write in Triton: one program a token and head (K's heads first, then V's) rounds and stores a vector.

Bit for bit what `codec.encode` stores, tested on Triton's CPU interpreter. That interpreter casts wrongly
(to e4m3 it forgets the carry into the exponent and cuts subnormals, to bf16 it cuts), so values are rounded
in the kernel before the cast, which costs little where memory is what one waits for.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvkernels.fine import MANTISSA_SHIFT, inverse_factors, squared_errors
from kvkernels.geometry import MANTISSAS
from kvkernels.precision import BF16, FINE_STEPS, FP8, FP32, INT4, Precision
from kvkernels.triton_codes import as_kernel_pool, round_bf16, round_even, round_fp8

_SHIFT: tl.constexpr = tl.constexpr(MANTISSA_SHIFT)
_MANTISSAS: tl.constexpr = tl.constexpr(MANTISSAS)
_STEPS: tl.constexpr = tl.constexpr(FINE_STEPS)
_TILE_STEPS: tl.constexpr = tl.constexpr(64)
"""Steps whose errors are summed in one go; it divides FINE_STEPS."""


@triton.jit
def _errors(table, values, steps):
    """What rounding `values` loses at each of `steps`; see `fine`."""
    rows = (values.to(tl.int32, bitcast=True) >> _SHIFT) & (_MANTISSAS - 1)
    shares = tl.load(table + rows[:, None] * _STEPS + steps[None, :])
    return tl.sum(shares * (values * values)[:, None], axis=0)


@triton.jit
def _kernel(
    kv,
    slots,
    inverse,
    fine,
    errors,
    factors,
    tokens,
    kv_row_stride,
    token_stride,
    limit,
    DIM: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    FINE: tl.constexpr,
    BF16: tl.constexpr,
    FP8: tl.constexpr,
    INT4: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    half: tl.constexpr = DIM // 2
    dims = tl.arange(0, HALF_PADDED)
    mask = dims < half
    at = kv + row * kv_row_stride + head * DIM + dims
    low, high = tl.load(at, mask=mask, other=0.0), tl.load(at + half, mask=mask, other=0.0)
    if SCALED:
        scale = inverse + head * DIM + dims
        low = low * tl.load(scale, mask=mask, other=0.0)
        high = high * tl.load(scale + half, mask=mask, other=0.0)
        if FINE:
            least, step = float("inf"), 0
            for first in tl.static_range(0, _STEPS, _TILE_STEPS):
                tried = first + tl.arange(0, _TILE_STEPS)
                lost = _errors(errors, low, tried) + _errors(errors, high, tried)
                here = tl.min(lost, axis=0)
                step = tl.where(here < least, first + tl.argmin(lost, axis=0), step)
                least = tl.minimum(least, here)
            place = (slot // BLOCK_SIZE * HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
            tl.store(fine + place, step.to(tl.uint8))
            factor = tl.load(factors + step)
            low, high = low * factor, high * factor
        low = tl.minimum(tl.maximum(low, -limit), limit)
        high = tl.minimum(tl.maximum(high, -limit), limit)
        if not FP8:
            low, high = round_even(low), round_even(high)
        elif ROUND_FIRST:
            low, high = round_fp8(low), round_fp8(high)
    elif BF16 and ROUND_FIRST:
        low, high = round_bf16(low), round_bf16(high)
    kind = tokens.dtype.element_ty
    if INT4:
        packed = (low.to(tl.int32) & 15) | (high.to(tl.int32) << 4)
        tl.store(tokens + slot * token_stride + head * half + dims, packed.to(kind), mask=mask)
    else:
        out = tokens + slot * token_stride + head * DIM + dims
        tl.store(out, low.to(kind), mask=mask)
        tl.store(out + half, high.to(kind), mask=mask)


def write(
    tokens: Tensor,
    slots: Tensor,
    kv: Tensor,
    head_dim: int,
    precision: Precision = FP32,
    inverse: Tensor | None = None,
    fine: Tensor | None = None,
    round_first: bool = True,
) -> None:
    """As `attention.write`, but `kv` is left as it is. Without `round_first` the cast alone rounds."""
    width = kv.shape[1]
    searched = (kv, kv, kv)
    if fine is not None:
        searched = fine, squared_errors(kv.device), inverse_factors(kv.device)
    _kernel[(kv.shape[0], width // head_dim)](
        kv,
        slots,
        kv if inverse is None else inverse,
        *searched,
        as_kernel_pool(tokens, precision),
        kv.stride(0),
        tokens.stride(0),
        precision.limit or 0.0,
        DIM=head_dim,
        HALF_PADDED=triton.next_power_of_2(head_dim // 2),
        HEADS=width // head_dim,
        BLOCK_SIZE=1 if fine is None else fine.shape[2],
        SCALED=precision.scaled,
        FINE=fine is not None,
        BF16=precision is BF16,
        FP8=precision is FP8,
        INT4=precision is INT4,
        ROUND_FIRST=round_first,
    )
