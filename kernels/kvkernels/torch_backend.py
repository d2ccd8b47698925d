"""The kernels in torch, for CPUs. `attention` says what each function does."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from kvkernels.attention import Part
from kvkernels.codec import Gather, encode, encode_rows, fetched_scale
from kvkernels.cpu import DecodeGroup, grouped
from kvkernels.geometry import TILE_ROWS, Geometry, Span
from kvkernels.precision import FP32, Precision
from kvkernels.scratch import Scratch, indices
from kvkernels.tiled import TiledSpan


def parts(
    spans: Sequence[Span],
    geometry: Geometry,
    scratch: Scratch,
    query: Tensor,
    out: Tensor,
    precision: Precision,
) -> Iterator[Part]:
    """Single-token spans share calls, longer ones go one by one."""
    for single, run in groupby(spans, key=lambda span: span.count == 1):
        if single:
            for group in grouped(list(run), geometry):
                yield DecodeGroup(group, geometry, scratch, query, out, precision)
        else:
            for span in run:
                yield TiledSpan(span, geometry, scratch, query, out, precision)


def write(
    tokens: Tensor,
    slots: Tensor,
    kv: Tensor,
    head_dim: int,
    scratch: Scratch,
    precision: Precision,
    inverse: Tensor | None,
    fine: Tensor | None,
) -> None:
    """O(elements); codes are made in scratch, as many rows at a time as it holds."""
    if precision is FP32:
        tokens.index_copy_(0, slots, kv)
        return
    rows = encode_rows(kv.shape[1], scratch, 0 if fine is None else fine.shape[1])
    for first in range(0, len(kv), rows):
        some, places = kv[first : first + rows], slots[first : first + rows]
        steps = None if fine is None else fine.new_empty(len(some), fine.shape[1])
        tokens.index_copy_(0, places, encode(some, inverse, precision, scratch, steps))
        if fine is not None and steps is not None:
            fine.transpose(1, 2)[places // fine.shape[2], places % fine.shape[2]] = steps


def accumulate(
    mass: Tensor,
    query: Tensor,
    blocks: Tensor,
    spans: Sequence[Span],
    geometry: Geometry,
    scratch: Scratch,
    precision: Precision,
    scales: Tensor | None,
    fine: Tensor | None,
) -> None:
    """One span at a time: a second pass over K, as no attention on a CPU gives its weights away. A tile of
    its rows at a time, so that weights stay small.
    """
    kv_heads, dim = geometry.kv_heads, geometry.head_dim
    factor = dim**-0.5 * fetched_scale(precision)
    for span in spans:
        used = span.blocks[: geometry.blocks_for(span.context)]
        gather = Gather(indices(list(used), query.device), geometry, precision, scratch)
        gather.fetch(blocks, fine)
        keys = gather.floats.view(-1, 2, kv_heads, dim)[: span.context, 0]
        rows = query[span.first_row : span.first_row + span.count].unflatten(1, (kv_heads, -1))
        rows = rows * factor if scales is None else rows * (scales[0] * factor)
        drawn = torch.zeros(kv_heads, span.context, device=query.device)
        for at in range(0, span.count, TILE_ROWS):
            some = rows[at : at + TILE_ROWS]
            seen = span.start + at + len(some)
            scores = torch.einsum("rhgd,phd->hgrp", some, keys[:seen])
            if len(some) > 1:
                scores += scratch.causal(span.start + at, len(some))
            drawn[:, :seen] += scores.softmax(-1).sum((1, 2))
        slots = Span(0, span.context, span.context, span.blocks).slots(geometry.block_size)
        mass.index_add_(0, indices(slots, query.device), drawn.T)


def copy(blocks: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Through a temporary as large as what is copied."""
    sources, destinations = (indices(list(side), blocks.device) for side in zip(*pairs, strict=True))
    blocks.index_copy_(0, destinations, torch.index_select(blocks, 0, sources))


def rescale(
    blocks: Tensor,
    rows: Tensor,
    ratio: Tensor,
    geometry: Geometry,
    scratch: Scratch,
    precision: Precision,
) -> None:
    """In scratch alone; so as many rows at a time as it holds."""
    size = max(1, scratch.gathered.numel() // geometry.block_floats)
    ratio = ratio * fetched_scale(precision)
    for some in rows.split(size):
        gather = Gather(some, geometry, precision, scratch)
        gather.fetch(blocks)
        floats = gather.floats.view(-1, geometry.token_floats)
        codes = encode(floats, ratio, precision, scratch)
        blocks.index_copy_(0, some, codes.view(len(some), -1))
