"""With a real model: a request that evicts computes exactly what attention over the kept tokens is.

The reference is `transformers` over the whole text, under a mask that says for each query which tokens were
still stored when it was computed. Who did not opt in computes what it always did.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from llamas import engine_model, reference_model
from torch import Tensor

from kvengine.core import Core
from kvengine.executor.torch import EagerExecutor
from kvengine.kv.eviction.policy import Eviction, Offer
from kvengine.kv.pool import BlockPool
from kvengine.kv.tree import PrefixTree
from kvengine.memory import MIB, DeviceMemory
from kvengine.model.llama import Llama
from kvengine.request import Request, SamplingParams
from kvengine.sched.admission import Limits
from kvengine.sched.batch import Batch, SliceResult
from kvengine.sched.scheduler import Knobs, Scheduler
from kvpilot.clock import VirtualClock
from kvpilot.inside.lengths import LengthPredictor

BLOCKS, BLOCK_SIZE = 64, 8
KNOBS = Knobs(256, 32, 0, 8, 1.0)
WINDOW = Eviction("window", sink=8, recent=24)
HEAVY = Eviction("h2o", sink=8, recent=16, heavy=16)


class Engine:
    """An engine that notes which positions each query could see, and the logits that came out."""

    def __init__(self, target: Llama, cached: bool = True, blocks: int = BLOCKS) -> None:
        pool = BlockPool(blocks)
        tree = PrefixTree(pool, BLOCK_SIZE, "test") if cached else None
        self.scheduler = Scheduler(pool, BLOCK_SIZE, tree=tree)
        self.executor = EagerExecutor(
            target, None, DeviceMemory(512 * MIB), blocks, BLOCK_SIZE, heavy_hitters=True
        )
        clock, limits = VirtualClock(start_ns=1), Limits(500, blocks * BLOCK_SIZE)
        lengths, offer = LengthPredictor(500), Offer(BLOCK_SIZE, heavy_hitters=True)
        self.core = Core(self.scheduler, self, limits, frozenset(), lengths, clock, offer)
        self.stored: dict[Request, list[int]] = {}
        self.seen: dict[Request, dict[int, list[int]]] = {}
        evict = self.scheduler.tables.evict

        def noted(request: Request, numbers: Sequence[int], **more: bool) -> None:
            positions = self.stored[request]
            for number in reversed(numbers):
                del positions[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE]
            evict(request, numbers, **more)

        self.scheduler.tables.evict = noted

    def execute(self, batch: Batch) -> list[SliceResult]:
        for item in batch.slices:
            stored = self.stored.setdefault(item.request, list(range(item.start)))
            rows = self.seen.setdefault(item.request, {})
            for position in range(item.start, item.start + item.count):
                stored.append(position)
                rows[position] = list(stored)
        return self.executor.execute(batch)

    def run(self, *requests: Request, knobs: Knobs = KNOBS) -> None:
        for request in requests:
            assert self.core.accept(request) is None
        while self.core.requests:
            self.core.step(knobs)
            self.scheduler.check()


@pytest.fixture(scope="module")
def reference():
    return reference_model(kv_heads=2)


@pytest.fixture(scope="module")
def target(reference) -> Llama:
    return engine_model(reference)


def text(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def request(count: int = 120, eviction: Eviction | None = None, seed: int = 0, number: int = 1) -> Request:
    return Request(number, text(count, seed), SamplingParams(30, 0.0), eviction=eviction)


@torch.inference_mode()
def dense(reference, tokens: list[int], seen: dict[int, list[int]]) -> Tensor:
    """Logits of every position, each under the mask of what it saw."""
    count = len(tokens)
    mask = torch.full((1, 1, count, count), float("-inf"))
    for position in range(count):
        mask[0, 0, position, seen[position]] = 0.0
    return reference(torch.tensor([tokens]), attention_mask=mask).logits[0]


@pytest.mark.parametrize("eviction", [WINDOW, HEAVY, Eviction("h2o", sink=0, recent=8, heavy=24)])
@pytest.mark.parametrize("chunk", [32, 7, 256])
def test_evicted_output_is_attention_over_what_is_kept(reference, target, eviction, chunk) -> None:
    engine, asked = Engine(target), request(eviction=eviction)
    engine.run(asked, knobs=replace(KNOBS, prefill_chunk_tokens=chunk))
    tokens, seen = asked.tokens, engine.seen[asked]
    logits = dense(reference, tokens[:-1], seen)
    best, second = logits[len(asked.prompt) - 1 :].topk(2).values.unbind(-1)
    picked = logits[len(asked.prompt) - 1 :].gather(1, torch.tensor(tokens[len(asked.prompt) :]).unsqueeze(1))
    assert (best - picked.squeeze(1)).max() < 1e-4, "greedy, up to ties"
    assert (best - second).median() > 1e-3, "a test that could not fail"
    assert max(map(len, seen.values())) <= 48 + chunk + BLOCK_SIZE
    full = dense(reference, tokens[:-1], {p: list(range(p + 1)) for p in range(len(tokens))})
    assert (full - logits).abs().max() > 0.1, "what was evicted made no difference"


def test_evicted_heavy_blocks_are_those_that_drew_least(reference, target) -> None:
    """The scores are the attention of `transformers`, summed over layers, heads and queries."""
    engine, asked = Engine(target), request(64, HEAVY)
    engine.core.accept(asked)
    engine.core.step(replace(KNOBS, prefill_chunk_tokens=64))
    reference.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            weights = reference(torch.tensor([asked.prompt]), output_attentions=True).attentions
    finally:
        reference.set_attn_implementation("sdpa")
    drawn = sum(layer[0].sum((0, 1)) for layer in weights).view(8, BLOCK_SIZE).sum(1)
    torch.testing.assert_close(torch.tensor(asked.block_mass), drawn, atol=1e-3, rtol=1e-4)
    engine.core.step(KNOBS)
    lightest = drawn[1:6].topk(3, largest=False).indices + 1
    gone = {number for number in range(8) if number * BLOCK_SIZE not in engine.stored[asked]}
    assert gone == set(lightest.tolist())


def test_streaming_output_is_that_of_the_kept_tokens_alone() -> None:
    """One layer's keys follow from tokens and positions only: so the kept tokens, side by side at positions
    from 0 on, are the reference, and true positions are not.
    """
    reference = reference_model(kv_heads=2, layers=1)
    target = engine_model(reference)
    gaps = {}
    for policy in ("streaming", "window"):
        engine = Engine(target)
        asked = request(eviction=Eviction(policy, sink=8, recent=24))
        engine.run(asked, knobs=replace(KNOBS, prefill_chunk_tokens=16))
        assert asked.output_count == 30
        worst = 0.0
        for position in range(len(asked.prompt) - 1, len(asked.tokens) - 1):
            kept = [asked.tokens[one] for one in engine.seen[asked][position]]
            assert len(kept) < 48
            with torch.inference_mode():
                logits = reference(torch.tensor([kept])).logits[0, -1]
            worst = max(worst, (logits.max() - logits[asked.tokens[position + 1]]).item())
        gaps[policy] = worst
    assert gaps["streaming"] < 1e-3
    assert gaps["window"] > 0.01


def test_evict_turns_keys_by_exactly_that_many_positions(target) -> None:
    """Keys of positions 0 to 7 moved on by 40 are the keys of positions 40 to 47."""
    from llamas import Bench

    from kvengine.model.llama import Span

    bench = Bench.of(target, BLOCK_SIZE)
    tokens = text(8)
    bench.forward(Span(tokens, 0, [3], 1))
    bench.forward(Span(tokens, 40, [9], 1, evicted=40))
    values = bench.storage.blocks[0][9].clone()
    bench.storage.turn([3], target.rotation(40))
    torch.testing.assert_close(bench.storage.blocks[0][3], values, atol=1e-5, rtol=0)


def test_evict_is_opt_in_only(target) -> None:
    """The knob and the others change nothing for who did not ask: the same logits, bit for bit."""
    logits: list[list[Tensor]] = []
    for ratio in (1.0, 0.05):
        engine, seen = Engine(target), []
        forward = target.forward

        def watched(*given: object, forward=forward, seen=seen) -> Tensor:
            out = forward(*given)
            seen.append(out.clone())
            return out

        engine.executor._target = type("Watched", (), {"forward": staticmethod(watched)})()
        plain = request()
        engine.run(plain, knobs=replace(KNOBS, kv_kept_ratio=ratio))
        assert plain.output_count == 30
        assert engine.scheduler.tables.evicted_tokens_total == 0
        logits.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


def test_output_of_others_is_the_same_beside_those_that_evict(target) -> None:
    alone, crowded = Engine(target), Engine(target)
    plain = request(seed=5)
    alone.run(plain)
    beside = request(seed=5)
    evicting = [
        request(eviction=eviction, seed=seed, number=seed + 2)
        for seed, eviction in enumerate([WINDOW, HEAVY, Eviction("streaming", sink=8, recent=24)])
    ]
    crowded.run(beside, *evicting)
    assert beside.tokens == plain.tokens
    assert crowded.scheduler.tables.evicted_tokens_total > 200


def test_evict_follows_the_knob_in_mid_flight(target) -> None:
    """Down, blocks come free at the next step boundary; up again, what is gone is gone, and it grows."""
    engine = Engine(target, cached=False)
    asked = Request(1, text(160), SamplingParams(200, 0.0), eviction=Eviction("window", sink=4))
    engine.core.accept(asked)
    for _ in range(8):
        engine.core.step(KNOBS)
    assert (asked.evicted, engine.scheduler.pool.free) == (0, BLOCKS - len(asked.blocks))
    before = len(asked.blocks)
    engine.core.step(replace(KNOBS, kv_kept_ratio=0.5))
    assert len(asked.blocks) == -(-asked.computed // 16)
    assert engine.scheduler.pool.free == BLOCKS - len(asked.blocks)
    assert asked.evicted == (before - len(asked.blocks)) * BLOCK_SIZE
    evicted, held = asked.evicted, len(asked.blocks)
    for _ in range(40):
        engine.core.step(KNOBS)
        engine.scheduler.check()
    assert asked.evicted == evicted
    assert len(asked.blocks) == held + 5
    engine.core.cancel(1)
    assert engine.scheduler.pool.free == BLOCKS


def test_evict_bounds_what_a_request_holds_in_a_small_pool(target) -> None:
    """Two of 136 tokens each in a pool of 20 blocks: both run side by side, nobody is preempted."""
    for eviction, preempted in ((WINDOW, 0), (None, 1)):
        engine = Engine(target, cached=False, blocks=20)
        both = [request(76, eviction, seed, seed) for seed in (1, 2)]
        for one in both:
            one.sampling = replace(one.sampling, max_tokens=60)
        engine.run(*both, knobs=replace(KNOBS, prefill_chunk_tokens=24))
        assert all(one.output_count == 60 for one in both)
        assert min(engine.scheduler.preemptions_total, 1) == preempted


def test_evict_comes_back_from_preemption(target) -> None:
    """A lossy request that lost its KV computes it again, evicts again, and ends."""
    engine = Engine(target, blocks=16)
    asked = request(60, Eviction("h2o", sink=8, recent=32, heavy=16), number=1)
    grows = Request(2, text(40, 3), SamplingParams(60, 0.0), klass=1)
    engine.scheduler.waiting = type(engine.scheduler.waiting)(2)
    engine.run(asked, grows)
    assert asked.preemptions >= 1
    assert (asked.output_count, grows.output_count) == (30, 60)


def test_an_evict_the_engine_cannot_serve_is_refused_at_the_door(target) -> None:
    engine = Engine(target)
    refused = engine.core.accept(request(eviction=Eviction("window", recent=7)))
    assert refused is not None
    assert "recent is 7 tokens and a block holds 8" in refused
    assert (engine.core.totals.rejected, len(engine.scheduler.waiting)) == (1, 0)
