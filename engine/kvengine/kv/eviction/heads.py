"""KV kept head by head: each KV head of each layer has tokens, and so a block table, of its own.

A block of the pool has room for `block_size` tokens of all heads of a layer. Seen head by head the same
bytes are `kv_heads` *head blocks* of `block_size` tokens of one head, numbered block * kv_heads and on. So
heads that keep little make room for those that keep much, and a sequence needs as many blocks as its fullest
layer:

    max over layers of ceil(sum over heads of ceil(tokens of the head / block_size) / kv_heads)

Keys keep their true positions, so that the order of a head's tokens means nothing and a new token may take
the place of the one that goes. No torch: the executor moves the KV.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvengine.kv.eviction.policy import Eviction


@dataclass(frozen=True, slots=True)
class Share:
    """What one head keeps: its first tokens, its latest, and of the rest those that drew most attention."""

    sink: int
    recent: int
    heavy: int = 0
    all: bool = False

    @property
    def limit(self) -> int:
        return self.sink + self.recent + self.heavy

    def keeps(self, mass: Sequence[float]) -> list[int]:
        """Of a prompt whose tokens drew `mass`, the positions that stay, ascending."""
        count = len(mass)
        if self.all or count <= self.limit:
            return list(range(count))
        first_recent = count - self.recent
        between = sorted(range(self.sink, first_recent), key=mass.__getitem__, reverse=True)
        return [*range(self.sink), *sorted(between[: self.heavy]), *range(first_recent, count)]

    def victim(self, positions: Sequence[int], mass: Sequence[float], position: int) -> int | None:
        """Whose place the token at `position` takes; None while there is room for it."""
        if self.all or len(positions) < self.limit:
            return None
        going = [index for index, one in enumerate(positions) if self.sink <= one <= position - self.recent]
        return min(going, key=mass.__getitem__)


def shares(eviction: Eviction) -> list[Share]:
    """What a head may keep, cheapest first; the last is what it keeps if none of the others will do."""
    recent = eviction.recent or 1
    bounded = Share(eviction.sink, recent, eviction.heavy)
    if eviction.policy != "fastgen":
        return [bounded]
    return [Share(eviction.sink, 1), Share(eviction.sink, recent), bounded, Share(0, 0, all=True)]


@dataclass(slots=True)
class Head:
    """One KV head of one layer."""

    share: Share
    table: list[int]
    """Its head blocks."""
    positions: list[int]
    """Of the token in each of its places."""

    def slot(self, place: int, block_size: int) -> int:
        """Where in a pool of head blocks, counted in tokens of one head."""
        return self.table[place // block_size] * block_size + place % block_size

    def slots(self, block_size: int) -> list[int]:
        return [self.slot(place, block_size) for place in range(len(self.positions))]


@dataclass(slots=True)
class HeadTables:
    """Of one sequence."""

    block_size: int
    kv_heads: int
    layers: list[list[Head]]
    free: list[list[int]] = field(default_factory=list)
    """Head blocks of each layer that no head uses yet, the next to use last."""
    blocks: int = 0
    """How many blocks of the request's table are divided among the heads."""

    @classmethod
    def after_prompt(
        cls,
        blocks: Sequence[int],
        block_size: int,
        kept: Sequence[Sequence[tuple[Share, list[int]]]],
    ) -> "HeadTables":
        """Tables over as few of `blocks` as will do. `kept[layer][head]`: its share and its positions."""
        kv_heads = len(kept[0])
        need = max(sum(-(-len(positions) // block_size) for _, positions in heads) for heads in kept)
        made = cls(block_size, kv_heads, [], [[] for _ in kept])
        made.take(blocks[: -(-need // kv_heads)])
        for free, heads in zip(made.free, kept, strict=True):
            made.layers.append(
                [
                    Head(
                        share, [free.pop() for _ in range(-(-len(positions) // block_size))], list(positions)
                    )
                    for share, positions in heads
                ]
            )
        return made

    def take(self, blocks: Sequence[int]) -> None:
        """Divide more blocks."""
        self.blocks += len(blocks)
        for free in self.free:
            new = [block * self.kv_heads + one for block in blocks for one in range(self.kv_heads)]
            free[:0] = reversed(new)

    @property
    def wanted(self) -> int:
        """Blocks that hold one token more of every head, whatever goes for it."""
        short = 0
        for free, heads in zip(self.free, self.layers, strict=True):
            growing = sum(
                len(head.positions) == len(head.table) * self.block_size
                and (head.share.all or len(head.positions) < head.share.limit)
                for head in heads
            )
            short = max(short, growing - len(free))
        return self.blocks + -(-short // self.kv_heads)

    def place(self, layer: int, position: int, mass: Sequence[Sequence[float]]) -> list[int]:
        """The slot that the token at `position` takes in each head of this layer; who was there is gone."""
        slots = []
        for head, drawn in zip(self.layers[layer], mass, strict=True):
            victim = head.share.victim(head.positions, drawn, position)
            if victim is None:
                if len(head.positions) == len(head.table) * self.block_size:
                    head.table.append(self.free[layer].pop())
                victim = len(head.positions)
                head.positions.append(position)
            else:
                head.positions[victim] = position
            slots.append(head.slot(victim, self.block_size))
        return slots
