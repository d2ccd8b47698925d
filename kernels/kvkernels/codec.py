"""KV as codes of fewer bits, and back: in torch, in place, in memory that is there already.

A code is `value * inverse`, rounded to nearest even and held within the precision's limit; `inverse` is one
over the scale, [2 * kv_heads, head_dim]. fp8 codes are e4m3 bytes. Two int4 codes share a byte: channel c of
a head is the low half of byte c, channel c + head_dim / 2 the high half. O(elements), no allocation but what
the search for fine scales takes.
"""

import torch
from torch import Tensor

from kvkernels import fine as fine_scales
from kvkernels.geometry import CODE_BYTES, SEARCHED_VECTORS, Geometry
from kvkernels.precision import BF16, FINE_STEPS, FP8, FP32, INT4, INT8, Precision
from kvkernels.scratch import Scratch

DTYPES = {FP32: torch.float32, BF16: torch.bfloat16, FP8: torch.int8, INT8: torch.int8, INT4: torch.int8}
"""What a pool is viewed as. fp8 is not a type that torch can index on every device, bytes are."""

_FP8_SHIFT, _FP8_MASK = 7, ~(1 << 14)
FP8_IN_HALF = 256.0
"""An e4m3 byte moved to the top of an fp16, its sign extended and then one copy of it cleared, is the same
number over this: exact for every code, and much faster than torch's own cast on a CPU.
"""


def encode(
    kv: Tensor,
    inverse: Tensor | None,
    precision: Precision,
    scratch: Scratch,
    fine: Tensor | None = None,
) -> Tensor:
    """`kv` [rows, token_floats] as codes [rows, codes of a token], in scratch. Uses `kv` up.

    Rows must fit, see `encode_rows`. `fine` [rows, 2 * kv_heads] is filled with the steps of vectors.
    """
    rows, width = kv.shape
    if inverse is not None:
        kv.unflatten(1, inverse.shape).mul_(inverse)
    if precision is BF16:
        return _room(scratch, 0, rows * width * 2, torch.bfloat16).view(rows, width).copy_(kv)
    assert precision.limit is not None
    assert inverse is not None
    if fine is not None:
        vectors = kv.unflatten(1, inverse.shape)
        steps = fine_scales.search(vectors.reshape(-1, inverse.shape[1]))
        fine.copy_(steps.view(fine.shape))
        factors = fine_scales.inverse_factors(kv.device).index_select(0, steps)
        vectors.mul_(factors.view(*fine.shape, 1))
    kv.clamp_(-precision.limit, precision.limit)
    codes = _room(scratch, 0, rows * width, torch.int8).view(rows, width)
    if precision is FP8:
        codes.view(torch.float8_e4m3fn).copy_(kv)
        return codes
    codes.copy_(kv.round_())
    if precision is INT8:
        return codes
    heads, dim = inverse.shape
    low, high = codes.view(rows, heads, 2, dim // 2).unbind(2)
    low.bitwise_and_(15).bitwise_or_(high.bitwise_left_shift_(4))
    packed = _room(scratch, rows * width, rows * width // 2, torch.int8)
    packed.view(low.shape).copy_(low)
    return packed.view(rows, width // 2)


def encode_rows(width: int, scratch: Scratch, searched: int = 0) -> int:
    """How many rows `encode` takes at a time; `searched` of each row's vectors search a step."""
    rows = scratch.codes.numel() // (CODE_BYTES * width)
    return min(rows, max(1, SEARCHED_VECTORS // searched)) if searched else rows


class Gather:
    """Fetches the blocks of a table into `scratch.gathered` as floats: codes, where there are scales."""

    def __init__(self, table: Tensor, geometry: Geometry, precision: Precision, scratch: Scratch) -> None:
        blocks, self._table, self._precision = len(table), table, precision
        elements = blocks * geometry.block_floats
        self.floats = scratch.gathered[:elements].view(blocks, -1)
        self._codes = self.floats
        if precision is FP32:
            return
        stored = elements * precision.bits // 8
        first = 0 if precision is BF16 else elements * 2  # bf16 needs no room on the way to a float
        self._codes = _room(scratch, first, stored, DTYPES[precision]).view(blocks, -1)
        self._halves = _room(scratch, 0, elements * 2, torch.int16).view(blocks, -1)
        self._nibbles = _room(scratch, 0, elements // 2, torch.int8).view(blocks, -1)
        halves = self.floats.view(-1, 2, geometry.head_dim // 2)
        self._low, self._high = halves.unbind(1)
        if not precision.fine:
            return
        # Where the halves of codes were: those are floats by then.
        shape = (blocks, 2 * geometry.kv_heads, geometry.block_size)
        vectors = elements // geometry.head_dim
        self._factors = _room(scratch, 0, vectors * 4, torch.float32).view(shape)
        self._fine = _room(scratch, vectors * 4, vectors, torch.uint8).view(shape)
        self._vectors = self.floats.view(
            blocks, geometry.block_size, 2 * geometry.kv_heads, geometry.head_dim
        )

    def fetch(self, blocks: Tensor, fine: Tensor | None = None) -> None:
        """`blocks` is one layer's pool, a row a block, viewed as its precision's dtype; `fine`
        [blocks, 2 * kv_heads, block_size] multiplies what is fetched.
        """
        torch.index_select(blocks, 0, self._table, out=self._codes)
        precision, codes = self._precision, self._codes
        if precision is FP8:
            halves = self._halves.copy_(codes).bitwise_left_shift_(_FP8_SHIFT).bitwise_and_(_FP8_MASK)
            self.floats.copy_(halves.view(torch.float16))
        elif precision is INT4:
            nibbles = torch.bitwise_left_shift(codes, 4, out=self._nibbles).bitwise_right_shift_(4)
            self._low.copy_(nibbles.view(self._low.shape))
            self._high.copy_(torch.bitwise_right_shift(codes, 4, out=nibbles).view(self._low.shape))
        elif precision is not FP32:
            self.floats.copy_(codes)
        if fine is not None:
            torch.index_select(fine, 0, self._table, out=self._fine)
            factors = self._factors.copy_(self._fine).mul_(1 / FINE_STEPS).exp2_()
            self._vectors.mul_(factors.transpose(1, 2).unsqueeze(3))


def fetched_scale(precision: Precision) -> float:
    """What a fetched float must be multiplied by, beside its scale."""
    return FP8_IN_HALF if precision is FP8 else 1.0


def _room(scratch: Scratch, first: int, size_bytes: int, dtype: torch.dtype) -> Tensor:
    return scratch.codes[first : first + size_bytes].view(dtype)
