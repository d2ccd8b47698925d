"""Admission that looks ahead: the arithmetic of the peak, what it lets in, and that nothing of it sticks."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from fake_executor import FakeExecutor
from hypothesis import given, settings
from hypothesis import strategies as st

from kvengine.core import Core
from kvengine.kv.eviction.policy import Eviction
from kvengine.kv.pool import BlockPool
from kvengine.kv.tree import PrefixTree
from kvengine.request import Request, SamplingParams
from kvengine.sched.admission import ASK_AGAIN_STEPS, Limits
from kvengine.sched.batch import Batch
from kvengine.sched.peak import LOOKS, PeakDemand, growth, moments
from kvengine.sched.scheduler import Knobs, Scheduler
from kvpilot.clock import NS, VirtualClock
from kvpilot.inside.lengths import LengthPredictor

BLOCK = 4
FAR = 1 << 20
"""What a predictor without history spreads lengths over: every request then goes on to its `max_tokens`."""
WIDE = Knobs(100_000, 100_000, 0, 1_000, 1.0)


class Engine:
    """A core in virtual time; outputs really end where `ends` says, as with stop strings."""

    def __init__(
        self, blocks: int, lengths: LengthPredictor | None = None, *, ahead: bool = True, cached: bool = False
    ) -> None:
        self.clock = VirtualClock()
        self.lengths = lengths or LengthPredictor(512)
        pool = BlockPool(blocks)
        self.tree = PrefixTree(pool, BLOCK, "fake") if cached else None
        self.scheduler = Scheduler(pool, BLOCK, 1, self.tree, lengths=self.lengths if ahead else None)
        executor = FakeExecutor(BLOCK, before=self._spend)
        self.core = Core(
            self.scheduler, executor, Limits(FAR, blocks * BLOCK), frozenset(), self.lengths, self.clock
        )
        self.most_blocks = 0
        """The most that were referenced during a step."""
        self.ends: dict[int, int] = {}
        self.finished_at_s: dict[int, float] = {}

    def _spend(self, batch: Batch) -> None:
        self.clock.advance(2e-3 + 1e-5 * batch.tokens)
        self.most_blocks = max(self.most_blocks, self.scheduler.pool.referenced)

    def ask(
        self,
        number: int,
        prompt: int,
        output: int,
        most: int,
        *,
        forks: int = 0,
        eviction: Eviction | None = None,
    ) -> Request:
        tokens = [number % 97 + i % 5 for i in range(prompt)]
        first, *others = [
            Request(number + 10_000 * i, tokens, SamplingParams(most), arrived_ns=self.clock.monotonic_ns())
            for i in range(1 + forks)
        ]
        first.eviction = eviction
        first.add_forks(others)
        for one in (first, *others):
            self.ends[one.id] = output
        assert self.core.accept(first) is None
        return first

    def step(self, knobs: Knobs = WIDE) -> None:
        step = self.core.step(knobs)
        self.scheduler.check()
        for emission in step.emissions:
            request = emission.request
            if emission.finish is None and request.output_count >= self.ends[request.id]:
                self.core.stop(request.id)
            if request.id not in self.core.requests:
                self.finished_at_s[request.id] = self.clock.monotonic_ns() / NS

    def drain(self, knobs: Knobs = WIDE) -> None:
        while self.core.requests:
            self.step(knobs)

    def peak(self) -> float:
        """What is predicted of those that run now."""
        peak = PeakDemand(self.scheduler.tables, self.lengths)
        peak.read(self.scheduler.running)
        return peak.peak()


sizes = st.tuples(st.integers(1, 40), st.integers(1, 60))


@settings(deadline=None)
@given(
    held=st.integers(1, 60),
    size=st.sampled_from([4, 8, 16]),
    outcomes=st.lists(st.integers(1, 50), min_size=1, max_size=8).map(sorted),
    looks=st.lists(st.integers(1, 60), min_size=1, max_size=8, unique=True).map(sorted),
)
def test_growth_is_the_mean_and_variance_over_the_outcomes(
    held: int, size: int, outcomes: list[int], looks: list[int]
) -> None:
    """Against counting: a sequence that has not ended holds the blocks of the positions it has covered."""
    curve = growth(held, size, 0, outcomes, looks)
    for number, look in enumerate(looks):
        held_then = [-(-(held + look - 1) // size) if end >= look else 0 for end in outcomes]
        mean = sum(held_then) / len(outcomes)
        variance = sum(blocks * blocks for blocks in held_then) / len(outcomes) - mean * mean
        seen = curve[number] if number < len(curve) else (0.0, 0.0)
        assert seen == pytest.approx((mean, variance))


@settings(deadline=None)
@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=400))
def test_every_common_end_is_looked_at(ends: list[int]) -> None:
    """An end that as many share as lie between two looks cannot be stepped over; the next step is one."""
    looks = moments(ends)
    assert looks[0] == 1
    assert len(looks) <= LOOKS + 1
    assert all(a < b for a, b in pairwise(looks))
    share = -(-len(ends) // LOOKS)
    assert {end for end in ends if ends.count(end) >= share} <= set(looks)


@settings(max_examples=30, deadline=None)
@given(asked=st.lists(sizes, min_size=1, max_size=8), packing=st.sampled_from([1, 2, 4]))
def test_the_peak_of_known_ends_is_exact(asked: list[tuple[int, int]], packing: int) -> None:
    """Where every end is known, the forecast is the most blocks that the pool then really gives out."""
    engine = Engine(4_000, LengthPredictor(FAR))
    bits = engine.scheduler.precisions.own.bits
    for number, (prompt, output) in enumerate(asked, 1):
        engine.ask(number, prompt, output, output)
    engine.step(replace(WIDE, kv_element_bits=bits / packing))
    predicted, engine.most_blocks = engine.peak(), 0
    engine.drain()
    assert predicted == engine.most_blocks


def test_shared_blocks_count_once() -> None:
    """Six choices of one prompt: its full blocks once, and for each choice its own copy of the last one."""
    engine = Engine(4_000, LengthPredictor(FAR))
    engine.ask(1, prompt=4 * BLOCK + 2, output=7, most=7, forks=5)
    engine.step()
    assert len(engine.scheduler.running) == 6
    predicted = engine.peak()
    engine.drain()
    # 18 tokens and 6 more that are computed: 6 blocks each, the first four of which they share.
    assert predicted == engine.most_blocks == 4 + 6 * 2


def test_choices_count_before_they_begin() -> None:
    """A waiting request asks for the blocks of all of its choices."""
    # In 8 steps: 4 blocks for the first choice, 2 for each other; by then the first request has ended.
    for blocks, admitted in ((13, 1), (14, 2)):
        engine = Engine(blocks, LengthPredictor(FAR))
        engine.ask(1, prompt=BLOCK, output=BLOCK, most=BLOCK)
        engine.ask(2, prompt=2 * BLOCK, output=2 * BLOCK, most=2 * BLOCK, forks=5)
        engine.scheduler.schedule(WIDE)
        assert len(engine.scheduler.running) == admitted


def test_a_prefix_that_others_hold_is_not_asked_for_again() -> None:
    """The second request fits only because the first holds most of what it needs; pins count, once."""
    running = {}
    for cached in (False, True):
        engine = Engine(16, LengthPredictor(FAR), cached=cached)
        engine.ask(0, prompt=10 * BLOCK + 1, output=BLOCK, most=BLOCK)
        engine.step()
        engine.ask(97, prompt=10 * BLOCK + 2, output=BLOCK, most=BLOCK)
        engine.step()
        running[cached] = len(engine.scheduler.running)
        engine.drain()
    assert running == {False: 1, True: 2}


def test_a_request_alone_is_always_admitted() -> None:
    """However small the watermark, and however long it may go on."""
    engine = Engine(30)
    engine.ask(1, prompt=40, output=60, most=80)
    engine.ask(2, prompt=40, output=60, most=80)
    engine.step(replace(WIDE, admission_watermark=0.05))
    assert [request.id for request in engine.scheduler.running] == [1]
    engine.drain(replace(WIDE, admission_watermark=0.05))
    assert engine.scheduler.preemptions_total == 0
    assert len(engine.finished_at_s) == 2


def test_a_lowered_watermark_does_not_count_growth_twice() -> None:
    """A pilot lowers the watermark by what it expects running requests to need: that bounds what is held."""
    running = {}
    for floor in (0.0, 1.0):
        engine = Engine(160, LengthPredictor(FAR))
        assert engine.scheduler.peak is not None
        engine.scheduler.peak.floor = floor
        for number in range(1, 31):
            engine.ask(number, prompt=2 * BLOCK, output=6 * BLOCK, most=6 * BLOCK)
        engine.scheduler.schedule(replace(WIDE, admission_watermark=0.3))
        running[floor] = len(engine.scheduler.running)
    # 8 blocks each at the peak, 2 now.
    assert running == {0.0: 160 * 0.3 // 8, 1.0: 160 // 8}


def test_max_tokens_bounds_what_is_expected() -> None:
    """History says 200 tokens; those who ask for 8 are let in together all the same, the others wait."""
    for most, admitted in ((8, 20), (400, 3)):
        lengths = LengthPredictor(512)
        for _ in range(600):
            lengths.observe(200)
        engine = Engine(160, lengths)
        for number in range(1, 21):
            engine.ask(number, prompt=8, output=8, most=most)
        engine.scheduler.schedule(WIDE)
        assert len(engine.scheduler.running) == admitted


def test_the_quantile_is_of_the_sum() -> None:
    """Peaks of single requests do not meet: more come in than if each were given its own 90 % quantile."""
    lengths = LengthPredictor(512)
    for number in range(512):
        lengths.observe(1 + number % 100)
    engine = Engine(1_000, lengths)
    for number in range(1, 301):
        engine.ask(number, prompt=8, output=50, most=400)
    engine.scheduler.schedule(WIDE)
    each = -(-(8 + lengths.remaining(0, 0.9)) // BLOCK)
    assert len(engine.scheduler.running) > 1.5 * (1_000 // each)


def test_what_is_stored_in_fewer_bits_asks_for_less() -> None:
    """At a quarter of the bits about four times as many fit."""
    running = {}
    for bits in (32, 8):
        engine = Engine(100, LengthPredictor(FAR))
        for number in range(1, 31):
            engine.ask(number, prompt=24, output=40, most=40)
        engine.scheduler.schedule(replace(WIDE, kv_element_bits=bits))
        running[bits] = len(engine.scheduler.running)
    assert running == {32: 100 // 16, 8: 100 // 4}


def test_who_evicts_grows_no_further_than_what_it_keeps() -> None:
    """Two that keep 16 tokens fit where two that keep everything do not."""
    running = {}
    for eviction in (None, Eviction("window", sink=0, recent=16)):
        engine = Engine(20, LengthPredictor(FAR))
        for number in (1, 2):
            engine.ask(number, prompt=12, output=60, most=60, eviction=eviction)
        engine.scheduler.schedule(WIDE)
        running[eviction is None] = len(engine.scheduler.running)
    assert running == {True: 1, False: 2}


def test_a_refusal_is_not_looked_at_again_at_every_step() -> None:
    """While nobody leaves, a queue that waits for memory costs the step loop nothing."""
    lengths = Counting(512)
    engine = Engine(100, lengths)
    for number in range(1, 31):
        engine.ask(number, prompt=24, output=200, most=200)
    engine.step()
    asked = lengths.asked
    running = len(engine.scheduler.running)
    for _ in range(ASK_AGAIN_STEPS - 1):
        engine.step()
        assert engine.scheduler.kv_limited
    assert (len(engine.scheduler.running), lengths.asked) == (running, asked)
    engine.step()
    assert lengths.asked > asked


class Counting(LengthPredictor):
    """Counts how often it is asked."""

    asked = 0

    def remaining(self, generated: int, q: float, tenant: str = "") -> int:
        self.asked += 1
        return super().remaining(generated, q, tenant)


def _served(ahead: bool) -> tuple[int, float]:
    """(preemptions, output tokens a second) of one backlog of which nobody knows who will be long."""
    engine, tokens = Engine(400, ahead=ahead), 0
    for number in range(1, 301):
        output = 90 if number % 5 == 0 else 5 + number % 20
        tokens += output
        engine.ask(number, prompt=50, output=output, most=200)
    engine.drain(replace(WIDE, prefill_chunk_tokens=64))
    return engine.scheduler.preemptions_total, tokens / (engine.clock.monotonic_ns() / NS)


def test_looking_ahead_saves_preemptions_and_costs_little_throughput() -> None:
    (without, plain), (ahead, predicted) = _served(False), _served(True)
    assert without > 20
    assert ahead < without / 2
    assert predicted > 0.95 * plain


def test_throughput_recovers_after_a_wave_of_long_outputs() -> None:
    """SGLang 26248: requests go on far longer than expected, and running ones are sent back; afterwards the
    estimate must not stay pessimistic. It is as good as before once the wave has left the predictor's window.
    """
    window, number = 64, 0
    engine = Engine(200, LengthPredictor(512, window))

    def wave(count: int, output: int) -> list[float]:
        """When each of so many requests finished, in order."""
        nonlocal number
        ids = range(number + 1, number + 1 + count)
        for number in ids:
            engine.ask(number, prompt=20, output=output + number % 7, most=400)
        engine.drain(replace(WIDE, prefill_chunk_tokens=64))
        return sorted(engine.finished_at_s[one] for one in ids)

    def rate(times: Sequence[float]) -> float:
        return (len(times) - 1) / (times[-1] - times[0])

    wave(window, 10)
    before = rate(wave(120, 10)[20:-40])
    wave(60, 100)
    assert engine.scheduler.preemptions_total > 0
    after = wave(80 + window, 10)
    assert rate(after[:window]) < before
    assert rate(after[window:-40]) > 0.95 * before
