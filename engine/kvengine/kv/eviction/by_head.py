"""Moving and reading KV that is kept head by head; `heads` says what lies where.

The pool seen as a pool of head blocks is that of a layer with a single KV head: so the same kernels
write and attend, with the KV heads of a sequence in the place of sequences. Only KV stored as values (fp32,
bf16): scales belong to heads, and a block would be of several. Python time a step is O(layers x kv_heads).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvengine.kv.eviction.heads import HeadTables, Share, shares
from kvengine.kv.eviction.mass import Mass
from kvengine.kv.eviction.policy import Eviction
from kvengine.kv.storage import KvStorage, Stored
from kvkernels import attention
from kvkernels.geometry import Geometry, Span
from kvkernels.scratch import Scratch, indices

OBSERVED_ROWS = 64
"""A prompt's last tokens, whose attention says which policy is enough for a head."""


class Profile:
    """What each head keeps of a prompt, found while its last chunk goes through the model."""

    def __init__(self, eviction: Eviction) -> None:
        self._eviction = eviction
        self.kept: list[list[tuple[Share, list[int]]]] = []
        """By layer and KV head: its share, and the positions."""

    def observe(self, query: Tensor, stored: Stored, layer: int, span: Span, mass: Mass) -> None:
        """After the layer's KV was written and scored; `query` [rows, heads, head_dim] is the step's."""
        every = Span(0, span.context, span.context, span.blocks).slots(stored.geometry.block_size)
        slots = indices(every, query.device)
        drawn = mass.layers[layer].index_select(0, slots)
        options = shares(self._eviction)
        if len(options) == 1:
            self.kept.append([(options[0], options[0].keeps(one)) for one in drawn.T.tolist()])
            return
        weights = _weights(query, stored, layer, span, slots)
        self.kept.append([self._choose(*pair) for pair in zip(drawn.T, weights, strict=True)])

    def _choose(self, drawn: Tensor, weights: Tensor) -> tuple[Share, list[int]]:
        """The first share that keeps enough of `weights` [rows, context], each row's latest tokens in it."""
        *options, last = shares(self._eviction)
        count, masses = weights.shape[1], drawn.tolist()
        rows = torch.arange(count - weights.shape[0], count, device=weights.device).unsqueeze(1)
        columns = torch.arange(count, device=weights.device)
        for share in options:
            kept = share.keeps(masses)
            static = torch.zeros(count, dtype=torch.bool, device=weights.device)
            static[kept[: len(kept) - share.recent] if len(kept) < count else kept] = True
            seen = static | (columns > rows - share.recent)
            if (weights * seen).sum(1).mean().item() >= self._eviction.recovery:
                return share, kept
        return last, last.keeps(masses)


def _weights(query: Tensor, stored: Stored, layer: int, span: Span, slots: Tensor) -> Tensor:
    """Attention of the span's last rows, [kv_heads, rows, context], mean over the heads that share KV."""
    geometry = stored.geometry
    rows = min(span.count, OBSERVED_ROWS)
    end = span.first_row + span.count
    keys = stored.tokens[layer].index_select(0, slots).float()
    keys = keys.view(-1, 2, geometry.kv_heads, geometry.head_dim)[:, 0]
    asked = query[end - rows : end].unflatten(1, (geometry.kv_heads, -1)) * geometry.head_dim**-0.5
    scores = torch.einsum("rhgd,phd->hgrp", asked, keys)
    positions = torch.arange(span.context, device=query.device)
    scores.masked_fill_(positions > positions[span.context - rows :].unsqueeze(1), float("-inf"))
    return scores.softmax(-1).mean(1)


def compact(profile: Profile, blocks: Sequence[int], storage: KvStorage, mass: Mass) -> HeadTables:
    """Move what is kept of a prompt that lies in `blocks` together, into the first of them."""
    own, geometry = storage.at(1), storage.geometry
    pool_blocks = len(own.blocks[0])
    tables = HeadTables.after_prompt(blocks, geometry.block_size, pool_blocks, profile.kept)
    device = own.tokens[0].device
    moved = []
    for layer, heads in enumerate(tables.layers):
        longest = max(max(head.positions) for head in heads) + 1
        slots = indices(Span(0, longest, longest, blocks).slots(geometry.block_size), device)
        kv = own.tokens[layer].index_select(0, slots).view(longest, 2, geometry.kv_heads, -1)
        drawn = mass.layers[layer].index_select(0, slots)
        for number, head in enumerate(heads):
            kept = indices(head.positions, device)
            moved.append((head, kv[kept, :, number].flatten(1), drawn[kept, number]))
    # All is read before anything is written: what goes where may lie where something else is read.
    single, scores = _tokens(own), mass.whole.view(-1)
    for head, values, weights in moved:
        places = indices(head.slots(geometry.block_size), device)
        single.index_copy_(0, places, values)
        scores.index_copy_(0, places, weights)
    return tables


class HeadRow:
    """One new token of a sequence kept by head, through all layers of a step."""

    def __init__(
        self, row: int, position: int, tables: HeadTables, stored: Stored, scratch: Scratch, mass: Mass
    ) -> None:
        self._row, self._position, self._tables = row, position, tables
        self._stored, self._scratch, self._mass = stored, scratch, mass
        full = stored.geometry
        self._geometry = Geometry(full.group, 1, full.head_dim, full.block_size)

    def attend(self, layer: int, new_kv: Tensor, query: Tensor, out: Tensor) -> None:
        """Store the token's KV in each head, score, and fill its row of `out` [rows, heads, head_dim]."""
        stored, geometry, scratch = self._stored, self._geometry, self._scratch
        heads, block_size = self._tables.layers[layer], geometry.block_size
        mass = self._mass.whole.view(-1, 1)
        slots = self._tables.place(layer, self._position, self._drawn(layer))
        fresh = indices(slots, query.device)
        kv = new_kv[self._row].view(2, len(heads), -1).transpose(0, 1).flatten(1)
        attention.write(_tokens(stored), fresh, kv, geometry.head_dim, scratch, stored.precision)
        mass.index_fill_(0, fresh, 0.0)
        asked = query[self._row].view(len(heads), geometry.group, -1)
        given = out[self._row].view(len(heads), geometry.group, -1)
        spans = [Span(number, 1, len(head.positions), head.table) for number, head in enumerate(heads)]
        pool = stored.every_layer.view(-1, block_size * geometry.token_floats)
        scored = [span for span, head in zip(spans, heads, strict=True) if head.share.heavy]
        if scored:
            attention.accumulate(mass, asked, pool, scored, geometry, scratch, stored.precision)
        attention.PagedAttention(spans, geometry, scratch, asked, given, stored.precision).attend(pool)

    def _drawn(self, layer: int) -> list[list[float]]:
        """What each token has drawn so far, of the heads in which one has to go."""
        heads, mass = self._tables.layers[layer], self._mass.whole.view(-1)
        full = [len(head.positions) == head.share.limit and not head.share.all for head in heads]
        slots = [
            head.slots(self._geometry.block_size) if one else []
            for head, one in zip(heads, full, strict=True)
        ]
        flat = mass.index_select(0, indices([slot for some in slots for slot in some], mass.device))
        return [one.tolist() for one in flat.split([len(some) for some in slots])]


def _tokens(stored: Stored) -> Tensor:
    """The pool as [slots of head blocks, K and V of one head]."""
    return stored.every_layer.view(-1, 2 * stored.geometry.head_dim)
