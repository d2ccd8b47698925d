"""How much attention each stored token has drawn from the sequence that holds it, by layer and KV head.

One number a token slot, layer and KV head, for the whole pool: 1 / (2 x head_dim) of what fp32 KV takes, and
a part of the memory plan (`--heavy-hitters`). Sequences that are scored share no blocks but with their own
forks, so a slot's number is of one sequence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvengine.kv.storage import KvStorage, Stored
from kvkernels import attention
from kvkernels.geometry import Span
from kvkernels.scratch import Scratch, indices


class Mass:
    """Of one pool. `whole` is [layers, token slots, kv_heads], `layers` its parts."""

    def __init__(self, storage: KvStorage) -> None:
        geometry, blocks = storage.geometry, len(storage.blocks[0])
        shape, device = (blocks * geometry.block_size, geometry.kv_heads), storage.blocks[0].device
        self.whole = torch.zeros(len(storage.blocks), *shape, device=device)
        self.layers = list(self.whole.unbind())
        self._block_size = geometry.block_size

    def add(self, layer: int, query: Tensor, stored: Stored, spans: Sequence[Span], scratch: Scratch) -> None:
        """What the spans' rows of `query` see in this layer; their own slots begin at zero."""
        mass = self.layers[layer]
        fresh = [slot for span in spans for slot in span.slots(self._block_size)]
        mass.index_fill_(0, indices(fresh, mass.device), 0.0)
        blocks, scales, fine = stored.blocks[layer], stored.scales(layer), stored.fine(layer)
        geometry, precision = stored.geometry, stored.precision
        attention.accumulate(mass, query, blocks, spans, geometry, scratch, precision, scales, fine)

    def of_blocks(self, blocks: Sequence[int], tokens: int) -> list[float]:
        """Sums over layers, heads and the first `tokens` tokens of the table `blocks`."""
        rows = indices(list(blocks), self.layers[0].device)
        total = sum(
            layer.view(-1, self._block_size, layer.shape[1]).index_select(0, rows).sum(2)
            for layer in self.layers
        )
        assert isinstance(total, Tensor)
        total.view(-1)[tokens:] = 0
        sums: list[float] = total.sum(1).tolist()
        return sums

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Along with the blocks."""
        for layer in self.layers:
            attention.copy(layer.view(-1, self._block_size * layer.shape[1]), copies)
