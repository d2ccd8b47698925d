"""The shapes that paged attention works on. No torch.

A pool holds one layer's KV as `[blocks, block_size, 2, kv_heads, head_dim]`: K and V of a token lie
together, so that one gather of whole rows fetches both, and one indexed copy writes both. In fewer bits the
same bytes of a block hold more tokens: a geometry with a larger `block_size`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvkernels.precision import FINE_STEPS, MAX_PACKING

FLOAT_BYTES = 4

GATHER_BYTES = 3 << 20
"""KV gathered at a time. It is read back at once, so it should stay in a core's share of the last-level
cache; less means more calls, which for short sequences costs more than the cache gives.
"""

TILE_ROWS = 128
"""Queries of a long span are taken this many at a time, so that the causal mask stays small."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Of one model's attention. `heads` is a multiple of `kv_heads`."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    window: int | None = None
    """A token sees itself and those before it, this many together; None: all of them."""

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def token_floats(self) -> int:
        return 2 * self.kv_heads * self.head_dim

    @property
    def block_floats(self) -> int:
        return self.block_size * self.token_floats

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def packed(self, packing: int) -> "Geometry":
        """The same block when it holds `packing` times as many tokens."""
        return replace(self, block_size=self.block_size * packing)


@dataclass(slots=True)
class Span:
    """`count` new tokens of one sequence, in rows `first_row` and on; `context` counts them and all before
    them.
    """

    first_row: int
    count: int
    context: int
    blocks: Sequence[int]

    @property
    def start(self) -> int:
        """Position of the first new token."""
        return self.context - self.count

    def slots(self, block_size: int) -> list[int]:
        """Where in a pool the new tokens' KV lies, counted in tokens."""
        blocks = self.blocks
        return [
            blocks[position // block_size] * block_size + position % block_size
            for position in range(self.start, self.context)
        ]


def scratch_floats(geometry: Geometry, max_context: int) -> int:
    """Room for the gathered KV of the longest sequence, or of a group of short ones, at any packing."""
    largest = geometry.packed(MAX_PACKING)
    longest = largest.blocks_for(max_context) * largest.block_floats
    return max(longest, GATHER_BYTES // FLOAT_BYTES)


CODE_BYTES = 3
"""Beside each gathered float: its code, and what it is on the way to a float."""


def band_floats(window: int | None) -> int:
    """The mask of one tile under a sliding window; see `scratch.Scratch`."""
    return 0 if window is None else TILE_ROWS * (TILE_ROWS + window - 1)


def mask_floats(max_context: int) -> int:
    """The causal mask of one tile at any offset; see `scratch.Scratch`."""
    return TILE_ROWS * (max_context + TILE_ROWS)


MANTISSA_BITS = 8
MANTISSAS = 1 << MANTISSA_BITS
"""Rows of the table by which fine scales are searched; see `fine`."""

SEARCHED_VECTORS = 512
"""At a time, so that what a search reads back is still in a core's cache."""


def search_bytes(head_dim: int) -> int:
    """The most that a search holds at once: values, rows, weights, errors, what follows; and its tables."""
    a_vector = 4 * (3 * head_dim + FINE_STEPS) + 64
    return SEARCHED_VECTORS * a_vector + 4 * (MANTISSAS + 1) * FINE_STEPS
