"""Buffers that paged attention reuses from step to step and layer to layer. One owner, one step at a time.

Fresh memory for gathered KV costs more than the gather itself (each page of it faults), so it is made once.
"""

from array import array

import torch
from torch import Tensor

from kvkernels.geometry import CODE_BYTES, TILE_ROWS, Geometry, scratch_floats


class Scratch:
    """`gathered` takes KV rows of any geometry that fits, `codes` the same in fewer bits;
    `causal(start, rows)` is a view, never a computation.
    """

    def __init__(self, floats: int, max_context: int, device: torch.device) -> None:
        self.gathered = torch.zeros(floats, device=device)
        self.codes = torch.zeros(floats * CODE_BYTES, dtype=torch.uint8, device=device)
        self.max_context = max_context
        # Row i sees column j when j - max_context <= i. A tile whose first query sits at position p reads
        # the columns from max_context - p on: the same numbers serve every offset.
        columns = torch.arange(max_context + TILE_ROWS, device=device) - max_context
        rows = torch.arange(TILE_ROWS, device=device).unsqueeze(1)
        self._mask = torch.zeros(TILE_ROWS, max_context + TILE_ROWS, device=device)
        self._mask.masked_fill_(columns > rows, float("-inf"))
        self.columns = torch.arange(max_context, device=device)
        self._bands: dict[int, Tensor] = {}

    @classmethod
    def for_geometries(cls, geometries: list[Geometry], max_context: int, device: torch.device) -> "Scratch":
        """Large enough for each of several models that run one after the other."""
        floats = max(scratch_floats(geometry, max_context) for geometry in geometries)
        made = cls(floats, max_context, device)
        for window in {geometry.window for geometry in geometries} - {None}:
            made._bands[window] = _band(window, device)
        return made

    def causal(self, start: int, rows: int) -> Tensor:
        """Additive mask [1, 1, rows, start + rows] for queries at `start` and on. At most TILE_ROWS rows."""
        first = self.max_context - start
        return self._mask[:rows, first : first + start + rows].view(1, 1, rows, start + rows)

    def banded(self, window: int, start: int, rows: int) -> Tensor:
        """The same under a sliding window: its columns are the positions that any of the rows sees."""
        hidden = max(0, window - 1 - start)
        return self._bands[window][:rows, hidden : window - 1 + rows].unsqueeze(0).unsqueeze(0)


def _band(window: int, device: torch.device) -> Tensor:
    """Row i sees `window` columns, from column i on."""
    ahead = torch.arange(TILE_ROWS + window - 1, device=device) - torch.arange(
        TILE_ROWS, device=device
    ).unsqueeze(1)
    mask = torch.zeros(ahead.shape, device=device)
    return mask.masked_fill_((ahead < 0) | (ahead >= window), float("-inf"))


def indices(values: list[int], device: torch.device) -> Tensor:
    """An int64 tensor of `values`, made several times faster than torch.tensor makes it."""
    if not values:
        return torch.empty(0, dtype=torch.int64, device=device)
    return torch.frombuffer(array("q", values), dtype=torch.int64).to(device)
