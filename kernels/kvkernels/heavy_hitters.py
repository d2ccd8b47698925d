"""Heavy-hitter accumulation in Triton: one program a query row and KV head, two walks over the block table.

The first walk finds each head's softmax normaliser, the second adds weights to `mass`. Additions are atomic:
sequences that share blocks add to the same slots, in no fixed order, so sums agree to fp32 rounding only.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvkernels.geometry import Geometry, Span
from kvkernels.paged_decode import TILE_POSITIONS, padded_tables
from kvkernels.precision import FP32, INT4, Precision
from kvkernels.triton_codes import as_kernel_pool, load_factors, load_values


@triton.jit
def _kernel(
    mass,
    query,
    pool,
    scales,
    fine,
    tables,
    lines,
    query_row_stride,
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
):
    line, kv_head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(lines + line * 3)
    row = tl.load(lines + line * 3 + 1)
    context = tl.load(lines + line * 3 + 2)
    heads = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, DIM_PADDED)
    within = tl.arange(0, TILE)
    cell = (kv_head * GROUP + heads[:, None]) * DIM + dims[None, :]
    cell_mask = (heads[:, None] < GROUP) & (dims[None, :] < DIM)
    q = tl.load(query + row * query_row_stride + cell, mask=cell_mask, other=0.0) * scale
    if SCALED:
        key_scale = tl.load(scales + kv_head * DIM + dims, mask=dims < DIM, other=0.0)
        q = q * key_scale[None, :]
    best = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    token_stride = 2 * KV_HEADS * DIM
    for walk in tl.static_range(2):
        for first in range(0, context, TILE):
            positions = first + within
            seen = positions < context
            block = tl.load(tables + sequence * table_stride + positions // BLOCK_SIZE, mask=seen, other=0)
            slots = block.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
            mask = seen[:, None] & (dims[None, :] < DIM)
            rows = slots[:, None] * token_stride + kv_head * DIM
            k = load_values(pool, rows, dims[None, :], mask, DIM, INT4)
            scores = tl.sum(q[:, None, :] * k[None, :, :], axis=2)
            if FINE:
                there = positions % BLOCK_SIZE
                factors = load_factors(fine, block, there, kv_head, seen, 2 * KV_HEADS, BLOCK_SIZE)
                scores = scores * factors[None, :]
            scores = tl.where(seen[None, :], scores, float("-inf"))
            if walk == 0:
                new_best = tl.maximum(best, tl.max(scores, axis=1))
                weights = tl.exp(scores - new_best[:, None])
                total = total * tl.exp(best - new_best) + tl.sum(weights, axis=1)
                best = new_best
            else:
                weights = tl.exp(scores - best[:, None]) / total[:, None]
                weights = tl.where(heads[:, None] < GROUP, weights, 0.0)
                tl.atomic_add(mass + slots * KV_HEADS + kv_head, tl.sum(weights, axis=0), mask=seen)


def accumulate(
    mass: Tensor,
    query: Tensor,
    blocks: Tensor,
    spans: Sequence[Span],
    geometry: Geometry,
    precision: Precision = FP32,
    scales: Tensor | None = None,
    fine: Tensor | None = None,
) -> None:
    """As `attention.accumulate`."""
    tables = padded_tables(spans, geometry, query.device)
    lines = [
        (number, span.first_row + row, span.start + row + 1)
        for number, span in enumerate(spans)
        for row in range(span.count)
    ]
    _kernel[(len(lines), geometry.kv_heads)](
        mass,
        query,
        as_kernel_pool(blocks, precision),
        query if scales is None else scales,
        query if fine is None else fine,
        tables,
        torch.tensor(lines, dtype=torch.int32, device=query.device),
        query.stride(0),
        tables.stride(0),
        geometry.head_dim**-0.5,
        KV_HEADS=geometry.kv_heads,
        GROUP=geometry.group,
        GROUP_PADDED=triton.next_power_of_2(geometry.group),
        DIM=geometry.head_dim,
        DIM_PADDED=triton.next_power_of_2(geometry.head_dim),
        BLOCK_SIZE=geometry.block_size,
        TILE=TILE_POSITIONS,
        SCALED=precision.scaled,
        FINE=fine is not None,
        INT4=precision is INT4,
    )
