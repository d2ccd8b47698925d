"""Paged KV and attention over it: what an engine calls. `reference` says what it means.

A step makes one `PagedAttention` for all its spans of one precision (prefill chunks, decodes, drafts to
verify) and calls `attend` once a layer. Each call goes to one of two backends with the same functions: torch
on a CPU, Triton on CUDA. One test runs both.
"""

import importlib
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from kvkernels.geometry import Geometry, Span
from kvkernels.precision import FP32, Precision
from kvkernels.scratch import Scratch


class Part(Protocol):
    """Spans that are attended to in one go, bound to their rows."""

    def attend(self, blocks: Tensor, scales: Tensor | None = None, fine: Tensor | None = None) -> None: ...


class Backend(Protocol):
    """The functions of `torch_backend` and of `triton_backend`."""

    def parts(
        self,
        spans: Sequence[Span],
        geometry: Geometry,
        scratch: Scratch,
        query: Tensor,
        out: Tensor,
        precision: Precision,
    ) -> Iterable[Part]: ...

    def write(
        self,
        tokens: Tensor,
        slots: Tensor,
        kv: Tensor,
        head_dim: int,
        scratch: Scratch,
        precision: Precision,
        inverse: Tensor | None,
        fine: Tensor | None,
    ) -> None: ...

    def accumulate(
        self,
        mass: Tensor,
        query: Tensor,
        blocks: Tensor,
        spans: Sequence[Span],
        geometry: Geometry,
        scratch: Scratch,
        precision: Precision,
        scales: Tensor | None,
        fine: Tensor | None,
    ) -> None: ...

    def copy(self, blocks: Tensor, pairs: Sequence[tuple[int, int]]) -> None: ...


class PagedAttention:
    """Bound to a step's `query` and `out` ([rows, heads, head_dim] each), which every layer reuses."""

    def __init__(
        self,
        spans: Sequence[Span],
        geometry: Geometry,
        scratch: Scratch,
        query: Tensor,
        out: Tensor,
        precision: Precision = FP32,
    ) -> None:
        backend = backend_of(query.device)
        self._parts = list(backend.parts(spans, geometry, scratch, query, out, precision))

    def attend(self, blocks: Tensor, scales: Tensor | None = None, fine: Tensor | None = None) -> None:
        """`blocks` is one layer's pool viewed as [blocks, elements of a block].

        Where the precision is scaled, `scales` is [2, kv_heads, 1, head_dim] and `query` may be used up.
        `fine` [blocks, 2 * kv_heads, block_size] are the steps of vectors, where they have some.
        """
        for part in self._parts:
            part.attend(blocks, scales, fine)


def write(
    tokens: Tensor,
    slots: Tensor,
    kv: Tensor,
    head_dim: int,
    scratch: Scratch,
    precision: Precision = FP32,
    inverse: Tensor | None = None,
    fine: Tensor | None = None,
) -> None:
    """Put the step's KV into one layer's pool viewed as [token slots, elements of a token].

    `inverse` [2 * kv_heads, head_dim] is one over the scales; with it `kv` may be used up. `fine`
    [blocks, 2 * kv_heads, block_size] takes the step of each vector, which is searched; without it the scales
    of heads are those of vectors too.
    """
    backend_of(kv.device).write(tokens, slots, kv, head_dim, scratch, precision, inverse, fine)


def accumulate(
    mass: Tensor,
    query: Tensor,
    blocks: Tensor,
    spans: Sequence[Span],
    geometry: Geometry,
    scratch: Scratch,
    precision: Precision = FP32,
    scales: Tensor | None = None,
    fine: Tensor | None = None,
) -> None:
    """Add to `mass` [token slots, kv_heads] the attention that each slot draws from the spans' rows.

    It is what heavy-hitter eviction ranks tokens by: the softmax weights of each query, summed over the query
    heads that share a KV head. Nothing is normalised: older tokens have been seen by more queries, and
    whoever ranks must say what that means. `query` [rows, heads, head_dim] is left as it is; so this comes
    before `attend`.
    """
    backend = backend_of(query.device)
    backend.accumulate(mass, query, blocks, spans, geometry, scratch, precision, scales, fine)


def copy(blocks: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks of one layer's pool, (source, destination), whatever they hold.

    Every source is read before any destination is written: a block that was given up and handed out again in
    the same step may be both.
    """
    backend_of(blocks.device).copy(blocks, pairs)


def rescale(
    blocks: Tensor,
    rows: Tensor,
    ratio: Tensor,
    geometry: Geometry,
    scratch: Scratch,
    precision: Precision,
) -> None:
    """Multiply the codes of blocks `rows` by `ratio` [2 * kv_heads, head_dim]: their scales have grown.

    Steps of vectors stay: they multiply whatever the scale is. In torch on any device: it is rare.
    """
    from kvkernels import torch_backend

    torch_backend.rescale(blocks, rows, ratio, geometry, scratch, precision)


def backend_of(device: torch.device) -> Backend:
    """Triton's is imported only where it is used."""
    name = "triton_backend" if device.type == "cuda" else "torch_backend"
    return cast(Backend, importlib.import_module(f"kvkernels.{name}"))
