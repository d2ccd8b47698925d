"""Decode attention in Triton: one program a sequence and KV head walks that sequence's block table.

Online softmax over blocks, fp32. The query heads of a KV head are rows of one tile, so KV is read once for
all of them, in as many bits as it is stored in: scales of codes go into the query and into the result.
Tested on Triton's CPU interpreter against `reference`; O(context) a program.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvkernels.geometry import Geometry, Span
from kvkernels.precision import FP32, INT4, Precision
from kvkernels.triton_codes import as_kernel_pool, load_factors, load_values


@triton.jit
def _kernel(
    query,
    pool,
    scales,
    fine,
    tables,
    contexts,
    out,
    query_row_stride,
    out_row_stride,
    table_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SCALED: tl.constexpr,
    FINE: tl.constexpr,
    INT4: tl.constexpr,
    WINDOW: tl.constexpr,
):
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    heads = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, DIM_PADDED)
    within = tl.arange(0, TILE)
    cell = (kv_head * GROUP + heads[:, None]) * DIM + dims[None, :]
    cell_mask = (heads[:, None] < GROUP) & (dims[None, :] < DIM)
    q = tl.load(query + sequence * query_row_stride + cell, mask=cell_mask, other=0.0) * scale
    if SCALED:
        key_scale = tl.load(scales + kv_head * DIM + dims, mask=dims < DIM, other=0.0)
        q = q * key_scale[None, :]

    context = tl.load(contexts + sequence)
    best = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    mixed = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
    token_stride = 2 * KV_HEADS * DIM
    # A tile never straddles blocks unless blocks are smaller than it; each position finds its own block.
    begin = 0
    if WINDOW:
        begin = tl.maximum(context - WINDOW, 0) // TILE * TILE
    for first in range(begin, context, TILE):
        positions = first + within
        seen = positions < context
        if WINDOW:
            seen = seen & (positions >= context - WINDOW)
        block = tl.load(tables + sequence * table_stride + positions // BLOCK_SIZE, mask=seen, other=0)
        rows = (block.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE) * token_stride + kv_head * DIM
        mask = seen[:, None] & (dims[None, :] < DIM)
        k = load_values(pool, rows[:, None], dims[None, :], mask, DIM, INT4)
        v = load_values(pool, rows[:, None] + KV_HEADS * DIM, dims[None, :], mask, DIM, INT4)
        scores = tl.sum(q[:, None, :] * k[None, :, :], axis=2)
        if FINE:
            there = positions % BLOCK_SIZE
            factors = load_factors(fine, block, there, kv_head, seen, 2 * KV_HEADS, BLOCK_SIZE)
            scores = scores * factors[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp(best - new_best)
        weights = tl.exp(scores - new_best[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        if FINE:
            factors = load_factors(fine, block, there, KV_HEADS + kv_head, seen, 2 * KV_HEADS, BLOCK_SIZE)
            weights = weights * factors[None, :]
        mixed = mixed * shrink[:, None] + tl.sum(weights[:, :, None] * v[None, :, :], axis=1)
        best = new_best
    result = mixed / total[:, None]
    if SCALED:
        value_scale = tl.load(scales + (KV_HEADS + kv_head) * DIM + dims, mask=dims < DIM, other=0.0)
        result = result * value_scale[None, :]
    tl.store(out + sequence * out_row_stride + cell, result, mask=cell_mask)


class PagedDecode:
    """Single-token spans of consecutive rows, whatever their contexts: no padding, no gather."""

    def __init__(
        self,
        spans: Sequence[Span],
        geometry: Geometry,
        query: Tensor,
        out: Tensor,
        precision: Precision = FP32,
    ) -> None:
        self._tables = padded_tables(spans, geometry, query.device)
        contexts = [span.context for span in spans]
        self._contexts = torch.tensor(contexts, dtype=torch.int32, device=query.device)
        first, self._geometry, self._precision = spans[0].first_row, geometry, precision
        self._query = query[first : first + len(spans)]
        self._out = out[first : first + len(spans)]

    def attend(self, blocks: Tensor, scales: Tensor | None = None, fine: Tensor | None = None) -> None:
        """As `attention.PagedAttention.attend`."""
        geometry = self._geometry
        _kernel[(self._query.shape[0], geometry.kv_heads)](
            self._query,
            as_kernel_pool(blocks, self._precision),
            self._query if scales is None else scales,
            self._query if fine is None else fine,
            self._tables,
            self._contexts,
            self._out,
            self._query.stride(0),
            self._out.stride(0),
            self._tables.stride(0),
            geometry.head_dim**-0.5,
            KV_HEADS=geometry.kv_heads,
            GROUP=geometry.group,
            GROUP_PADDED=triton.next_power_of_2(geometry.group),
            DIM=geometry.head_dim,
            DIM_PADDED=triton.next_power_of_2(geometry.head_dim),
            BLOCK_SIZE=geometry.block_size,
            TILE=TILE_POSITIONS,
            SCALED=self._precision.scaled,
            FINE=fine is not None,
            INT4=self._precision is INT4,
            WINDOW=geometry.window or 0,
        )


TILE_POSITIONS = 16
"""Positions that a program takes at a time."""


def padded_tables(spans: Sequence[Span], geometry: Geometry, device: torch.device) -> Tensor:
    """The spans' block tables as rows of one tensor."""
    width = max(geometry.blocks_for(span.context) for span in spans)
    tables = [[*span.blocks[:width], *[0] * (width - len(span.blocks))] for span in spans]
    return torch.tensor(tables, dtype=torch.int32, device=device)
