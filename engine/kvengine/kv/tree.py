"""The prefix tree: which full blocks hold the KV of which token prefix, so that nobody computes it twice.

A node is one full block. It is found by a fingerprint of its parent and its own token ids, and is *labelled*
with both in full; the parent of a first block is its namespace: tenant, model and adapter under this
process's salt. Tokens are the exact final ids that the model sees, at a fixed width.

A fingerprint is only a hint. A hit is served when the label of the block says the same parent, the same
tokens, and the same life of the block as when it was labelled; anything else is an incident: counted, logged,
the block and all below it dropped, and the lookup ends there as a miss. So neither a collision nor a mistake
in the bookkeeping can hand one tenant another's KV.

Whoever holds a block holds its ancestors too, and lets go of the deepest first. The pool's order of reclaim
therefore always begins with a leaf that nobody holds, and evicting costs O(evicted), with no leaves to look
for. `drop` and `check` are O(blocks); they are not for a step that goes well. No torch.
"""

import logging
import secrets
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from kvengine.errors import PoolError
from kvengine.kv.pool import BlockPool

log = logging.getLogger(__name__)

TOKEN_BYTES = array("I").itemsize


class Namespace(NamedTuple):
    """Whose KV it is and what computed it; no hit ever crosses from one to another."""

    salt: bytes
    tenant: str | None
    """None is the engine's one anonymous tenant."""
    model: str
    adapter: str
    packing: int = 1
    """KV stored in fewer bits is other KV, and its blocks hold this many times as many tokens."""


Parent = Namespace | int
"""Of a first block its namespace, of any other the stamp of the block before it."""


@dataclass(slots=True)
class Label:
    """What a block holds."""

    key: int
    parent: Parent
    tokens: bytes
    stamp: int
    """Its name as a parent: never given twice, so that nothing is ever found below a block that left."""
    life: int


class PrefixTree:
    """Labels for the blocks of one pool. `fingerprint` maps (parent, tokens) to an int."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        model: str,
        *,
        max_pinned_blocks: int = 0,
        salt: bytes | None = None,
        fingerprint: Callable[[tuple[Parent, bytes]], int] = hash,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_pinned_blocks = max_pinned_blocks
        self.mismatches = 0
        """Lookups whose fingerprint led to a block that holds something else."""
        self.pinned: set[int] = set()
        """Blocks that the tree itself holds."""
        self.drafted = bytearray(pool.total)
        """Whether the draft model's KV in the block is valid too."""
        self._model = model
        self._salt = secrets.token_bytes(16) if salt is None else salt
        self._fingerprint = fingerprint
        self._width = block_size * TOKEN_BYTES
        self._labels: list[Label | None] = [None] * pool.total
        self._index: dict[int, int] = {}
        self._stamps = 0
        pool.on_reclaim = self._forget

    def __len__(self) -> int:
        return len(self._index)

    def namespace(self, tenant: str | None, adapter: str = "", packing: int = 1) -> Namespace:
        return Namespace(self._salt, tenant, self._model, adapter, packing)

    def match(self, namespace: Namespace, tokens: Sequence[int], limit: int) -> tuple[list[int], Parent]:
        """The blocks of the longest known prefix of `tokens`, at most `limit`, and the parent of the next.

        The caller retains them before it allocates anything: until then they may be reclaimed.
        """
        data = array("I", tokens[: limit * self.block_size * namespace.packing]).tobytes()
        index, labels, lives = self._index, self._labels, self.pool.lives
        width, fingerprint = self._width * namespace.packing, self._fingerprint
        parent: Parent = namespace
        found: list[int] = []
        for start in range(0, len(data) - width + 1, width):
            piece = data[start : start + width]
            key = fingerprint((parent, piece))
            block = index.get(key)
            if block is None:
                break
            label = labels[block]
            if label is None or label.tokens != piece or label.parent != parent or label.life != lives[block]:
                self._mismatch(key, block)
                return self._still_there(namespace, found)
            found.append(block)
            parent = label.stamp
        return found, parent

    def insert(self, parent: Parent, tokens: Sequence[int], block: int) -> tuple[int, Parent] | None:
        """Label `block`, full and computed, as `tokens` after `parent`; its block and its name as a parent.

        If another block holds the same already, that one is returned: the caller takes it instead of its own.
        None after an incident, which may have dropped the parent too: nothing was labelled.
        """
        piece = array("I", tokens).tobytes()
        if not piece or len(piece) % self._width:
            raise PoolError(f"labelled with {len(tokens)} tokens, not {self.block_size}", (block,))
        key = self._fingerprint((parent, piece))
        known = self._index.get(key)
        if known is not None:
            label = self._labels[known]
            life = self.pool.lives[known]
            if label and label.tokens == piece and label.parent == parent and label.life == life:
                return known, label.stamp
            self._mismatch(key, known)
            return None
        if self.holds(block):
            raise PoolError("labelled a block that has a label", (block,))
        if (stale := self._labels[block]) is not None:
            self._mismatch(stale.key, block)
            return None
        self._stamps += 1
        self._labels[block] = Label(key, parent, piece, self._stamps, self.pool.lives[block])
        self._index[key] = block
        self.drafted[block] = 0
        return block, self._stamps

    def holds(self, block: int) -> bool:
        """Whether the block is in the tree."""
        label = self._labels[block]
        return label is not None and label.life == self.pool.lives[block]

    def pin(self, blocks: Iterable[int]) -> bool:
        """Keep these, held by the caller and in the tree, whatever happens; False if that is over the limit.

        They are a whole prefix: its first block and on.
        """
        new = [block for block in blocks if block not in self.pinned and self.holds(block)]
        if len(self.pinned) + len(new) > self.max_pinned_blocks:
            return False
        self.pool.retain(new)
        self.pinned.update(new)
        return True

    def unpin(self) -> None:
        """Let every pinned block age like the others."""
        deepest_first = sorted(self.pinned, key=self._stamp, reverse=True)
        self.pinned.clear()
        self.pool.release(deepest_first, keep=True)

    def drop(self, block: int) -> None:
        """The block does not hold its prefix any more: it leaves the tree, and all below it.

        Blocks that nobody holds become free; holders keep theirs, and free them in the end.
        """
        for one in self._with_descendants(block):
            self._forget(one)
            if one in self.pinned:
                self.pinned.remove(one)
                self.pool.release([one])
            else:
                self.pool.discard(one)

    def check(self) -> None:
        """Raise PoolError unless index and labels agree, and evicting would always find a leaf."""
        labelled = {block for block, label in enumerate(self._labels) if label is not None}
        if labelled != set(self._index.values()):
            raise PoolError("labels and index differ", tuple(labelled ^ set(self._index.values())))
        by_stamp = {self._stamp(block): block for block in labelled}
        age = {block: number for number, block in enumerate(self.pool.oldest_cached())}
        if stray := age.keys() - labelled:
            raise PoolError("cached without a label", tuple(stray))
        for block in labelled:
            label = self._labels[block]
            assert label is not None
            if label.life != self.pool.lives[block]:
                raise PoolError("labelled in another life", (block,))
            if isinstance(label.parent, Namespace):
                continue
            parent = by_stamp.get(label.parent)
            if parent is None:
                raise PoolError("its parent has left the tree", (block,))
            if parent in age and age[parent] < age.get(block, self.pool.total):
                raise PoolError("would be reclaimed before the block below it", (parent, block))

    def _still_there(self, namespace: Namespace, found: list[int]) -> tuple[list[int], Parent]:
        """What a drop has left of the blocks found before it: they may be the very ones that were dropped."""
        kept = list(takewhile(self.holds, found))
        return kept, self._stamp(kept[-1]) if kept else namespace

    def _stamp(self, block: int) -> int:
        label = self._labels[block]
        return 0 if label is None else label.stamp

    def _mismatch(self, key: int, block: int) -> None:
        self.mismatches += 1
        log.error("prefix cache: block %d is not what its key says; dropped, and not served", block)
        self.drop(block)
        self._index.pop(key, None)

    def _forget(self, block: int) -> None:
        label = self._labels[block]
        if label is not None:
            self._labels[block] = None
            if self._index.get(label.key) == block:
                del self._index[label.key]

    def _with_descendants(self, block: int) -> Iterator[int]:
        """Deepest last."""
        below: defaultdict[Parent, list[int]] = defaultdict(list)
        for other, label in enumerate(self._labels):
            if label is not None:
                below[label.parent].append(other)
        rest = [block]
        while rest:
            one = rest.pop()
            stamp = self._stamp(one)
            if stamp:
                rest += below[stamp]
            yield one
