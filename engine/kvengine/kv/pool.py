"""The block pool: which KV blocks are free, which are referenced, which hold something worth keeping.

A block is in exactly one of three states: *referenced* by one holder or more, *cached* (nobody holds it, its
content may be used again, reclaimed oldest first when free blocks run out), or *free*. So, always:

    free + cached + referenced == total

"Does not fit" is a return value; misuse raises `PoolError` with the ids. Every operation is O(blocks it
names); `check()` is O(total). No tensors: block ids index whatever pools the executor keeps.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

from kvengine.errors import PoolError


class BlockPool:
    """`total` blocks, ids 0 to total - 1."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise PoolError(f"total={total}: a pool needs at least one block")
        self.total = total
        # A stack, so that the block released last, whose memory is warm, is handed out first.
        self._free = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Insertion order is age."""
        self.references = [0] * total
        """Holders of each block. For reading; only the pool writes it."""
        self.lives = [0] * total
        """How often each block has become free: content that was noted in an earlier life of it is gone."""
        self.on_reclaim: Callable[[int], object] | None = None
        """Told of each cached block whose content is about to be given up."""
        self._shared = 0

    @property
    def free(self) -> int:
        """Blocks that nothing holds."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Unreferenced blocks kept for reuse."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def referenced(self) -> int:
        """Blocks with at least one holder."""
        return self.total - len(self._free) - len(self._cached)

    @property
    def shared(self) -> int:
        """Blocks with more than one holder."""
        return self._shared

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one holder each, all or none: None means that they do not fit."""
        free = self._free
        if count > len(free):
            if count > self.available:
                return None
            self._reclaim(count - len(free))
        references = self.references
        blocks = [free.pop() for _ in range(count)]
        for block in blocks:
            references[block] = 1
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """One more holder for each block, which is referenced or cached."""
        references, cached = self.references, self._cached
        for block in blocks:
            count = references[block] + 1
            references[block] = count
            if count == 2:
                self._shared += 1
            elif count == 1:
                if block not in cached:
                    references[block] = 0
                    raise PoolError("retained a block that holds nothing", (block,))
                del cached[block]

    def release(self, blocks: Iterable[int], keep: bool = False) -> None:
        """One holder less for each block; the last one leaves it free, or cached with `keep`.

        Cached blocks are reclaimed in the order in which they are named here.
        """
        references = self.references
        for block in blocks:
            count = references[block] - 1
            if count < 0:
                raise PoolError("released more often than held", (block,))
            references[block] = count
            if count == 0:
                if keep:
                    self._cached[block] = None
                else:
                    self.lives[block] += 1
                    self._free.append(block)
            elif count == 1:
                self._shared -= 1

    def discard(self, block: int) -> bool:
        """Free a cached block: its content is not wanted any more. False if it is not cached."""
        if block not in self._cached:
            return False
        del self._cached[block]
        self.lives[block] += 1
        self._free.append(block)
        return True

    def oldest_cached(self) -> Sequence[int]:
        """Cached blocks in the order in which they will be reclaimed. O(cached)."""
        return list(self._cached)

    def check(self, holders: Iterable[int] | None = None) -> None:
        """Raise PoolError unless every block is in exactly one state and the counts agree.

        `holders`: every table's blocks, one after another; then references must equal occurrences there too.
        """
        free, cached = set(self._free), set(self._cached)
        held = {block for block, count in enumerate(self.references) if count > 0}
        if len(free) != len(self._free):
            raise PoolError("a block is free twice")
        if twice := (free & cached) | (free & held) | (cached & held):
            raise PoolError("a block is in two states", tuple(sorted(twice)))
        if lost := set(range(self.total)) - free - cached - held:
            raise PoolError("a block is in no state", tuple(sorted(lost)))
        if self.shared != sum(count > 1 for count in self.references):
            raise PoolError(f"shared={self.shared}: not the number of blocks with more than one holder")
        if holders is not None:
            counts = Counter(holders)
            if wrong := {b for b in held | counts.keys() if counts[b] != self.references[b]}:
                raise PoolError("references differ from the tables", tuple(sorted(wrong)))

    def _reclaim(self, count: int) -> None:
        popitem, free, tell, lives = self._cached.popitem, self._free, self.on_reclaim, self.lives
        for _ in range(count):
            block = popitem(last=False)[0]
            if tell is not None:
                tell(block)
            lives[block] += 1
            free.append(block)
