"""The KV pool's memory: one tensor, a part of it each layer's, in a view for each precision. Which block
holds what is `kv.pool`'s business; which precision a sequence has is the scheduler's.

Zeroed at the start, and again when a block changes its precision: attention multiplies hidden positions by
zero, and zero times what other bits mean as a float is not always zero. Scales of single vectors lie in a
plane beside it, block by block, and go where the block goes; any byte is a valid one.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvengine.kv.precisions import FULL, Precisions, fine_packing
from kvengine.kv.scales import Scales
from kvkernels import attention
from kvkernels.codec import DTYPES
from kvkernels.geometry import FLOAT_BYTES, Geometry
from kvkernels.scratch import Scratch

_CHANGED_AT_ONCE = 16
"""Blocks whose codes are moved to larger scales in one go."""


class KvStorage:
    """Of one model. `geometry`, `blocks` and `tokens` are those of the pool's own precision."""

    def __init__(
        self,
        layers: int,
        blocks: int,
        geometry: Geometry,
        device: torch.device | str,
        precisions: Precisions = FULL,
    ) -> None:
        self.geometry = geometry
        self.precisions = precisions
        block_bytes = geometry.block_floats * FLOAT_BYTES * precisions.own.bits // 32
        self.whole = torch.zeros(layers, blocks, block_bytes, dtype=torch.uint8, device=device)
        """[layers, blocks, block_bytes]"""
        self._memory = list(self.whole.unbind())
        fine = blocks, 2 * geometry.kv_heads, geometry.block_size * fine_packing(precisions)
        self.fine = torch.zeros(layers, *fine, dtype=torch.uint8, device=device)
        """[layers, blocks, 2 * kv_heads, tokens of a block at the precision that has them, or 0]"""
        self._packings = [1] * blocks
        """What each block was last written in."""
        self._mixed = False
        self._stored = {
            self.precisions.own.bits // one.bits: Stored(self, self.precisions.own.bits // one.bits)
            for one in precisions.offered
        }

        own = self.at(1)
        self.blocks, self.tokens = own.blocks, own.tokens

    @property
    def memory(self) -> Sequence[Tensor]:
        """Each layer's bytes, [blocks, block_bytes]."""
        return self._memory

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers, with what lies beside it."""
        return (self.whole.nbytes + self.fine.nbytes) // self.whole.shape[1]

    def at(self, packing: int) -> "Stored":
        """The pool as sequences of this packing see it."""
        return self._stored[packing]

    def claim(self, packing: int, blocks: Iterable[int]) -> None:
        """These are about to be written at this packing."""
        if packing == 1 and not self._mixed:
            return
        self._mixed = True
        changed = [block for block in blocks if self._packings[block] != packing]
        if not changed:
            return
        rows = torch.tensor(changed, device=self._memory[0].device)
        for layer in self._memory:
            layer.index_fill_(0, rows, 0)
        for block in changed:
            self._packings[block] = packing

    def claimed(self, packing: int) -> list[int]:
        """Blocks that hold, or held last, tokens of this packing. O(blocks)."""
        return [block for block, one in enumerate(self._packings) if one == packing]

    def turn(self, blocks: Sequence[int], rotation: Tensor) -> None:
        """Move the keys of blocks at the pool's own precision, which stores values, to other positions.

        `rotation` [head_dim / 2], complex, is how far. In bf16 each move rounds once more.
        """
        own, geometry = self.at(1), self.geometry
        rows = torch.tensor(list(blocks), device=self._memory[0].device)
        for layer in own.blocks:
            tokens = layer.index_select(0, rows).float()
            keys = tokens.view(-1, 2, geometry.kv_heads, geometry.head_dim // 2, 2)[:, 0]
            torch.view_as_complex(keys).mul_(rotation)
            layer.index_copy_(0, rows, tokens.to(layer.dtype))

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination): as if all were read, then all written."""
        for layer in self._memory:
            attention.copy(layer, copies)
        if self.fine.numel():
            for steps in self.fine.flatten(2):
                attention.copy(steps, copies)
        packings = [self._packings[source] for source, _ in copies]
        for (_, destination), packing in zip(copies, packings, strict=True):
            self._packings[destination] = packing


class Stored:
    """One precision's view of a pool: `blocks[layer]` and `tokens[layer]` are the same memory."""

    def __init__(self, storage: KvStorage, packing: int) -> None:
        self.packing = packing
        self.precision = storage.precisions.at(packing)
        self.geometry = storage.geometry.packed(packing)
        token_elements = self.geometry.token_floats * min(self.precision.bits, 8) // 8
        dtype = DTYPES[self.precision]
        self.blocks: list[Tensor] = [layer.view(dtype) for layer in storage.memory]
        self.every_layer = storage.whole.view(dtype)
        self.tokens: list[Tensor] = [layer.view(-1, token_elements) for layer in self.blocks]
        self._storage = storage
        self._fine: list[Tensor] | None = list(storage.fine.unbind()) if self.precision.fine else None
        self._scales: Scales | None = None
        if self.precision.scaled:
            device = storage.memory[0].device
            self._scales = Scales(self.precision, len(self.blocks), self.geometry, device)

    def write(self, layer: int, slots: Tensor, kv: Tensor, scratch: Scratch) -> None:
        """Store the step's `kv` [rows, token_floats], which may be used up."""
        scales, inverse = self._scales, None
        if scales is not None:
            before = scales.fit(layer, kv)
            if before is not None:
                self._move_codes(layer, before, scratch)
            inverse = scales.inverse[layer]
        dim = self.geometry.head_dim
        fine = self.fine(layer)
        attention.write(self.tokens[layer], slots, kv, dim, scratch, self.precision, inverse, fine)

    def scales(self, layer: int) -> Tensor | None:
        """[2, kv_heads, 1, head_dim], or None where values are stored as they are."""
        return None if self._scales is None else self._scales.by_head[layer]

    def fine(self, layer: int) -> Tensor | None:
        """[blocks, 2 * kv_heads, tokens of a block], or None where heads' scales are all there are."""
        return None if self._fine is None else self._fine[layer]

    def _move_codes(self, layer: int, ratio: Tensor, scratch: Scratch) -> None:
        """Scales grew: what is stored already must mean what it meant. A few times in an engine's life."""
        claimed, device = self._storage.claimed(self.packing), self.blocks[layer].device
        for first in range(0, len(claimed), _CHANGED_AT_ONCE):
            rows = torch.tensor(claimed[first : first + _CHANGED_AT_ONCE], device=device)
            attention.rescale(self.blocks[layer], rows, ratio, self.geometry, scratch, self.precision)
