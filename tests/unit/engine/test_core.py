"""The engine core over a fake executor: conservation, lossless preemption, failures that stay local."""

import pytest
from fake_executor import FakeExecutor, expected_output
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvengine.core import Core
from kvengine.errors import DeviceOutOfMemory
from kvengine.kv.pool import BlockPool
from kvengine.request import Request, SamplingParams
from kvengine.sched.admission import Limits
from kvengine.sched.batch import Batch
from kvengine.sched.scheduler import Knobs, Scheduler
from kvpilot.clock import VirtualClock
from kvpilot.inside.lengths import LengthPredictor

BLOCK = 4
KNOBS = Knobs(32, 16, 2, 8, 1.0)


class Harness:
    """A core, a clock that each step moves on by 10 ms, and everything that was emitted."""

    def __init__(self, blocks: int = 16, eos: frozenset[int] = frozenset(), accepted: int = 2) -> None:
        self.clock = VirtualClock(start_ns=1)
        self.error: Exception | None = None
        self.scheduler = Scheduler(BlockPool(blocks), BLOCK, levels=3)
        executor = FakeExecutor(BLOCK, accepted, self._before)
        limits = Limits(40, blocks * BLOCK)
        self.core = Core(self.scheduler, executor, limits, eos, LengthPredictor(40), self.clock)
        self.emitted: dict[int, list[int]] = {}
        self.finished: dict[int, str] = {}
        self.failed: dict[int, int] = {}
        self.cancelled: set[int] = set()
        self.rejected: set[int] = set()

    def _before(self, batch: Batch) -> None:
        self.clock.advance(0.01)
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def arrive(self, number: int, prompt: int = 6, output: int = 6, klass: int = 0, **more: object) -> None:
        request = Request(
            number,
            [number % 90 + 1] * prompt,
            SamplingParams(output, **more),
            klass,
            arrived_ns=self.clock.monotonic_ns(),
        )
        if self.core.accept(request) is not None:
            self.rejected.add(number)

    def step(self, knobs: Knobs = KNOBS) -> None:
        step = self.core.step(knobs)
        for emission in step.emissions:
            number = emission.request.id
            assert number not in self.finished
            assert emission.tokens
            self.emitted.setdefault(number, []).extend(emission.tokens)
            if emission.finish:
                self.finished[number] = emission.finish
        for failure in step.failures:
            self.failed[failure.request.id] = failure.status

    def drain(self, knobs: Knobs = KNOBS) -> None:
        for _ in range(1000):
            if not self.core.requests:
                return
            self.step(knobs)
        raise AssertionError("requests never end")


class CoreMachine(RuleBasedStateMachine):
    """Arrivals, steps under any knobs, cancellations, out of memory: nothing is lost, doubled or leaked."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Harness(blocks=10)
        self.asked: dict[int, tuple[list[int], int]] = {}

    @rule(prompt=st.integers(0, 30), output=st.integers(1, 20), klass=st.integers(0, 2))
    def arrive(self, prompt: int, output: int, klass: int) -> None:
        number = len(self.asked) + 1
        self.asked[number] = ([number % 90 + 1] * prompt, output)
        self.engine.arrive(number, prompt, output, klass)

    @rule(
        budget=st.integers(1, 24),
        chunk=st.integers(1, 24),
        drafts=st.integers(0, 4),
        running=st.integers(1, 6),
        watermark=st.sampled_from([0.05, 0.5, 1.0]),
        steps=st.integers(1, 6),
    )
    def step(self, budget: int, chunk: int, drafts: int, running: int, watermark: float, steps: int) -> None:
        for _ in range(steps):
            self.engine.step(Knobs(budget, chunk, drafts, running, watermark))

    @precondition(lambda self: self.engine.core.requests)
    @rule(data=st.data(), stop=st.booleans())
    def end_early(self, data: st.DataObject, stop: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.engine.core.requests)))
        if stop:
            self.engine.core.stop(number)
            self.engine.finished[number] = "stop"
        else:
            self.engine.core.cancel(number)
            self.engine.cancelled.add(number)

    @rule()
    def cancel_what_has_ended(self) -> None:
        self.engine.core.cancel(10**6)

    @precondition(lambda self: self.engine.core.requests)
    @rule()
    def out_of_memory(self) -> None:
        self.engine.error = DeviceOutOfMemory("test")
        self.engine.step()

    @invariant()
    def the_pool_is_whole(self) -> None:
        pool = self.engine.scheduler.pool
        assert pool.free + pool.cached + pool.referenced == pool.total
        self.engine.scheduler.check()

    @invariant()
    def every_arrival_is_somewhere(self) -> None:
        engine, totals = self.engine, self.engine.core.totals
        ends = [set(engine.finished), set(engine.failed), engine.cancelled, engine.rejected]
        assert sum(map(len, ends)) == len(set().union(*ends)), "a request ended twice"
        assert set().union(*ends) | set(engine.core.requests) == set(self.asked)
        assert [totals.finished, totals.failed, totals.cancelled, totals.rejected] == list(map(len, ends))
        assert totals.arrivals == len(self.asked)

    @invariant()
    def tokens_are_neither_lost_nor_doubled(self) -> None:
        for number, tokens in self.engine.emitted.items():
            prompt, output = self.asked[number]
            assert tokens == expected_output(prompt, len(tokens))
            assert len(tokens) <= output
            if self.engine.finished.get(number) == "length":
                assert len(tokens) == output

    def teardown(self) -> None:
        self.engine.drain()
        self.every_arrival_is_somewhere()
        self.tokens_are_neither_lost_nor_doubled()
        assert self.engine.scheduler.pool.free == self.engine.scheduler.pool.total


TestCoreMachine = CoreMachine.TestCase
TestCoreMachine.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)


def test_preemption_by_recompute_is_invisible_in_the_output() -> None:
    """Requests that need more KV than there is are preempted, recomputed, and emit what they would alone."""
    engine = Harness(blocks=9)
    for number in range(1, 5):
        engine.arrive(number, prompt=6, output=20)
    engine.drain()
    assert engine.scheduler.preemptions_total > 0
    assert engine.core.totals.recomputed_tokens > 0
    for number in range(1, 5):
        assert engine.emitted[number] == expected_output([number + 1] * 6, 20)


def test_tokens_computed_again_are_counted_once_a_preemption() -> None:
    """Recomputed tokens are those below the position that was reached before."""
    engine = Harness(blocks=16)
    engine.arrive(1, prompt=8, output=10)
    for _ in range(2):
        engine.step(Knobs(32, 16, 0, 8, 1.0))
    (request,) = engine.scheduler.running
    assert request.computed == 9
    other = Request(2, [1], SamplingParams(1), klass=2)
    assert engine.scheduler._make_room(other)
    engine.step(Knobs(32, 16, 0, 8, 1.0))
    assert engine.core.totals.recomputed_tokens == 9
    assert engine.core.totals.prefill_tokens == 18
    assert engine.core.totals.decode_tokens == 3


@pytest.mark.parametrize(
    ("error", "status", "oom"), [(DeviceOutOfMemory("full"), 503, 1), (KeyError("bug"), 500, 0)]
)
def test_a_failed_step_fails_its_own_requests_only(error: Exception, status: int, oom: int) -> None:
    """Who was in the step fails, who waited is served; blocks are back and the engine goes on."""
    engine = Harness()
    for number in (1, 2, 3):
        engine.arrive(number)
    engine.error = error
    engine.step(Knobs(8, 8, 0, 2, 1.0))
    assert engine.failed == {1: status, 2: status}
    assert engine.core.totals.oom == oom
    assert engine.scheduler.pool.free == engine.scheduler.pool.total
    engine.drain()
    assert engine.finished == {3: "length"}


def test_nothing_comes_out_after_the_end_token() -> None:
    """Speculation runs past the end token; what follows it is dropped, unless the caller ignores it."""
    prompt = [2] * 6
    output = expected_output(prompt, 6)
    eos = output[2]
    assert eos not in output[:2]
    engine = Harness(eos=frozenset([eos]), accepted=4)
    engine.arrive(1)
    engine.arrive(91, ignore_eos=True)
    engine.drain(Knobs(32, 16, 4, 8, 1.0))
    assert engine.emitted[1] == output[:3]
    assert engine.emitted[91] == output
    assert engine.finished == {1: "stop", 91: "length"}


def test_times_are_those_of_arrival_admission_and_emission() -> None:
    """First emission counts from arrival, later ones from the one before, whatever they hold."""
    engine = Harness()
    engine.arrive(1, prompt=20, output=6)
    engine.clock.advance(0.5)
    steps = [engine.core.step(Knobs(32, 10, 2, 8, 1.0)) for _ in range(4)]
    emissions = [emission for step in steps for emission in step.emissions]
    assert [(e.first, e.since_ns, len(e.tokens)) for e in emissions] == [
        (True, 520_000_000, 1),
        (False, 10_000_000, 3),
        (False, 10_000_000, 2),
    ]
    assert emissions[0].request.first_scheduled_ns - emissions[0].request.arrived_ns == 500_000_000


def test_speculation_is_counted_in_rounds() -> None:
    """Drafted, accepted, rounds and rounds with a rejection; off means no rounds at all."""
    engine = Harness(accepted=2)
    engine.arrive(1, output=10)
    engine.step()
    engine.step(Knobs(32, 16, 4, 8, 1.0))
    engine.step(Knobs(32, 16, 2, 8, 1.0))
    totals = engine.core.totals
    assert (totals.draft_rounds, totals.rejected_rounds) == (2, 1)
    assert (totals.drafted_tokens, totals.accepted_tokens) == (6, 4)
    engine.step(Knobs(32, 16, 0, 8, 1.0))
    assert totals.draft_rounds == 2
    assert totals.decode_tokens == 1 + 3 + 3 + 1
