"""Decode attention in Triton: one program a sequence and KV head walks that sequence's block table.

Online softmax over blocks, fp32. The query heads of a KV head are rows of one tile, so KV is read once for
all of them. Tested on Triton's CPU interpreter against `reference`; O(context) a program.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvkernels.geometry import Geometry, Span


@triton.jit
def _kernel(
    query,
    pool,
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
    BLOCK_PADDED: tl.constexpr,
):
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    heads = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, DIM_PADDED)
    slots = tl.arange(0, BLOCK_PADDED)
    cell = (kv_head * GROUP + heads[:, None]) * DIM + dims[None, :]
    cell_mask = (heads[:, None] < GROUP) & (dims[None, :] < DIM)
    q = tl.load(query + sequence * query_row_stride + cell, mask=cell_mask, other=0.0) * scale

    context = tl.load(contexts + sequence)
    best = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    mixed = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
    token_stride = 2 * KV_HEADS * DIM
    for block_index in range(tl.cdiv(context, BLOCK_SIZE)):
        block = tl.load(tables + sequence * table_stride + block_index).to(tl.int64)
        seen = (slots < BLOCK_SIZE) & (block_index * BLOCK_SIZE + slots < context)
        rows = (block * BLOCK_SIZE + slots) * token_stride + kv_head * DIM
        at = rows[:, None] + dims[None, :]
        mask = seen[:, None] & (dims[None, :] < DIM)
        k = tl.load(pool + at, mask=mask, other=0.0)
        v = tl.load(pool + at + KV_HEADS * DIM, mask=mask, other=0.0)
        scores = tl.sum(q[:, None, :] * k[None, :, :], axis=2)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp(best - new_best)
        weights = tl.exp(scores - new_best[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None] + tl.sum(weights[:, :, None] * v[None, :, :], axis=1)
        best = new_best
    tl.store(out + sequence * out_row_stride + cell, mixed / total[:, None], mask=cell_mask)


class PagedDecode:
    """Single-token spans of consecutive rows, whatever their contexts: no padding, no gather."""

    def __init__(self, spans: Sequence[Span], geometry: Geometry, query: Tensor, out: Tensor) -> None:
        width = max(geometry.blocks_for(span.context) for span in spans)
        tables = [[*span.blocks[:width], *[0] * (width - len(span.blocks))] for span in spans]
        self._tables = torch.tensor(tables, dtype=torch.int32, device=query.device)
        contexts = [span.context for span in spans]
        self._contexts = torch.tensor(contexts, dtype=torch.int32, device=query.device)
        first, self._geometry = spans[0].first_row, geometry
        self._query = query[first : first + len(spans)]
        self._out = out[first : first + len(spans)]

    def attend(self, blocks: Tensor) -> None:
        """`blocks` is one layer's pool, a row a block."""
        geometry = self._geometry
        _kernel[(self._query.shape[0], geometry.kv_heads)](
            self._query,
            blocks,
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
            BLOCK_PADDED=triton.next_power_of_2(geometry.block_size),
        )
