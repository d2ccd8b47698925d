"""The engine core with a prefix cache and forks: outputs as without, blocks exactly as many as a model says.

The fake executor refuses a batch that would read KV of another tenant, or of another text.
"""

from dataclasses import replace

import pytest
from fake_executor import FakeExecutor, continuation, expected_output
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvengine.core import Core
from kvengine.errors import DeviceOutOfMemory
from kvengine.kv.pool import BlockPool
from kvengine.kv.tree import PrefixTree
from kvengine.request import Request, SamplingParams
from kvengine.sched.admission import Limits
from kvengine.sched.batch import Batch
from kvengine.sched.scheduler import Knobs, Scheduler
from kvpilot.clock import VirtualClock
from kvpilot.inside.lengths import LengthPredictor

BLOCK = 4
KNOBS = Knobs(64, 64, 0, 8, 1.0)


class Harness:
    def __init__(self, blocks: int = 64, pinned: int = 0) -> None:
        self.clock = VirtualClock(start_ns=1)
        self.error: Exception | None = None
        self.pool = BlockPool(blocks)
        self.tree = PrefixTree(self.pool, BLOCK, "fake", max_pinned_blocks=pinned)
        self.scheduler = Scheduler(self.pool, BLOCK, levels=2, tree=self.tree)
        limits = Limits(60, (blocks - pinned) * BLOCK)
        executor = FakeExecutor(BLOCK, before=self._before)
        self.core = Core(self.scheduler, executor, limits, frozenset(), LengthPredictor(60), self.clock)
        self.requests: dict[int, Request] = {}
        self.finished: set[int] = set()
        self.failed: set[int] = set()
        self.copies = 0

    def _before(self, batch: Batch) -> None:
        self.clock.advance(0.01)
        self.copies += len(batch.copies)
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def arrive(
        self, prompt: list[int], output: int = 6, tenant: str | None = None, choices: int = 1, **more: bool
    ) -> list[Request]:
        first = len(self.requests) + 1
        made = [
            Request(first + i, prompt, SamplingParams(output), tenant=tenant, **more) for i in range(choices)
        ]
        made[0].add_forks(made[1:])
        assert self.core.accept(made[0]) is None
        self.requests.update((one.id, one) for one in made)
        return made

    def step(self, knobs: Knobs = KNOBS) -> None:
        step = self.core.step(knobs)
        self.finished.update(one.request.id for one in step.emissions if one.finish)
        self.failed.update(one.request.id for one in step.failures)
        self.scheduler.check()

    def drain(self, knobs: Knobs = KNOBS) -> None:
        for _ in range(1000):
            if not self.core.requests:
                return
            self.step(knobs)
        raise AssertionError("requests never end")


def output(request: Request) -> list[int]:
    return request.tokens[len(request.prompt) :]


def follows(request: Request) -> bool:
    """Whether every token after the first is what the fake says after those before it."""
    tokens, start = request.tokens, len(request.prompt) + 1
    return all(tokens[i] == continuation(tokens[:i]) for i in range(start, len(tokens)))


class SharingMachine(RuleBasedStateMachine):
    """Prompts that begin alike, of two tenants, forked, preempted, cancelled; a model counts the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Harness(blocks=20)
        self.cancelled: set[int] = set()
        self.tails: dict[int, object] = {}
        """Request -> whose partial block it reads; those forked and not written since have one in common."""
        self.seen: dict[int, int] = {}
        self.outputs: dict[int, int] = {}

    @rule(
        shared=st.integers(0, 12),
        own=st.integers(1, 6),
        tenant=st.sampled_from([None, "a"]),
        choices=st.integers(1, 3),
        length=st.integers(1, 12),
    )
    def arrive(self, shared: int, own: int, tenant: str | None, choices: int, length: int) -> None:
        self.engine.arrive([9] * shared + [own] * own, length, tenant, choices)

    @rule(
        steps=st.integers(1, 5),
        budget=st.integers(1, 30),
        chunk=st.integers(1, 30),
        running=st.integers(1, 6),
        watermark=st.sampled_from([0.3, 1.0]),
    )
    def step(self, steps: int, budget: int, chunk: int, running: int, watermark: float) -> None:
        for _ in range(steps):
            self.engine.step(Knobs(budget, chunk, 0, running, watermark))
            self.follow()

    @precondition(lambda self: self.engine.core.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.engine.core.requests)))
        self.engine.core.cancel(number)
        self.cancelled.add(number)
        self.follow()

    @precondition(lambda self: self.engine.core.requests)
    @rule()
    def fail(self) -> None:
        self.engine.error = DeviceOutOfMemory("test")
        self.engine.step()
        self.follow()

    def follow(self) -> None:
        """Who wrote since the last look has a tail of its own."""
        running = self.engine.scheduler.running
        begun: dict[tuple[int, ...], object] = {}
        for request in running:
            if request.output_count == 1 and self.outputs.get(request.id, 0) == 0 and request.tail_shared:
                # A family has just begun, from one table.
                tail = begun.setdefault((id(request.prompt),), object())
                self.tails[request.id] = tail
            elif self.seen.get(request.id) != request.computed:
                self.tails[request.id] = object()
        self.outputs = {request.id: request.output_count for request in running}
        self.seen = {request.id: request.computed for request in running}

    @invariant()
    def blocks_are_as_many_as_the_model_says(self) -> None:
        running = self.engine.scheduler.running
        full = {
            (request.tenant, tuple(request.tokens[: end * BLOCK]))
            for request in running
            for end in range(1, request.computed // BLOCK + 1)
        }
        partial = {self.tails[request.id] for request in running if request.computed % BLOCK}
        assert self.engine.pool.referenced == len(full) + len(partial)

    @invariant()
    def nothing_is_lost(self) -> None:
        engine = self.engine
        engine.scheduler.check()
        assert engine.finished | engine.failed | self.cancelled | set(engine.core.requests) == set(
            engine.requests
        )
        for request in engine.requests.values():
            assert follows(request)
            assert len(output(request)) <= request.sampling.max_tokens
        totals = engine.core.totals
        assert totals.arrivals == len(engine.requests)
        assert [totals.finished, totals.failed, totals.cancelled] == list(
            map(len, [engine.finished, engine.failed, self.cancelled])
        )

    def teardown(self) -> None:
        self.engine.drain()
        self.nothing_is_lost()
        assert self.engine.pool.referenced == 0
        assert self.engine.tree.mismatches == 0


TestSharingMachine = SharingMachine.TestCase
TestSharingMachine.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize(("prompt", "copies"), [(10, 3), (8, 0), (3, 3)])
def test_cow_forks_share_the_prompt_and_copy_only_a_block_that_diverges(prompt: int, copies: int) -> None:
    """Four choices: the prompt is computed once, its full blocks are held once, its partial one is copied."""
    engine = Harness()
    family = engine.arrive([5] * prompt, 6, choices=4)
    engine.step()
    assert engine.core.totals.prefill_tokens == prompt
    assert engine.pool.referenced == -(-prompt // BLOCK), "nobody has written yet"
    assert len({request.tokens[-1] for request in family}) == 4
    engine.step()
    assert engine.copies == copies
    assert engine.pool.referenced == prompt // BLOCK + 4
    assert engine.pool.shared == prompt // BLOCK
    engine.drain()
    assert engine.copies == copies
    assert all(len(output(request)) == 6 and follows(request) for request in family)
    assert engine.core.totals.finished == engine.core.totals.arrivals == 4


def test_choices_of_one_token_end_with_it() -> None:
    """Their first token, which comes with the prompt's, is their last."""
    engine = Harness()
    family = engine.arrive([5] * 6, 1, choices=3)
    engine.step()
    assert engine.finished == {request.id for request in family}
    assert [len(output(request)) for request in family] == [1, 1, 1]
    assert engine.pool.referenced == 0


def test_cow_with_drafts_writes_to_own_blocks_only() -> None:
    """Rejected drafts are written past the tokens: never into a block that another choice reads."""
    engine = Harness()
    family = engine.arrive([5] * 6, 12, choices=3)
    engine.drain(replace(KNOBS, speculative_tokens=4))
    assert all(len(output(request)) == 12 and follows(request) for request in family)


def test_a_family_counts_against_the_running_cap_as_many_as_it_is() -> None:
    engine = Harness()
    engine.arrive([1] * 6, 20)
    engine.arrive([2] * 6, 20, choices=4)
    engine.step(replace(KNOBS, max_running=4))
    assert len(engine.scheduler.running) == 1
    engine.step(replace(KNOBS, max_running=5))
    assert len(engine.scheduler.running) == 5
    alone = Harness()
    alone.arrive([2] * 6, 20, choices=4)
    alone.step(replace(KNOBS, max_running=2))
    assert len(alone.scheduler.running) == 4, "nothing else runs: a family must not wait for ever"


def test_when_the_first_of_a_family_leaves_early_the_next_takes_its_place() -> None:
    engine = Harness()
    first, second, third = engine.arrive([5] * 10, 4, choices=3)
    engine.step(replace(KNOBS, prefill_chunk_tokens=4))
    engine.core.cancel(first.id)
    engine.drain()
    assert (len(output(second)), len(output(third))) == (4, 4)
    totals = engine.core.totals
    assert (totals.arrivals, totals.finished, totals.cancelled) == (3, 2, 1)


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    """All but what is past the last full block, and never the last token."""
    engine = Harness()
    (first,) = engine.arrive(list(range(1, 13)))
    engine.drain()
    computed = engine.core.totals.prefill_tokens
    (second,) = engine.arrive(list(range(1, 13)))
    engine.drain()
    assert engine.core.totals.prefill_tokens - computed == 4
    assert output(first) == output(second) == expected_output(range(1, 13), 6)
    tables = engine.scheduler.tables
    assert (tables.queried_tokens_total, tables.hit_tokens_total) == (24, 8)
    (longer,) = engine.arrive([*range(1, 13), *output(first)[:5], 3])
    engine.drain()
    assert tables.hit_tokens_total == 8 + 16, "what was generated is remembered too"
    assert output(longer) == expected_output(longer.prompt, 6)


def test_two_that_compute_the_same_at_once_end_up_with_one_copy() -> None:
    engine = Harness()
    engine.arrive([7] * 9)
    engine.arrive([7] * 9)
    engine.step()
    assert (engine.pool.referenced, engine.pool.shared) == (4, 2)


def test_a_preempted_request_finds_what_it_had_computed() -> None:
    engine = Harness()
    engine.arrive([7] * 10, 8)
    for _ in range(4):
        engine.step()
    (request,) = engine.scheduler.running
    assert engine.scheduler._make_room(Request(99, [1], SamplingParams(1), klass=1))
    engine.step()
    assert engine.core.totals.recomputed_tokens == 1
    engine.drain()
    assert output(request) == expected_output([7] * 10, 8)


def test_shared_blocks_count_once_against_the_watermark() -> None:
    """What others hold of a prompt is in use already: admitting it takes the rest only."""
    engine = Harness(blocks=20)
    engine.arrive([7] * 33, 6)
    knobs = replace(KNOBS, admission_watermark=0.6)
    engine.step(knobs)
    engine.arrive([7] * 33, 6)
    engine.arrive([8] * 33, 6)
    engine.step(knobs)
    assert len(engine.scheduler.running) == 2


def test_eviction_takes_unreferenced_leaves_first_and_oldest() -> None:
    """A reclaimed block is never one that another labelled block continues."""
    engine = Harness(blocks=9)
    for start in (10, 20, 30, 40, 50):
        engine.arrive([9] * 4 + [start] * 9, 3)
        engine.drain()
        engine.tree.check()
    assert engine.pool.cached > 0
    namespace = engine.tree.namespace(None)
    assert len(engine.tree.match(namespace, [9] * 4 + [50] * 8, 3)[0]) == 3, "the newest is all there"
    assert len(engine.tree.match(namespace, [9] * 4 + [10] * 8, 3)[0]) == 1, "of the oldest the root is"


def test_pinned_blocks_outlive_any_pressure_and_the_rest_is_still_served() -> None:
    engine = Harness(blocks=12, pinned=3)
    engine.arrive([5] * 13, 1, pin=True)
    engine.drain()
    assert len(engine.tree.pinned) == engine.pool.referenced == 3
    for start in range(10, 30):
        engine.arrive([start] * 30, 6)
    engine.drain()
    assert len(engine.tree.match(engine.tree.namespace(None), [5] * 12, 3)[0]) == 3
    engine.arrive([6] * 13, 1, pin=True)
    engine.drain()
    assert len(engine.tree.pinned) == 3, "over the limit: served, not pinned"
    engine.tree.unpin()
    assert engine.pool.referenced == 0
    engine.tree.check()


def test_a_failed_step_leaves_no_draft_kv_for_others() -> None:
    """It may have been half written when the step failed."""
    engine = Harness()
    engine.arrive([5] * 12, 9)
    engine.step()
    (request,) = engine.scheduler.running
    request.draft_computed = 12
    engine.error = DeviceOutOfMemory("test")
    engine.step()
    (again,) = engine.arrive([5] * 12, 9)
    engine.step()
    assert (again.draft_computed, again.computed) == (0, 12)


def test_draft_kv_is_reused_where_it_was_computed() -> None:
    engine = Harness()
    engine.arrive([5] * 12, 9)
    engine.step()
    (request,) = engine.scheduler.running
    request.draft_computed = 6
    engine.drain()
    (again,) = engine.arrive([5] * 12, 9)
    engine.step()
    assert again.draft_computed == 4
