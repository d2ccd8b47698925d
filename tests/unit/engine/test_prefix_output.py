"""With a real model: what comes out is the same with and without the prefix cache, choices and copies too.

Greedy, token for token; every logit of the model depends on all KV before it, so KV of another text would
show.
"""

from dataclasses import replace

import pytest
from llamas import engine_model, reference_model

from kvengine.core import Core
from kvengine.executor.torch import EagerExecutor
from kvengine.kv.pool import BlockPool
from kvengine.kv.tree import PrefixTree
from kvengine.memory import MIB, DeviceMemory
from kvengine.model.llama import Llama
from kvengine.model.weights import LlamaWeights
from kvengine.request import Request, SamplingParams
from kvengine.sched.admission import Limits
from kvengine.sched.scheduler import Knobs, Scheduler
from kvpilot.clock import VirtualClock
from kvpilot.inside.lengths import LengthPredictor

BLOCKS, BLOCK_SIZE = 64, 8
KNOBS = Knobs(256, 256, 0, 8, 1.0)


@pytest.fixture(scope="module")
def target() -> Llama:
    return engine_model(reference_model(kv_heads=2))


@pytest.fixture(scope="module")
def draft(target: Llama) -> Llama:
    """The target without its last layer."""
    held = target._weights
    shortened = LlamaWeights(held.embedding, held.layers[:-1], held.norm, held.output)
    return Llama(replace(target.config, layers=2), shortened)


class Engine:
    def __init__(
        self, target: Llama, draft: Llama | None = None, cached: bool = True, blocks: int = BLOCKS
    ) -> None:
        pool = BlockPool(blocks)
        self.tree = PrefixTree(pool, BLOCK_SIZE, "test") if cached else None
        self.scheduler = Scheduler(pool, BLOCK_SIZE, tree=self.tree)
        executor = EagerExecutor(target, draft, DeviceMemory(512 * MIB), blocks, BLOCK_SIZE)
        limits = Limits(500, blocks * BLOCK_SIZE)
        self.core = Core(
            self.scheduler, executor, limits, frozenset(), LengthPredictor(500), VirtualClock(start_ns=1)
        )
        self.count = 0

    def run(self, prompts: list[list[int]], knobs: Knobs = KNOBS, **more: object) -> list[list[int]]:
        """Outputs of 24 tokens, all requests at once."""
        sampling = SamplingParams(24, **{"temperature": 0.0, **more})
        made = []
        for prompt in prompts:
            self.count += 1
            made.append(Request(self.count, prompt, sampling, tenant="a"))
            assert self.core.accept(made[-1]) is None
        while self.core.requests:
            self.core.step(knobs)
            self.scheduler.check()
        return [request.tokens[len(request.prompt) :] for request in made]


def conversations() -> list[list[int]]:
    """Three that begin with the same 37 tokens, and one that does not."""
    system = [(7 * i + i * i) % 97 for i in range(37)]
    return [[*system, 1, 2, 3], [*system, 1, 2, 4, 5, 6, 7, 8, 9, 10], system, [5] * 20]


@pytest.mark.parametrize("drafts", [0, 3])
def test_warm_output_is_cold_output(target: Llama, draft: Llama, drafts: int) -> None:
    """Twice over the same prompts and once over their continuations; drafts in cached blocks too."""
    knobs = replace(KNOBS, speculative_tokens=drafts)
    engine, plain = Engine(target, draft), Engine(target, cached=False)
    cold = plain.run(conversations())
    assert engine.run(conversations(), knobs) == cold
    assert engine.run(conversations(), knobs) == cold
    longer = [[*prompt, *out, 11] for prompt, out in zip(conversations(), cold, strict=True)]
    assert engine.run(longer, knobs) == plain.run(longer)
    tables = engine.scheduler.tables
    assert tables.hit_tokens_total > 0.5 * tables.queried_tokens_total
    if drafts:
        totals = engine.core.totals
        assert 0 < totals.accepted_tokens < totals.drafted_tokens


def test_output_is_the_same_while_everything_is_evicted(target: Llama) -> None:
    """A pool that holds two of the four: preempted, evicted, found again, computed again."""
    engine, plain = Engine(target, blocks=18), Engine(target, cached=False)
    cold = plain.run(conversations())
    for _ in range(3):
        assert engine.run(conversations()) == cold
    assert engine.core.totals.recomputed_tokens > 0


@pytest.mark.parametrize("length", [16, 19])
@pytest.mark.parametrize("drafts", [0, 3])
def test_cow_choices_say_what_each_would_say_alone(
    target: Llama, draft: Llama, length: int, drafts: int
) -> None:
    """Sampled, so that they diverge in a block that they shared; each has a seed of its own."""
    prompt = conversations()[0][:length]
    alone = [Engine(target).run([prompt], temperature=0.9, seed=seed)[0] for seed in (5, 6, 7)]
    assert len({tuple(out) for out in alone}) == 3
    engine = Engine(target, draft)
    family = [
        Request(number, prompt, SamplingParams(24, temperature=0.9, seed=4 + number))
        for number in range(1, 4)
    ]
    family[0].add_forks(family[1:])
    assert engine.core.accept(family[0]) is None
    knobs = replace(KNOBS, speculative_tokens=drafts)
    while engine.core.requests:
        engine.core.step(knobs)
        engine.scheduler.check()
    said = [request.tokens[length:] for request in family]
    assert [len(out) for out in said] == [24] * 3
    if not drafts:  # With drafts, other uniforms decide: the law is the same, the tokens are not.
        assert said == alone
