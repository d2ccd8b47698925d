"""Counts blocks that are cached but unreferenced, and blocks that are shared, a slice of the pool at a time.

The pool knows how many blocks are free; how many of those still hold a reusable prefix only a look at each
block tells. Slices may take one part in 4,000 of the time, so a large pool takes seconds: a count is
published whole, with the step at which it was complete.
"""

from typing import Any

from kvpilot.clock import Clock

EVERY = 8
"""A slice every so many steps: a step without one costs nothing."""
_SHARE = 4_000
"""Slices cost at most one part in this many of the time."""
_LEAST_NS, _MOST_NS = 8_000, 200_000
_FIRST_GUESS_NS = 80
"""Per block, before the first slice was measured."""


class BlockSweep:
    """`pool` is vLLM's block pool. O(slice) every EVERY steps."""

    def __init__(self, pool: Any, clock: Clock) -> None:
        self.cached = 0
        """Unreferenced blocks that hold a reusable prefix, at `step`."""
        self.shared = 0
        self.step = 0
        self._pool = pool
        self._clock = clock
        self._next = 0
        self._cached = self._shared = 0
        self._ns_per_block = _FIRST_GUESS_NS

    def advance(self, step_ns: int, step: int) -> bool:
        """Look at the next slice, after step number `step`, which took `step_ns`. True where that completed
        a count.
        """
        pool = self._pool
        if not pool.enable_caching:
            self.step = step
            return True
        began_ns = self._clock.monotonic_ns()
        budget_ns = min(max(EVERY * step_ns // _SHARE, _LEAST_NS), _MOST_NS)
        blocks = pool.blocks[self._next : self._next + budget_ns // self._ns_per_block + 1]
        cached = shared = 0
        for block in blocks:
            references = block.ref_cnt
            if references == 0:
                if block.block_hash is not None:
                    cached += 1
            elif references > 1:
                shared += 1
        self._next += len(blocks)
        self._cached += cached
        self._shared += shared
        complete = self._next >= len(pool.blocks)
        if complete:
            self._publish(step)
        if blocks:
            spent_ns = self._clock.monotonic_ns() - began_ns
            self._ns_per_block = max(1, (3 * self._ns_per_block + spent_ns // len(blocks)) // 4)
        return complete

    def _publish(self, step: int) -> None:
        # The block that stands for "no block" is referenced by many and belongs to nobody.
        self.cached = self._cached
        self.shared = self._shared - (self._pool.null_block.ref_cnt > 1)
        self.step = step
        self._next = self._cached = self._shared = 0
