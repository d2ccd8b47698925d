"""Decode attention on a CPU: single queries of several sequences at a time, over gathered KV.

Sequences are taken in groups whose gathered KV fits in a core's cache: gathering row by row into a reused
buffer and reading it back at once is what makes pages nearly as fast as contiguous memory. Sequences of a
group are padded to its longest; `grouped` ends a group before padding costs more than another call, so
callers sort spans by context. A group costs two kernel calls and a copy a layer, however many sequences it
holds.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvkernels.codec import Gather, fetched_scale
from kvkernels.geometry import FLOAT_BYTES, GATHER_BYTES, TILE_ROWS, Geometry, Span
from kvkernels.precision import FP32, Precision
from kvkernels.scratch import Scratch, indices

_PADDING_LIMIT = 1.25
_FREE_PADDING_TOKENS = 256
"""A group's padded size may be this many times its real size and this much more; beyond it, calling again is
cheaper than attending to padding."""


def grouped(
    spans: Sequence[Span], geometry: Geometry, gather_bytes: int = GATHER_BYTES
) -> Iterator[Sequence[Span]]:
    """Split single-token spans of consecutive rows into groups to be gathered together."""
    # A block may be larger than the budget; it is then gathered alone.
    budget_blocks = max(1, gather_bytes // (geometry.block_floats * FLOAT_BYTES))
    free_padding_blocks = _FREE_PADDING_TOKENS // geometry.block_size
    widths = [geometry.blocks_for(span.context) for span in spans]
    # As many groups as the budget asks for, of like size: a small rest costs a whole call.
    size = min(TILE_ROWS, -(-len(spans) // max(1, -(-sum(widths) // budget_blocks))))
    first = 0
    while first < len(spans):
        end, widest, total = first, 0, 0
        while end < len(spans) and end - first < size:
            widest, total = max(widest, widths[end]), total + widths[end]
            padded = widest * (end - first + 1)
            if end > first and (
                padded > budget_blocks or padded > _PADDING_LIMIT * total + free_padding_blocks
            ):
                break
            end += 1
        yield spans[first:end]
        first = end


class DecodeGroup:
    """One group's views, made once a step and used in every layer."""

    def __init__(
        self,
        spans: Sequence[Span],
        geometry: Geometry,
        scratch: Scratch,
        query: Tensor,
        out: Tensor,
        precision: Precision = FP32,
    ) -> None:
        size, first = len(spans), spans[0].first_row
        contexts = [span.context for span in spans]
        longest = max(contexts)
        width = geometry.blocks_for(longest)
        # Padding repeats a block of the same sequence: finite numbers that the mask then hides.
        table: list[int] = []
        for span in spans:
            used = geometry.blocks_for(span.context)
            table += span.blocks[:used]
            table += span.blocks[:1] * (width - used)
        device = query.device
        self._gather = Gather(indices(table, device), geometry, precision, scratch)
        self._factor = fetched_scale(precision)
        kv_heads, group, dim = geometry.kv_heads, geometry.group, geometry.head_dim
        strides = (width * geometry.block_floats, dim, geometry.token_floats, 1)
        shape = (size, kv_heads, longest, dim)
        self._keys = scratch.gathered.as_strided(shape, strides, 0)
        self._values = scratch.gathered.as_strided(shape, strides, kv_heads * dim)
        # Query heads that share a KV head become rows of one small matrix: KV is read once for all of them.
        rows = query[first : first + size]
        self._query = rows.view(size, kv_heads, group, dim)
        self._out = out[first : first + size].view(size, kv_heads, group, dim)
        self._mask: Tensor | None = None
        window = geometry.window
        if min(contexts) < longest or (window is not None and longest > window):
            columns, ends = scratch.columns[:longest], torch.tensor(contexts, device=device).unsqueeze(1)
            hidden = columns >= ends
            if window is not None:
                hidden |= columns < ends - window
            mask = torch.zeros(size, longest, device=device).masked_fill_(hidden, float("-inf"))
            self._mask = mask.view(size, 1, 1, longest)

    def attend(self, blocks: Tensor, scales: Tensor | None = None, fine: Tensor | None = None) -> None:
        """As `attention.PagedAttention.attend`."""
        self._gather.fetch(blocks, fine)
        if scales is None:
            self._out.copy_(scaled_dot_product_attention(self._query, self._keys, self._values, self._mask))
            return
        keys, values = (scales * self._factor).unbind()
        self._query.mul_(keys)
        mixed = scaled_dot_product_attention(self._query, self._keys, self._values, self._mask)
        torch.mul(mixed, values, out=self._out)
