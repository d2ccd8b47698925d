"""Paged attention over a ragged batch: what an engine calls. `reference` says what it means.

A step makes one `PagedAttention` for all its spans (prefill chunks, decodes, drafts to verify) and calls
`attend` once a layer. Single-token spans share calls (`cpu.DecodeGroup`; on CUDA one Triton kernel), longer
spans go one by one (`tiled.TiledSpan`).
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

from torch import Tensor

from kvkernels.cpu import DecodeGroup, grouped
from kvkernels.geometry import Geometry, Span
from kvkernels.scratch import Scratch
from kvkernels.tiled import TiledSpan


class _Part(Protocol):
    def attend(self, blocks: Tensor) -> None: ...


class PagedAttention:
    """Bound to a step's `query` and `out` ([rows, heads, head_dim] each), which every layer reuses."""

    def __init__(
        self, spans: Sequence[Span], geometry: Geometry, scratch: Scratch, query: Tensor, out: Tensor
    ) -> None:
        self._parts: list[_Part] = []
        for single, run in groupby(spans, key=lambda span: span.count == 1):
            if not single:
                self._parts += [TiledSpan(span, geometry, scratch, query, out) for span in run]
            elif query.is_cuda:
                self._parts.append(_triton_decode(list(run), geometry, query, out))
            else:
                self._parts += [
                    DecodeGroup(group, geometry, scratch, query, out)
                    for group in grouped(list(run), geometry)
                ]

    def attend(self, blocks: Tensor) -> None:
        """`blocks` is one layer's pool viewed as [blocks, block_floats]."""
        for part in self._parts:
            part.attend(blocks)


def write(tokens: Tensor, slots: Tensor, kv: Tensor) -> None:
    """Put the step's KV into one layer's pool viewed as [token slots, token_floats]."""
    tokens.index_copy_(0, slots, kv)


def _triton_decode(spans: list[Span], geometry: Geometry, query: Tensor, out: Tensor) -> _Part:
    from kvkernels.paged_decode import PagedDecode  # Triton is there only where it is used

    return PagedDecode(spans, geometry, query, out)
