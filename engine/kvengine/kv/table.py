"""Block tables: how the positions of a request map to blocks of the pool.

A table is the request's own list of block ids; block `i` holds positions `i * block_size` and on (times its
packing, see `kv.precisions`). It begins
with what the prefix tree knows of the prompt, and grows on demand, when a step is about to write a position
that no block covers yet. Blocks enter the tree as they fill; what is in the tree stays cached when its last
holder leaves. Requests forked from one another share all blocks; a block is copied when one of several
holders is about to write it, and only then. O(blocks concerned).
"""

import logging
from collections.abc import Iterator, Sequence

from kvengine.kv.pool import BlockPool
from kvengine.kv.tree import PrefixTree
from kvengine.request import Request

log = logging.getLogger(__name__)

_FORKED = (
    "packing",
    "computed",
    "evicted",
    "rotated",
    "block_mass",
    "draft_computed",
    "registered",
    "draft_registered",
    "anchor",
)
"""What a fork begins with, beside the blocks."""


def blocks_for(positions: int, block_size: int) -> int:
    """Blocks that hold `positions` positions."""
    return -(-positions // block_size)


class BlockTables:
    """Fills, grows, shares and empties the tables of requests over one pool; no `tree`, no prefix cache."""

    def __init__(self, pool: BlockPool, block_size: int, tree: PrefixTree | None = None) -> None:
        self.pool = pool
        self.block_size = block_size
        self.tree = tree
        self.copies: dict[int, int] = {}
        """Destination -> source of the blocks to copy before the next step writes."""
        self.queried_tokens_total = 0
        self.hit_tokens_total = 0
        self.prefix_by_tenant: dict[str, tuple[int, int]] = {}
        """(queried, hit) tokens of each tenant; whoever reads it forgets who is gone."""
        self.evicted_tokens_total = 0

    def adopt(self, request: Request) -> None:
        """Begin an empty table with the cached prefix of its tokens, all but the last of them at most."""
        tree = self.tree
        if tree is None or (request.eviction is not None and request.eviction.alone):
            return
        namespace = tree.namespace(request.tenant, request.adapter, request.packing)
        blocks, request.anchor = tree.match(namespace, request.tokens, self._reusable(request))
        self.pool.retain(blocks)
        count = len(blocks)
        request.blocks, request.registered = blocks, count
        size = self.tokens_in_block(request)
        request.computed = count * size
        drafted = tree.drafted
        valid = next((i for i, block in enumerate(blocks) if not drafted[block]), count)
        request.draft_registered, request.draft_computed = valid, valid * size
        self.queried_tokens_total += len(request.tokens)
        self.hit_tokens_total += request.computed
        if request.tenant:
            queried, hit = self.prefix_by_tenant.get(request.tenant, (0, 0))
            both = queried + len(request.tokens), hit + request.computed
            self.prefix_by_tenant[request.tenant] = both

    def held_already(self, request: Request) -> int:
        """Blocks of a waiting request's prefix that others hold: admitting it does not take them."""
        if self.tree is None or (request.eviction is not None and request.eviction.alone):
            return 0
        namespace = self.tree.namespace(request.tenant, request.adapter, request.packing)
        blocks, _parent = self.tree.match(namespace, request.tokens, self._reusable(request))
        return sum(self.pool.references[block] > 0 for block in blocks)

    def cover(self, request: Request, positions: int) -> bool:
        """Make the table cover `positions` positions, writable from `computed` on.

        False, and nothing changed, if the pool cannot.
        """
        if request.heads is None:
            stored = positions - request.evicted
            missing = -(-stored // (self.block_size * request.packing)) - len(request.blocks)
        else:
            missing = request.heads.wanted - len(request.blocks)
        if request.tail_shared:
            return self._cover_own(request, missing)
        if missing <= 0:
            return True
        blocks = self.pool.allocate(missing)
        if blocks is None:
            return False
        request.blocks += blocks
        return True

    def reach(self, request: Request) -> int:
        """The most positions that `cover` could make this table cover now."""
        blocks = len(request.blocks) + self.pool.available
        return blocks * self.tokens_in_block(request) + request.evicted

    def tokens_in_block(self, request: Request) -> int:
        """What one block holds of this request."""
        return self.block_size * request.packing

    def register(self, request: Request) -> None:
        """Put the blocks that have filled up into the prefix tree. After each step that computed some."""
        size, blocks, tree = self.block_size * request.packing, request.blocks, self.tree
        if request.computed < (request.registered + 1) * size or request.anchor is None or tree is None:
            return
        full = min(request.computed, len(request.tokens)) // size
        while request.registered < full:
            number = request.registered
            inserted = None
            if not number or tree.holds(blocks[number - 1]):
                tokens = request.tokens[number * size : (number + 1) * size]
                inserted = tree.insert(request.anchor, tokens, blocks[number])
            if inserted is None:  # Its parent was dropped while we held it, or just now.
                request.anchor = None
                return
            block, request.anchor = inserted
            if block != blocks[number]:
                self.pool.retain([block])
                self.pool.release([blocks[number]])
                blocks[number] = block
            request.registered += 1
        self._register_drafted(tree, request)

    def fork(self, request: Request, other: Request) -> None:
        """Let `other`, which has the same tokens so far, begin with the same blocks."""
        self.pool.retain(request.blocks)
        other.blocks = list(request.blocks)
        for name in _FORKED:
            setattr(other, name, getattr(request, name))
        request.tail_shared = other.tail_shared = True

    def alone(self, block: int) -> bool:
        """Whether one request holds it, and nobody else: no other one, no pin."""
        return self.pool.references[block] == 1

    def evict(self, request: Request, numbers: Sequence[int], asked: bool = True) -> None:
        """Give up the blocks of these entries of the table, ascending, full and `alone`; others move up.

        The first of them leaves the prefix tree with all below it, and nothing of this request enters the
        tree any more: what it computes from here on does not follow from its whole text. `asked`: whether it
        costs anything, and so is counted; what a model never looks at again does not.
        """
        first, blocks = numbers[0], request.blocks
        if self.tree is not None and first < request.registered:
            self.tree.drop(blocks[first])
        self.pool.release([blocks[number] for number in numbers])
        gone = set(numbers)
        request.blocks = [block for number, block in enumerate(blocks) if number not in gone]
        request.block_mass = [mass for number, mass in enumerate(request.block_mass) if number not in gone]
        request.registered = min(request.registered, first)
        request.draft_registered = min(request.draft_registered, first)
        request.anchor = None
        tokens = len(numbers) * self.tokens_in_block(request)
        request.evicted += tokens
        self.evicted_tokens_total += tokens if asked else 0

    def join(self, request: Request, other: Request, count: int) -> None:
        """Begin `other`'s empty table with the first `count` blocks of `request`, all full, or more that are
        cached: both begin with the same tokens.
        """
        self.adopt(other)
        if len(other.blocks) >= count:
            return
        self.clear(other)
        other.blocks = request.blocks[:count]
        self.pool.retain(other.blocks)
        other.computed = count * self.tokens_in_block(request)
        other.registered = min(count, request.registered)

    def trim(self, request: Request, blocks: int) -> None:
        """Give up all but the first blocks of a table, and count what a block less a step would have: tokens
        that came and whose place others had to leave are evicted too.
        """
        self.pool.release(request.blocks[blocks:])
        del request.blocks[blocks:]
        gone = request.stored - blocks * self.tokens_in_block(request)
        if gone > 0:
            request.evicted += gone
            self.evicted_tokens_total += gone

    def clear(self, request: Request) -> None:
        """Give every block back: the request has no valid KV any more."""
        if self.tree is not None:
            self._register_drafted(self.tree, request)
        blocks, known = request.blocks, request.registered
        for block in blocks[known:]:
            self.copies.pop(block, None)
        self.pool.release(blocks[known:])
        if known and self.tree is not None:
            if request.pin and not self.tree.pin(blocks[:known]):
                log.warning("not pinned: %d blocks are over the limit of the pinned share", known)
            self._release_known(self.tree, blocks[:known])
        request.blocks, request.block_mass, request.heads = [], (), None
        request.computed = request.registered = request.evicted = request.rotated = 0
        request.draft_computed = request.draft_registered = 0
        request.anchor, request.tail_shared = None, False

    def take_copies(self) -> list[tuple[int, int]]:
        """(source, destination) of the copies that the next step makes, once."""
        copies = [(source, destination) for destination, source in self.copies.items()]
        self.copies.clear()
        return copies

    def holders(self) -> Iterator[int]:
        """Blocks held by no request: those that are pinned."""
        return iter(self.tree.pinned if self.tree is not None else ())

    def _reusable(self, request: Request) -> int:
        # One token at least goes through the model: its logits are what comes next.
        return (len(request.tokens) - 1) // self.tokens_in_block(request)

    def _cover_own(self, request: Request, missing: int) -> bool:
        """`cover` for a table whose block at `computed` may have other holders."""
        number, blocks = request.stored // self.tokens_in_block(request), request.blocks
        shared = number < len(blocks) and self.pool.references[blocks[number]] > 1
        added = self.pool.allocate(max(missing, 0) + shared)
        if added is None:
            return False
        if shared:
            copy = added.pop()
            self.copies[copy] = blocks[number]
            self.pool.release([blocks[number]])
            blocks[number] = copy
        blocks += added
        request.tail_shared = False
        return True

    def _register_drafted(self, tree: PrefixTree, request: Request) -> None:
        drafted = min(request.draft_computed // self.tokens_in_block(request), request.registered)
        while request.draft_registered < drafted:
            tree.drafted[request.blocks[request.draft_registered]] = 1
            request.draft_registered += 1

    def _release_known(self, tree: PrefixTree, blocks: list[int]) -> None:
        # Deepest first, so that a leaf is always reclaimed before what it continues.
        held = [block for block in reversed(blocks) if tree.holds(block)]
        if len(held) < len(blocks):
            self.pool.release([block for block in blocks if not tree.holds(block)])
        self.pool.release(held, keep=True)
