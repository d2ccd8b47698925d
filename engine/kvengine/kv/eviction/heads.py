"""KV kept head by head: each KV head of each layer has tokens, and so a block table, of its own.

A block of the pool has room for `block_size` tokens of all heads of all layers. Seen head by head the same
bytes are layers x kv_heads *head blocks* of `block_size` tokens of one head, and any head of any layer may
use any of them. So heads that keep little make room for those that keep much:

    blocks = ceil(sum over layers and heads of ceil(tokens of the head / block_size) / (layers x kv_heads))

Head block `one` of a block in the part of the pool that is a layer's has the number
(layer x blocks of the pool + block) x kv_heads + one.

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
    pool_blocks: int
    layers: list[list[Head]] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    """Head blocks that no head uses yet, the next to use last."""
    blocks: int = 0
    """How many blocks of the request's table are divided among the heads."""

    @classmethod
    def after_prompt(
        cls,
        blocks: Sequence[int],
        block_size: int,
        pool_blocks: int,
        kept: Sequence[Sequence[tuple[Share, list[int]]]],
    ) -> "HeadTables":
        """Tables over as few of `blocks` as will do. `kept[layer][head]`: its share and its positions."""
        made = cls(block_size, len(kept[0]), pool_blocks, [[] for _ in kept])
        need = sum(-(-len(positions) // block_size) for heads in kept for _, positions in heads)
        made.take(blocks[: -(-need // made.head_blocks)])
        for layer, heads in zip(made.layers, kept, strict=True):
            for share, positions in heads:
                table = [made.free.pop() for _ in range(-(-len(positions) // block_size))]
                layer.append(Head(share, table, list(positions)))
        return made

    @property
    def head_blocks(self) -> int:
        """Of one block."""
        return len(self.layers) * self.kv_heads

    def take(self, blocks: Sequence[int]) -> None:
        """Divide more blocks."""
        self.blocks += len(blocks)
        new = [
            (layer * self.pool_blocks + block) * self.kv_heads + one
            for block in blocks
            for layer in range(len(self.layers))
            for one in range(self.kv_heads)
        ]
        self.free[:0] = reversed(new)

    @property
    def wanted(self) -> int:
        """Blocks that hold one token more of every head, whatever goes for it."""
        growing = sum(
            len(head.positions) == len(head.table) * self.block_size
            and (head.share.all or len(head.positions) < head.share.limit)
            for heads in self.layers
            for head in heads
        )
        return self.blocks + -(-max(0, growing - len(self.free)) // self.head_blocks)

    def place(self, layer: int, position: int, mass: Sequence[Sequence[float]]) -> list[int]:
        """The slot that the token at `position` takes in each head of this layer; who was there is gone."""
        slots = []
        for head, drawn in zip(self.layers[layer], mass, strict=True):
            victim = head.share.victim(head.positions, drawn, position)
            if victim is None:
                if len(head.positions) == len(head.table) * self.block_size:
                    head.table.append(self.free.pop())
                victim = len(head.positions)
                head.positions.append(position)
            else:
                head.positions[victim] = position
            slots.append(head.slot(victim, self.block_size))
        return slots
