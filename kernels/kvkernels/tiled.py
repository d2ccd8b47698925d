"""Attention of a span of several tokens (a prefill chunk, drafts to verify) over its sequence's pages.

The sequence's KV is gathered once a layer; queries go through it in tiles of TILE_ROWS, each up to its own
last position. So the mask is small and the upper triangle is mostly not computed. The same code serves any
device.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvkernels.codec import Gather, fetched_scale
from kvkernels.geometry import TILE_ROWS, Geometry, Span
from kvkernels.precision import FP32, Precision
from kvkernels.scratch import Scratch, indices


class TiledSpan:
    """One span's views, made once a step and used in every layer."""

    def __init__(
        self,
        span: Span,
        geometry: Geometry,
        scratch: Scratch,
        query: Tensor,
        out: Tensor,
        precision: Precision = FP32,
    ) -> None:
        table = indices(list(span.blocks[: geometry.blocks_for(span.context)]), query.device)
        self._gather = Gather(table, geometry, precision, scratch)
        self._factor = fetched_scale(precision)
        kv_heads, group, dim = geometry.kv_heads, geometry.group, geometry.head_dim
        # KV heads become the batch and their query heads its heads, with stride 0 over the shared K and V.
        shape, strides = (kv_heads, group, span.context, dim), (dim, 0, geometry.token_floats, 1)
        keys = scratch.gathered.as_strided(shape, strides, 0)
        values = scratch.gathered.as_strided(shape, strides, kv_heads * dim)
        self._tiles: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        for at in range(0, span.count, TILE_ROWS):
            rows = min(TILE_ROWS, span.count - at)
            first, seen = span.first_row + at, span.start + at + rows
            window, oldest, mask = geometry.window, 0, scratch.causal
            if window is not None:
                oldest, mask = max(0, seen - rows - window + 1), partial(scratch.banded, window)
            self._tiles.append(
                (
                    _by_kv_head(query[first : first + rows], kv_heads),
                    keys[:, :, oldest:seen],
                    values[:, :, oldest:seen],
                    mask(seen - rows, rows),
                    _by_kv_head(out[first : first + rows], kv_heads),
                )
            )

    def attend(self, blocks: Tensor, scales: Tensor | None = None, fine: Tensor | None = None) -> None:
        """As `attention.PagedAttention.attend`."""
        self._gather.fetch(blocks, fine)
        if scales is None:
            for query, keys, values, mask, out in self._tiles:
                out.copy_(scaled_dot_product_attention(query, keys, values, mask))
            return
        key_scales, value_scales = (scales * self._factor).unsqueeze(2).unbind()
        for query, keys, values, mask, out in self._tiles:
            query.mul_(key_scales)
            mixed = scaled_dot_product_attention(query, keys, values, mask)
            torch.mul(mixed, value_scales, out=out)


def _by_kv_head(rows: Tensor, kv_heads: int) -> Tensor:
    """[rows, heads, dim] as [kv_heads, heads // kv_heads, rows, dim]."""
    count, heads, dim = rows.shape
    return rows.view(count, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
