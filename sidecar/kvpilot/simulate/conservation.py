"""What must hold in every run, whatever the policies do; checked while it runs, and an AssertionError if not.

- each arrival ends in exactly one state, for its client and for the engine;
- blocks sum to the pool, and what requests hold is what the pool says is held;
- budgets are whole tokens and are kept, and who is admitted is served at least one token at once.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvpilot.simulate.deployment import Deployment
from kvpilot.workload.outcome import Fate, Outcome

if TYPE_CHECKING:
    from kvengine.core import Core
    from kvengine.sched.batch import Batch

LOOK_TURNS = 16
"""Sums over all requests are made once in so many turns."""
SCAN_TURNS = 16_384
"""And over all blocks, once in so many."""


class Conservation:
    """Of one engine core."""

    def __init__(self, core: "Core", deployment: Deployment) -> None:
        self._core = core
        self._pool = core.scheduler.pool
        self._budget = deployment.step_token_budget
        self._cached = deployment.prefix_cache
        self._turns = 0
        self.most_blocks = 0
        """Held at once, at the most."""

    def of_batch(self, batch: "Batch") -> None:
        """What the scheduler wants computed."""
        tokens, counts = batch.tokens, [item.count for item in batch.slices]
        assert min(counts) >= 1, "a slice without a token"
        assert type(tokens) is int, f"{tokens} tokens: budgets are whole"
        assert tokens <= self._budget, f"{tokens} tokens in a step of {self._budget}"
        admitted = self._core.scheduler.admitted
        if admitted:
            served = {item.request.id for item in batch.slices}
            for request in admitted:
                assert request.id in served, f"request {request.id} was admitted and not served"

    def after_turn(self) -> None:
        """One step, or none."""
        pool = self._pool
        held = pool.referenced
        if held > self.most_blocks:
            self.most_blocks = held
        self._turns += 1
        if not self._turns % LOOK_TURNS:
            self._look(held)

    def _look(self, held: int) -> None:
        core, pool = self._core, self._pool
        assert 0 <= held <= pool.total, f"{held} blocks are held, of {pool.total}"
        named = sum([len(request.blocks) for request in core.scheduler.running])
        # With a prefix cache several requests may hold one block.
        assert named >= held if self._cached else named == held, f"{named} blocks in tables, {held} held"
        totals = core.totals
        ended = totals.finished + totals.rejected + totals.cancelled + totals.failed
        assert totals.arrivals == ended + len(core.requests), "requests were lost in the engine"
        if self._turns % SCAN_TURNS == 0:
            core.scheduler.check()

    def at_end(self, arrived: int, outcomes: Iterable[Outcome]) -> None:
        """The run is over: `arrived` clients came."""
        fates = Counter(outcome.fate for outcome in outcomes)
        assert sum(fates.values()) == arrived, f"{arrived} arrivals, {sum(fates.values())} outcomes"
        assert set(fates) <= set(Fate), f"unknown fates: {fates}"
        self._look(self._pool.referenced)
        self._core.scheduler.check()
