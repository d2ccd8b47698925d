"""The engine's own scheduler, admission, pool and tables in virtual time, for benches that need no model.

Only the forward pass is replaced, by a roofline with the shape of a small GPU's; figures from here are counts
and ratios of virtual time, equal on every machine.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, log

from kvengine.core import Core, Step
from kvengine.executor.virtual import VirtualExecutor
from kvengine.kv.pool import BlockPool
from kvengine.kv.tree import PrefixTree
from kvengine.request import Request, SamplingParams
from kvengine.sched.admission import Limits
from kvengine.sched.batch import Batch
from kvengine.sched.scheduler import Knobs, Scheduler
from kvpilot.clock import NS, VirtualClock
from kvpilot.inside.lengths import LengthPredictor

END = 1
"""The token with which an output ends."""


def step_seconds(batch: Batch) -> float:
    """Overhead, weights read or multiplied, KV read, attention of the prompts."""
    return (
        1.5e-3
        + 8e-6 * len(batch.slices)
        + ((28e-6 * batch.tokens) ** 4 + 5.5e-3**4) ** 0.25
        + 49e-9 * batch.context_tokens
        + 1.31e-9 * batch.chunk_positions
    )


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal token counts with this mean, cut to `least`..`most`."""

    mean: float
    sigma: float
    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        tokens = round(exp(rng.gauss(log(self.mean) - self.sigma**2 / 2, self.sigma)))
        return min(max(tokens, self.least), self.most)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: when it comes, what it sends, where its output really ends, and what it allows."""

    at_s: float
    prompt: int
    output: int
    max_tokens: int
    tenant: str | None = None
    shared_prefix: int = 0
    """Leading prompt tokens that all of its tenant's requests have in common."""


@dataclass(slots=True)
class Seen:
    """What a run looked like."""

    seconds: float = 0.0
    output_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    worst_gaps_s: list[float] = field(default_factory=list)
    """Of each finished request, its longest time between two tokens."""
    finished_at_s: list[tuple[float, int]] = field(default_factory=list)
    """(when, output tokens) of each."""


class VirtualEngine:
    """One engine of `blocks` blocks; `looks_ahead` turns the predicted peak on, at a quantile."""

    def __init__(
        self,
        blocks: int,
        block_size: int,
        most_tokens: int,
        *,
        looks_ahead: bool = True,
        pessimism: float | None = None,
        cached: bool = False,
    ) -> None:
        self.clock = VirtualClock()
        self.lengths = LengthPredictor(most_tokens)
        pool = BlockPool(blocks)
        tree = PrefixTree(pool, block_size, "bench", salt=b"bench") if cached else None
        ahead = self.lengths if looks_ahead else None
        self.scheduler = Scheduler(pool, block_size, tree=tree, lengths=ahead)
        if self.scheduler.peak is not None and pessimism is not None:
            self.scheduler.peak.pessimism = pessimism
        self._outputs: dict[int, int] = {}
        self.executor = VirtualExecutor(step_seconds, self.clock.advance, token=self._token)
        limits = Limits(most_tokens, blocks * block_size)
        self.core = Core(self.scheduler, self.executor, limits, frozenset({END}), self.lengths, self.clock)

    def run(
        self,
        asked: Sequence[Asked],
        knobs: Knobs,
        watch: Callable[[Step], object] = lambda step: None,
        until: Callable[["VirtualEngine"], bool] = lambda engine: False,
    ) -> Seen:
        """Serve all of `asked`, which are in order of arrival, or until `until` says so."""
        seen, gaps, coming = Seen(), dict[int, float](), list(reversed(asked))
        while (coming or self.core.requests) and not until(self):
            now_s = self.clock.monotonic_ns() / NS
            while coming and (coming[-1].at_s <= now_s or not self.core.requests):
                self._accept(coming.pop())
            step = self.core.step(knobs)
            watch(step)
            for emission in step.emissions:
                request = emission.request
                if not emission.first:
                    gaps[request.id] = max(gaps.get(request.id, 0.0), emission.since_ns / NS)
                if emission.finish:
                    ended_s = step.ended_ns / NS
                    seen.finished_at_s.append((ended_s, request.output_count))
                    seen.worst_gaps_s.append(gaps.pop(request.id, 0.0))
        seen.seconds = self.clock.monotonic_ns() / NS
        seen.output_tokens = sum(tokens for _, tokens in seen.finished_at_s)
        seen.preemptions = self.scheduler.preemptions_total
        seen.recomputed_tokens = self.core.totals.recomputed_tokens
        return seen

    def _accept(self, asked: Asked) -> None:
        number = len(self._outputs) + 1
        self._outputs[number] = asked.output
        own = random.Random(number)
        common = random.Random(asked.tenant or "")
        prompt = [common.randrange(2, 1000) for _ in range(asked.shared_prefix)]
        prompt += [own.randrange(2, 1000) for _ in range(asked.prompt - asked.shared_prefix)]
        arrived_ns = max(self.clock.monotonic_ns(), round(asked.at_s * NS))
        request = Request(
            number, prompt, SamplingParams(asked.max_tokens), tenant=asked.tenant, arrived_ns=arrived_ns
        )
        refused = self.core.accept(request)
        assert refused is None, refused

    def _token(self, request: Request, index: int) -> int:
        return END if index + 1 >= self._outputs[request.id] else 7
