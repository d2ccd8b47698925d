"""The kernels in Triton, for CUDA. `attention` says what each function does; scratch is not needed here."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from torch import Tensor

from kvkernels import block_copy, heavy_hitters, paged_write, torch_backend
from kvkernels.attention import Part
from kvkernels.geometry import Geometry, Span
from kvkernels.paged_decode import PagedDecode
from kvkernels.paged_prefill import PagedPrefill
from kvkernels.precision import Precision
from kvkernels.scratch import Scratch


def parts(
    spans: Sequence[Span],
    geometry: Geometry,
    scratch: Scratch,
    query: Tensor,
    out: Tensor,
    precision: Precision,
) -> Iterator[Part]:
    """One launch for all single-token spans in a row, one for all longer ones in a row."""
    for single, run in groupby(spans, key=lambda span: span.count == 1):
        yield (PagedDecode if single else PagedPrefill)(list(run), geometry, query, out, precision)


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
    paged_write.write(tokens, slots, kv, head_dim, precision, inverse, fine)


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
    heavy_hitters.accumulate(mass, query, blocks, spans, geometry, precision, scales, fine)


def copy(blocks: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Programs run in no order: where a source is a destination too, torch goes through a temporary."""
    if {source for source, _ in pairs}.isdisjoint(destination for _, destination in pairs):
        block_copy.copy(blocks, pairs)
    else:
        torch_backend.copy(blocks, pairs)
