"""Beam search in the engine: what a plain dense search finds, in exactly as many blocks as its tree has.

The fake executor refuses a batch that would read KV of another text, so sharing and copies are held to it.
"""

import random
from dataclasses import replace

import pytest
import torch
from beam_reference import Found, beam_search
from fake_executor import FakeExecutor, log_probabilities
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvengine.config import SHIPPED_TARGET
from kvengine.core import Core, Step
from kvengine.errors import DeviceOutOfMemory
from kvengine.executor.torch import EagerExecutor
from kvengine.kv.pool import BlockPool
from kvengine.kv.tree import PrefixTree
from kvengine.memory import MIB, DeviceMemory
from kvengine.model import weights
from kvengine.model.config import ModelConfig
from kvengine.model.domains import prompt as domain_prompt
from kvengine.model.llama import Llama
from kvengine.request import Request, SamplingParams
from kvengine.sched.admission import Limits
from kvengine.sched.batch import Batch
from kvengine.sched.beam import BeamGroup, refusal
from kvengine.sched.peak import PeakDemand
from kvengine.sched.scheduler import Knobs, Scheduler
from kvpilot.clock import VirtualClock
from kvpilot.inside.lengths import LengthPredictor

BLOCK = 4
EOS = frozenset({0, 97, 98, 99})
KNOBS = Knobs(64, 64, 4, 16, 1.0)


class Harness:
    def __init__(self, blocks: int = 80, cached: bool = True, length: int = 60) -> None:
        self.clock = VirtualClock(start_ns=1)
        self.error: Exception | None = None
        self.pool = BlockPool(blocks)
        self.tree = PrefixTree(self.pool, BLOCK, "fake") if cached else None
        self.scheduler = Scheduler(self.pool, BLOCK, levels=2, tree=self.tree)
        executor = FakeExecutor(BLOCK, before=self._before)
        limits = Limits(length, blocks * BLOCK)
        self.core = Core(self.scheduler, executor, limits, EOS, LengthPredictor(length), self.clock)
        self.groups: list[BeamGroup] = []
        self.finished: dict[int, str] = {}
        self.failed: set[int] = set()
        self.cancelled: set[int] = set()
        self.copies = 0
        self.arrivals = 0

    def _before(self, batch: Batch) -> None:
        self.clock.advance(0.01)
        self.copies += len(batch.copies)
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def arrive(
        self, prompt: list[int], width: int, output: int = 8, tenant: str | None = None, **sampling: object
    ) -> BeamGroup:
        params = SamplingParams(output, 0.0, scored=True, beams=width, **sampling)  # type: ignore[arg-type]
        family = [
            Request(self.arrivals + 1 + number, prompt, params, tenant=tenant) for number in range(width)
        ]
        self.arrivals += width
        group = BeamGroup(family)
        assert self.core.accept(family[0]) is None
        self.groups.append(group)
        return group

    def alone(self, prompt: list[int], output: int = 8) -> Request:
        """A request without beams."""
        self.arrivals += 1
        request = Request(self.arrivals, prompt, SamplingParams(output, ignore_eos=True))
        assert self.core.accept(request) is None
        return request

    def preempt(self) -> None:
        """As the next step would, for somebody more important."""
        self.scheduler._steps += 1
        if self.scheduler.running:
            self.scheduler._make_room(Request(10_000, [1], SamplingParams(1), klass=1))

    def step(self, knobs: Knobs = KNOBS) -> Step:
        step = self.core.step(knobs)
        self.finished |= {one.request.id: one.finish for one in step.emissions if one.finish}
        self.failed.update(one.request.id for one in step.failures)
        self.scheduler.check()
        return step

    def drain(self, knobs: Knobs = KNOBS) -> None:
        for _ in range(3000):
            if not self.core.requests:
                return
            self.step(knobs)
        raise AssertionError("requests never end")

    def blocks_of_the_trees(self) -> int:
        """What running sequences need when every text is stored once: full blocks, and what has begun."""
        texts = set()
        for request in self.scheduler.running:
            owner = request.tenant if self.tree else (request.tenant, id(request.group or request))
            text = tuple(request.tokens[: request.computed])
            texts |= {(owner, text[:end]) for end in range(BLOCK, len(text) + 1, BLOCK)}
            if len(text) % BLOCK:
                texts.add((owner, id(request.group or request), text))
        return len(texts)


def found(group: BeamGroup, harness: Harness) -> list[Found]:
    return [
        Found(one.tokens[len(one.prompt) :], one.logprob, hypothesis.score, harness.finished[one.id])
        for one, hypothesis in zip(group.family, group.finished, strict=True)
    ]


def expected(group: BeamGroup) -> list[Found]:
    leader = group.family[0]
    sampling = leader.sampling
    return beam_search(
        log_probabilities,
        leader.prompt,
        group.width,
        sampling.max_tokens,
        () if sampling.ignore_eos else EOS,
        sampling.length_penalty,
        sampling.early_stopping,
    )


@settings(max_examples=120, deadline=None)
@given(
    prompt=st.lists(st.integers(1, 255), min_size=1, max_size=14),
    width=st.integers(2, 6),
    output=st.integers(1, 12),
    penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
    early=st.sampled_from([False, True, "never"]),
    ignore_eos=st.booleans(),
    budget=st.integers(1, 20),
    chunk=st.integers(1, 9),
    cached=st.booleans(),
)
def test_beams_are_those_of_a_dense_search(
    prompt: list[int],
    width: int,
    output: int,
    penalty: float,
    early: bool | str,
    ignore_eos: bool,
    budget: int,
    chunk: int,
    cached: bool,
) -> None:
    """Whatever the chunks and the budget: also where it is less than a token for each beam."""
    harness = Harness(cached=cached)
    group = harness.arrive(
        prompt, width, output, ignore_eos=ignore_eos, length_penalty=penalty, early_stopping=early
    )
    while harness.core.requests:
        harness.step(Knobs(budget, chunk, 4, 16, 1.0))
        assert harness.pool.referenced == harness.blocks_of_the_trees()
    assert found(group, harness) == expected(group)
    assert harness.pool.referenced == 0
    assert harness.core.totals.prefill_tokens == len(prompt), "the prompt is computed once"


@pytest.mark.parametrize("prompt", [6, 15, 22, 30])
def test_beams_end_early_as_asked(prompt: int) -> None:
    """Prompts after which the three ways to end find three different things."""
    results = set()
    for early in (False, True, "never"):
        harness = Harness()
        group = harness.arrive([prompt], 2, 8, early_stopping=early)
        harness.drain()
        assert found(group, harness) == expected(group)
        results.add(tuple(tuple(one.tokens) for one in group.family))
    assert len(results) == 3


class BeamMachine(RuleBasedStateMachine):
    """Groups and plain requests, preempted, cancelled and failed, in a pool that is too small for all."""

    def __init__(self) -> None:
        super().__init__()
        self.engine: Harness = Harness(blocks=24)
        self.others: list[Request] = []

    @rule(
        shared=st.integers(0, 9),
        own=st.integers(1, 5),
        width=st.integers(2, 4),
        output=st.integers(1, 9),
        tenant=st.sampled_from([None, "a"]),
    )
    def arrive(self, shared: int, own: int, width: int, output: int, tenant: str | None) -> None:
        self.engine.arrive([9] * shared + [own] * own, width, output, tenant)

    @rule(own=st.integers(1, 5), length=st.integers(1, 20), output=st.integers(1, 20))
    def arrive_alone(self, own: int, length: int, output: int) -> None:
        self.others.append(self.engine.alone([own] * length, output))

    @rule(
        steps=st.integers(1, 6),
        budget=st.integers(1, 30),
        chunk=st.integers(1, 30),
        running=st.integers(1, 9),
        watermark=st.sampled_from([0.3, 1.0]),
    )
    def step(self, steps: int, budget: int, chunk: int, running: int, watermark: float) -> None:
        for _ in range(steps):
            self.engine.step(Knobs(budget, chunk, 2, running, watermark))
            self.nothing_is_lost()

    @precondition(lambda self: self.engine.core.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        engine = self.engine
        number = data.draw(st.sampled_from(sorted(engine.core.requests)))
        group = engine.core.requests[number].group
        engine.core.cancel(number)
        engine.cancelled |= {number} if group is None else {one.id for one in group.family}

    @precondition(lambda self: self.engine.core.requests)
    @rule()
    def preempt(self) -> None:
        self.engine.preempt()

    @precondition(lambda self: self.engine.core.requests)
    @rule()
    def fail(self) -> None:
        self.engine.error = DeviceOutOfMemory("test")
        self.engine.step()

    @invariant()
    def nothing_is_lost(self) -> None:
        engine = self.engine
        engine.scheduler.check()
        assert engine.pool.referenced == engine.blocks_of_the_trees()
        gone = engine.finished.keys() | engine.failed | engine.cancelled
        assert len(gone) + len(engine.core.requests) == engine.arrivals
        assert not gone & engine.core.requests.keys()
        totals = engine.core.totals
        assert totals.arrivals == engine.arrivals
        assert [totals.finished, totals.failed, totals.cancelled] == list(
            map(len, [engine.finished, engine.failed, engine.cancelled])
        )

    def teardown(self) -> None:
        self.engine.drain()
        self.nothing_is_lost()
        assert self.engine.pool.referenced == 0
        for group in self.engine.groups:
            if group.family[0].id in self.engine.finished:
                assert found(group, self.engine) == expected(group)


class UncachedBeamMachine(BeamMachine):
    """Without a prefix cache, what beams share after a preemption is what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Harness(blocks=24, cached=False)


TestBeamMachine = BeamMachine.TestCase
TestBeamMachine.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)
TestUncachedBeamMachine = UncachedBeamMachine.TestCase
TestUncachedBeamMachine.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)


def test_beam_blocks_are_copied_only_where_they_diverge_and_free_when_a_beam_dies() -> None:
    """Four beams after ten tokens: two full blocks held once, and a tail that each copies when it writes."""
    harness = Harness(cached=False)
    group = harness.arrive([5] * 10, 4, 12, ignore_eos=True)
    harness.step()
    assert len(group.live) == 4
    assert (harness.pool.referenced, harness.copies) == (3, 0), "nobody has written yet"
    texts = {tuple(one.tokens) for one in group.live}
    harness.step()
    assert harness.copies == 3, "the last one to write keeps the block"
    alive = {tuple(one.tokens[:-1]) for one in group.live}
    assert alive < texts, "in this step a beam dies: choose another prompt otherwise"
    assert harness.pool.referenced == 2 + len(alive), "what the dead held alone is free at once"


def test_beams_come_back_from_a_preemption_on_the_blocks_they_shared() -> None:
    """And in no more memory than was promised at the door: the pool holds no second copy of the prompt."""
    width, prompt, output = 3, [7] * 12, 8
    shared, own = 3, 2
    harness = Harness(blocks=shared + width * own, cached=False)
    group = harness.arrive(prompt, width, output, ignore_eos=True)
    for _ in range(4):
        harness.step()
    assert len(group.live) == 3
    harness.preempt()
    assert harness.pool.free == harness.pool.total
    assert [one.preemptions for one in group.family] == [1, 1, 1]
    assert harness.scheduler.preemptions_total == 3
    for _ in range(100):
        if not harness.core.requests:
            break
        harness.step(replace(KNOBS, prefill_chunk_tokens=5))
        assert harness.pool.referenced == harness.blocks_of_the_trees()
    assert found(group, harness) == expected(group)
    assert harness.core.totals.recomputed_tokens < 12 + 3 * 6, "the prompt was computed again once"


def test_a_group_with_more_beams_than_the_pool_holds_is_refused_with_the_numbers() -> None:
    assert refusal(12, 8, 3, 4, 9) is None
    reason = refusal(12, 8, 3, 4, 8)
    assert reason is not None
    assert "3 beams of 12 prompt tokens and 8 more need up to 9 KV blocks of 4 tokens" in reason
    assert "the engine has 8" in reason
    harness = Harness(blocks=8)
    family = [Request(i, [7] * 12, SamplingParams(8, 0.0, scored=True, beams=3)) for i in range(3)]
    BeamGroup(family)
    assert harness.core.accept(family[0]) == reason
    totals = harness.core.totals
    assert (totals.arrivals, totals.rejected) == (3, 3)


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(1, 13), output=st.integers(1, 12), width=st.integers(2, 5), seed=st.integers(0, 999)
)
def test_what_the_door_lets_in_always_fits(prompt: int, output: int, width: int, seed: int) -> None:
    """In a pool of exactly the size that the door asks for, whatever preempts it."""
    rng = random.Random(seed)
    blocks = next(
        n
        for n in range(1, 500)
        if refusal(prompt, output, width, BLOCK, n) is None and n * BLOCK >= prompt + output
    )
    harness = Harness(blocks=blocks, cached=bool(seed % 2))
    group = harness.arrive([1 + seed % 200] * prompt, width, output)
    for _ in range(2000):
        if not harness.core.requests:
            break
        harness.step(replace(KNOBS, step_token_budget=rng.randint(1, 9)))
        if rng.random() < 0.1:
            harness.preempt()
    assert found(group, harness) == expected(group)


def test_the_predicted_peak_counts_every_beam() -> None:
    """At its very highest, what the door asks for: 3 blocks of the prompt and 2 for each of three beams."""
    harness = Harness()
    group = harness.arrive([7] * 12, 3, 8)
    peak = PeakDemand(harness.scheduler.tables, LengthPredictor(60))
    peak.read([], group.live[0])
    assert peak.with_candidate(group.live[0], 0, z=1e9) == 9
    harness.step()
    peak.read(harness.scheduler.running)
    assert peak.peak(z=1e9) == 9


def test_beams_are_not_drafted_for_and_take_places_under_the_running_cap() -> None:
    harness = Harness()
    harness.alone([3] * 5, 30)
    harness.arrive([5] * 6, 4, 6, ignore_eos=True)
    harness.step(replace(KNOBS, max_running=4))
    assert len(harness.scheduler.running) == 1, "five would run"
    step = harness.step(replace(KNOBS, max_running=5))
    harness.alone([4] * 5, 30)
    while any(one.group for one in harness.core.requests.values()):
        assert all(item.drafts == 0 for item in step.batch.slices if item.request.group)
        assert len(harness.scheduler.running) <= 5
        step = harness.step(replace(KNOBS, max_running=5))


def test_beams_emit_a_token_each_a_step_and_count_as_they_are_computed() -> None:
    harness = Harness()
    harness.arrive([5] * 6, 3, 5, ignore_eos=True)
    emitted = []
    while harness.core.requests:
        emitted += harness.step().emissions
    assert len(emitted) == harness.core.totals.decode_tokens == 3 * 5
    assert sum(one.first for one in emitted) == 3
    assert all(len(one.tokens) == 1 for one in emitted)


@pytest.mark.parametrize("domain", ["json", "python"])
@torch.inference_mode()
def test_beams_of_the_shipped_model_are_those_of_a_dense_search(domain: str) -> None:
    """The reference computes every text from its first token, alone; differences are rounding."""
    config = ModelConfig.load(SHIPPED_TARGET)
    model = Llama(config, weights.load(SHIPPED_TARGET, config))
    executor = EagerExecutor(model, None, DeviceMemory(256 * MIB), 128, 16)
    dense = EagerExecutor(model, None, DeviceMemory(256 * MIB), 16, 16)
    scheduler = Scheduler(BlockPool(128), 16)
    core = Core(
        scheduler, executor, Limits(2048, 2048), frozenset(), LengthPredictor(2048), VirtualClock(start_ns=1)
    )
    text = list(domain_prompt(domain, 70, 4).encode())
    params = SamplingParams(14, 0.0, scored=True, beams=4)
    group = BeamGroup([Request(i, text, params) for i in range(4)])
    core.accept(group.family[0])
    for _ in range(100):
        core.step(replace(KNOBS, prefill_chunk_tokens=32))
        scheduler.check()
    assert not core.requests
    known: dict[tuple[int, ...], list[tuple[int, float]]] = {}

    def follow(tokens: list[int]) -> list[tuple[int, float]]:
        key = tuple(tokens)
        if key not in known:
            known[key] = _dense_log_probabilities(dense, tokens)
        return known[key]

    reference = beam_search(follow, text, 4, 14)
    assert [one.tokens[70:] for one in group.family] == [one.output for one in reference]
    for hypothesis, one in zip(group.finished, reference, strict=True):
        assert hypothesis.logprob == pytest.approx(one.logprob, abs=1e-3)
        assert hypothesis.score == pytest.approx(one.score, abs=1e-4)


def _dense_log_probabilities(executor: EagerExecutor, tokens: list[int]) -> list[tuple[int, float]]:
    from kvengine.model.llama import Span

    blocks = list(range(-(-len(tokens) // 16)))
    logits = executor._target.forward([Span(tokens, 0, blocks, 1)], executor._target_kv, executor._scratch)
    return list(enumerate(logits[0].double().log_softmax(-1).tolist()))
