"""One code path: by step number, the engine decides in virtual time what it decides with a model.

The same arrivals, cancellations and knobs at the same steps; what each step computes, slice by slice, must be
the same, though one engine computes tokens for milliseconds and the other only says that it did.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from fake_executor import FakeExecutor
from worlds import Linear, small

from kvengine.config import SHIPPED_DRAFT, SHIPPED_TARGET
from kvengine.core import Core
from kvengine.executor.torch import EagerExecutor
from kvengine.executor.virtual import VirtualExecutor
from kvengine.kv.pool import BlockPool
from kvengine.kv.tree import PrefixTree
from kvengine.memory import MIB, DeviceMemory
from kvengine.model import weights
from kvengine.model.config import ModelConfig
from kvengine.model.llama import Llama
from kvengine.request import Request, SamplingParams
from kvengine.sched.admission import Limits
from kvengine.sched.batch import Batch, SliceResult
from kvengine.sched.scheduler import Knobs, Scheduler
from kvpilot.clock import NS, SystemClock, VirtualClock
from kvpilot.inside.lengths import LengthPredictor
from kvpilot.link.controls import CONTROLS_BYTES
from kvpilot.simulate.engine import build_engine

BLOCK, BLOCKS, LONGEST = 16, 13, 192
Decisions = list[list[tuple[int, int, int, int, bool, bool]]]


@dataclass
class Script:
    """What happens before each step."""

    arrivals: dict[int, list[tuple[int, int, int, int]]]
    """Step -> (id, prompt, output, class)."""
    cancels: dict[int, int]
    knobs: dict[int, Knobs]


def script(seed: int, steps: int = 120) -> Script:
    """More than the pool holds at once, so that requests wait and are preempted; knobs that move."""
    dice, number = random.Random(seed), 0
    arrivals: dict[int, list[tuple[int, int, int, int]]] = {}
    for step in range(0, steps, 2):
        arrivals[step] = []
        for _ in range(dice.choice((0, 0, 1, 1, 3))):
            number += 1
            sizes = dice.randrange(1, 120), dice.randrange(1, 60)
            arrivals[step].append((number, *sizes, dice.randrange(2)))
    cancels = {dice.randrange(5, steps): dice.randrange(1, number + 1) for _ in range(6)}
    knobs = {
        step: Knobs(
            64, dice.choice((8, 24, 64)), dice.choice((0, 1, 3)), dice.choice((4, 8)), dice.choice((0.8, 1.0))
        )
        for step in range(0, steps, 20)
    }
    return Script(arrivals, cancels, knobs)


def fly(core: Core, happens: Script, longest: int = 2_000) -> Decisions:
    """What each step computed, to the end of all requests."""
    decided: Decisions = []
    execute = core._executor.execute

    def noted(batch: Batch) -> list[SliceResult]:
        decided.append(
            [(s.request.id, s.start, s.count, s.drafts, s.samples, s.decode) for s in batch.slices]
        )
        return execute(batch)

    core._executor.execute = noted  # type: ignore[method-assign]
    step, knobs = 0, happens.knobs[0]
    while core.requests or step <= max(happens.arrivals):
        knobs = happens.knobs.get(step, knobs)
        for number, prompt, output, klass in happens.arrivals.get(step, ()):
            sampling = SamplingParams(output, temperature=0.0, seed=number, ignore_eos=True)
            tokens = [1 + (number * 7 + i * i) % 90 for i in range(prompt)]
            core.accept(Request(number, tokens, sampling, klass, arrived_ns=1 + step * NS + number))
        if step in happens.cancels:
            core.cancel(happens.cancels[step])
        core.step(knobs)
        core.scheduler.check()
        step += 1
        assert step < longest
    assert core.scheduler.preemptions_total > 0, "nothing was preempted: the test shows too little"
    assert any(drafts for slices in decided for *_, drafts, _, _ in slices)
    return decided


def core_over(executor: object, clock: object, cached: bool = False) -> Core:
    pool = BlockPool(BLOCKS)
    tree = PrefixTree(pool, BLOCK, "m") if cached else None
    scheduler = Scheduler(pool, BLOCK, 2, tree)
    limits = Limits(LONGEST, BLOCKS * BLOCK)
    return Core(scheduler, executor, limits, frozenset(), LengthPredictor(LONGEST), clock)  # type: ignore[arg-type]


class TwoStand:
    """Of every round's drafts the first two are accepted."""

    def rate(self, domain: str, depth: int, at_s: float) -> float:
        return float(depth < 2)


@pytest.mark.parametrize("seed", range(6))
def test_over_an_engine_that_watches_its_kv(seed: int) -> None:
    """The assembled virtual engine against a core whose executor refuses any slot that it should not read."""
    clock = VirtualClock(NS)
    real = core_over(FakeExecutor(BLOCK, accepted=2, before=lambda batch: clock.advance(0.003)), clock)
    clock = VirtualClock(NS)
    deployment = small(blocks=BLOCKS, max_model_len=LONGEST, step_token_budget=64, prefill_chunk_tokens=64)
    virtual = build_engine(
        deployment,
        Linear(),
        wire=None,
        spend=clock.advance,
        clock=clock,
        controls=bytearray(CONTROLS_BYTES),
        acceptance=TwoStand(),
        domain=lambda request_id: "json",
    )
    assert fly(real, script(seed)) == fly(virtual.core, script(seed))


@pytest.mark.parametrize("cached", [False, True])
def test_over_a_real_model(cached: bool) -> None:
    """A real pass of target and draft against virtual time in which the same drafts stand."""
    model = _Noting(_torch_executor())
    decided = fly(core_over(model, SystemClock(), cached), script(11, 60))
    clock = VirtualClock(NS)
    executor = VirtualExecutor(
        Linear().step_seconds,
        clock.advance,
        lambda request, drafts: model.stood[request.id, request.output_count],
        # A prefix cache looks at what was said.
        token=lambda request, number: model.said[request.id, number],
    )
    assert fly(core_over(executor, clock, cached), script(11, 60)) == decided


class _Noting:
    """An executor; how many drafts stood where, and what was said, by (request, output position)."""

    def __init__(self, inner: EagerExecutor) -> None:
        self._inner = inner
        self.stood: dict[tuple[int, int], int] = {}
        self.said: dict[tuple[int, int], int] = {}

    def execute(self, batch: Batch) -> list[SliceResult]:
        results = self._inner.execute(batch)
        for item, result in zip(batch.slices, results, strict=True):
            number, first = item.request.id, item.request.output_count
            self.stood[number, first] = result.accepted
            self.said |= {(number, first + i): token for i, token in enumerate(result.tokens)}
        return results


def _torch_executor() -> EagerExecutor:
    torch.set_num_threads(1)
    models = []
    for path in (SHIPPED_TARGET, SHIPPED_DRAFT):
        config = ModelConfig.load(path)
        models.append(Llama(config, weights.load(path, config, torch.device("cpu")), LONGEST))
    return EagerExecutor(models[0], models[1], DeviceMemory(512 * MIB), BLOCKS, BLOCK)
