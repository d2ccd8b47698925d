"""Chunked-prefill attention in Triton: one program a tile of queries and a head walks the block table.

Causal over true positions: query at p sees positions 0 to p, of which those before the chunk were written by
earlier steps. Online softmax, fp32 products. Tested on Triton's CPU interpreter; O(tile x context) a program.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvkernels.geometry import Geometry, Span
from kvkernels.paged_decode import padded_tables
from kvkernels.precision import FP32, INT4, Precision
from kvkernels.triton_codes import as_kernel_pool, load_factors, load_values

TILE_QUERIES = 16
TILE_POSITIONS = 32


@triton.jit
def _kernel(
    query,
    pool,
    scales,
    fine,
    tables,
    tiles,
    out,
    query_row_stride,
    out_row_stride,
    table_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    SCALED: tl.constexpr,
    FINE: tl.constexpr,
    INT4: tl.constexpr,
    WINDOW: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // GROUP
    sequence = tl.load(tiles + tile * 4)
    first_row = tl.load(tiles + tile * 4 + 1)
    count = tl.load(tiles + tile * 4 + 2)
    start = tl.load(tiles + tile * 4 + 3)
    lines = tl.arange(0, QUERIES)
    dims = tl.arange(0, DIM_PADDED)
    within = tl.arange(0, TILE)
    cell_mask = (lines[:, None] < count) & (dims[None, :] < DIM)
    line_rows = first_row + lines[:, None]
    at = query + line_rows * query_row_stride + head * DIM + dims[None, :]
    q = tl.load(at, mask=cell_mask, other=0.0) * scale
    if SCALED:
        key_scale = tl.load(scales + kv_head * DIM + dims, mask=dims < DIM, other=0.0)
        q = q * key_scale[None, :]

    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, DIM_PADDED], tl.float32)
    token_stride = 2 * KV_HEADS * DIM
    context = start + count
    begin = 0
    if WINDOW:
        begin = tl.maximum(start - WINDOW + 1, 0) // TILE * TILE
    for first in range(begin, context, TILE):
        positions = first + within
        inside = positions < context
        block = tl.load(tables + sequence * table_stride + positions // BLOCK_SIZE, mask=inside, other=0)
        rows = (block.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE) * token_stride + kv_head * DIM
        mask = inside[:, None] & (dims[None, :] < DIM)
        k = load_values(pool, rows[:, None], dims[None, :], mask, DIM, INT4)
        v = load_values(pool, rows[:, None] + KV_HEADS * DIM, dims[None, :], mask, DIM, INT4)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if FINE:
            there = positions % BLOCK_SIZE
            factors = load_factors(fine, block, there, kv_head, inside, 2 * KV_HEADS, BLOCK_SIZE)
            scores = scores * factors[None, :]
        seen = inside[None, :] & (positions[None, :] <= start + lines[:, None])
        if WINDOW:
            seen = seen & (positions[None, :] > start + lines[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        # Position 0 is seen by every line, so without a window no line's first tile is all hidden.
        finite = new_best
        if WINDOW:
            finite = tl.where(new_best > float("-inf"), new_best, 0.0)
        shrink = tl.exp(best - finite)
        weights = tl.exp(scores - finite[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        if FINE:
            factors = load_factors(fine, block, there, KV_HEADS + kv_head, inside, 2 * KV_HEADS, BLOCK_SIZE)
            weights = weights * factors[None, :]
        mixed = mixed * shrink[:, None] + tl.dot(weights, v, input_precision="ieee")
        best = new_best
    result = mixed / total[:, None]
    if SCALED:
        value_scale = tl.load(scales + (KV_HEADS + kv_head) * DIM + dims, mask=dims < DIM, other=0.0)
        result = result * value_scale[None, :]
    tl.store(out + line_rows * out_row_stride + head * DIM + dims[None, :], result, mask=cell_mask)


class PagedPrefill:
    """Spans of several tokens, all in one launch, whatever their lengths and contexts."""

    def __init__(
        self,
        spans: Sequence[Span],
        geometry: Geometry,
        query: Tensor,
        out: Tensor,
        precision: Precision = FP32,
    ) -> None:
        self._tables = padded_tables(spans, geometry, query.device)
        tiles = [
            (number, span.first_row + at, min(TILE_QUERIES, span.count - at), span.start + at)
            for number, span in enumerate(spans)
            for at in range(0, span.count, TILE_QUERIES)
        ]
        self._tiles = torch.tensor(tiles, dtype=torch.int32, device=query.device)
        self._geometry, self._precision, self._query, self._out = geometry, precision, query, out

    def attend(self, blocks: Tensor, scales: Tensor | None = None, fine: Tensor | None = None) -> None:
        """As `attention.PagedAttention.attend`."""
        geometry = self._geometry
        _kernel[(len(self._tiles), geometry.heads)](
            self._query,
            as_kernel_pool(blocks, self._precision),
            self._query if scales is None else scales,
            self._query if fine is None else fine,
            self._tables,
            self._tiles,
            self._out,
            self._query.stride(0),
            self._out.stride(0),
            self._tables.stride(0),
            geometry.head_dim**-0.5,
            KV_HEADS=geometry.kv_heads,
            GROUP=geometry.group,
            DIM=geometry.head_dim,
            DIM_PADDED=max(16, triton.next_power_of_2(geometry.head_dim)),
            BLOCK_SIZE=geometry.block_size,
            QUERIES=TILE_QUERIES,
            TILE=TILE_POSITIONS,
            SCALED=self._precision.scaled,
            FINE=fine is not None,
            INT4=self._precision is INT4,
            WINDOW=geometry.window or 0,
        )
