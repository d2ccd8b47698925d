"""A whole flight in virtual time: the reference engine's core over a law of step times, the valve's own law,
the pilot with policies, and clients that come as a workload says. Nothing sleeps and no model computes.

The law is that of a small engine: a constant, so much a token, more for drafts, with noise and hiccups. It is
the world's, not the pilot's: what the pilot forecasts it learns from step records, as in front of any engine.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fake_executor import Reading
from pilot_world import CLASSES, IDENTITY, MemoryPage, MemoryValve, World

from kvengine.config import EngineConfig
from kvengine.core import Core
from kvengine.kv.plan import Plan
from kvengine.kv.pool import BlockPool
from kvengine.manifest import build_manifest
from kvengine.request import Request, SamplingParams
from kvengine.sched.admission import Limits
from kvengine.sched.batch import Batch, Slice, SliceResult
from kvengine.sched.scheduler import Scheduler
from kvengine.telemetry import Telemetry, provided_fields
from kvpilot.clock import NS, VirtualClock
from kvpilot.inside.hook import StepHook, with_hook_fields
from kvpilot.inside.lengths import LengthPredictor
from kvpilot.link.telemetry import TelemetryWriter, plan_page
from kvpilot.pilot import TICK_NS
from kvpilot.workload.arrival import Arrival

SHIPPED = Path(__file__).parents[3] / "policies"
BLOCK, BLOCKS, LONGEST = 16, 800, 2048
BYTES_PER_TOKEN = 4
SLO = {
    "batch": {"ttft": 3.8, "itl": 0.100},
    "interactive": {"ttft": 0.38, "itl": 0.025},
}


def shipped(*names: str) -> list[str]:
    """The texts of these shipped policies; all of them without names."""
    return [path.read_text() for path in sorted(SHIPPED.glob("*.yaml")) if not names or path.stem in names]


def step_seconds(batch: Batch, dice: random.Random) -> float:
    """The law."""
    drafted = sum(item.drafts for item in batch.slices)
    deepest = max((item.drafts for item in batch.slices), default=0)
    seconds = 0.001 + 66e-6 * batch.prefill_tokens + 150e-6 * batch.decode_sequences
    seconds += 40e-6 * drafted + 0.6e-3 * deepest + 5e-8 * batch.context_tokens
    return seconds * dice.lognormvariate(0.0, 0.05) + (0.030 if dice.random() < 0.001 else 0.0)


class LawExecutor:
    """Takes the time that the law says; a draft is accepted by the chance of its request's domain."""

    def __init__(self, clock: VirtualClock, accepted: Callable[[Request], float], seed: int) -> None:
        self._clock = clock
        self._accepted = accepted
        self._dice = random.Random(seed)
        self.busy_s = 0.0

    def memory(self) -> Reading:
        return Reading()

    def execute(self, batch: Batch) -> list[SliceResult]:
        seconds = step_seconds(batch, self._dice)
        self.busy_s += seconds
        self._clock.advance(seconds)
        return [self._compute(item) for item in batch.slices]

    def _compute(self, item: Slice) -> SliceResult:
        if not item.samples:
            return SliceResult([])
        chance, hits = self._accepted(item.request), 0
        while hits < item.drafts and self._dice.random() < chance:
            hits += 1
        return SliceResult([7] * (hits + 1), item.drafts, hits)


@dataclass
class Life:
    """One request, as its client saw it. Times in seconds of the flight."""

    arrival: Arrival
    shed: bool = False
    first_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def good(self) -> bool:
        """In time, at pace in 95 of 100 gaps, and never held up for long."""
        slo = SLO[self.arrival.klass]
        if not self.finished or self.first_s is None or self.first_s - self.arrival.at_s > slo["ttft"]:
            return False
        late = sum(gap > slo["itl"] for gap in self.gaps_s)
        return late <= 0.05 * len(self.gaps_s) and max(self.gaps_s, default=0.0) <= 20 * slo["itl"]


class Plant(World):
    """See the module docstring. `in_order`: the engine serves the higher class first, else as they came."""

    def __init__(
        self,
        *policies: str,
        acceptance: Callable[[Request, float], float] = lambda request, at_s: 0.8,
        seed: int = 1,
        in_order: bool = True,
        **config: int,
    ) -> None:
        tightest = {part: min(slo[part] for slo in SLO.values()) for part in ("ttft", "itl")}
        super().__init__(*policies, slo={**tightest, **SLO, "lowest": SLO["batch"]})  # type: ignore[arg-type]
        self._from_ns = self.clock.monotonic_ns()
        executor = LawExecutor(self.clock, lambda request: acceptance(request, self.now_s), seed)
        lengths = LengthPredictor(LONGEST)
        self.scheduler = Scheduler(BlockPool(BLOCKS), BLOCK, levels=len(CLASSES))
        self._in_order = in_order
        self.core = Core(
            self.scheduler, executor, Limits(LONGEST, BLOCKS * BLOCK), frozenset(), lengths, self.clock
        )
        engine = EngineConfig(
            **{"step_token_budget": 2048, "prefill_chunk_tokens": 2048, "speculative_tokens": 4, **config},
            classes=CLASSES,
        )
        described = build_manifest(
            engine,
            Plan(1 << 30, 1 << 20, BLOCK, 512, BLOCKS, 1 << 20),
            fields=provided_fields(self.core, executor, lengths),
            max_model_len=LONGEST,
            activation_bytes_per_token=8192,
            device="law",
        )
        if not in_order:
            described = replace(described, queue_order="arrival")
        whole = with_hook_fields(described)
        page = MemoryPage(bytearray(plan_page(whole, 64).page_bytes), "telemetry")
        writer = TelemetryWriter(page.buffer, whole, nonce=1, identity=IDENTITY, record_count=64)
        hook = StepHook(described, writer, lambda now_ns: memoryview(self.engine_controls))
        self.telemetry = Telemetry(self.core, executor, lengths, hook)
        self.executor = executor
        self.pages.engines.append(page)
        self.valve = MemoryValve(self)
        self.lives: dict[int, Life] = {}
        self.drafting: list[tuple[float, float]] = []
        """(time, draft tokens in force), at each step."""
        self._tickets: dict[int, int] = {}
        self._next_tick_ns = self._from_ns

    @property
    def now_s(self) -> float:
        return (self.clock.monotonic_ns() - self._from_ns) / NS

    def fly(self, arrivals: Sequence[Arrival], seconds: float, piloted: bool = True) -> list[Life]:
        """To `seconds`, and until what is there then has ended, but at most as long again."""
        coming = list(arrivals)[::-1]
        while self.now_s < seconds or (self.core.requests and self.now_s < 2 * seconds):
            while coming and coming[-1].at_s <= self.now_s:
                self._arrive(coming.pop())
            if piloted and self.clock.monotonic_ns() >= self._next_tick_ns:
                self.valve.look()
                self.pilot.tick()
                self.valve.look()
                late = (self.clock.monotonic_ns() - self._next_tick_ns) // TICK_NS
                self._next_tick_ns += (1 + late) * TICK_NS
            self._turn(coming)
        return list(self.lives.values())

    def _arrive(self, arrival: Arrival) -> None:
        number, now_ns = len(self.lives), self.clock.monotonic_ns()
        life = self.lives[number] = Life(arrival)
        level, body = CLASSES.index(arrival.klass), arrival.prompt_tokens * BYTES_PER_TOKEN
        decision = self.valve.law.admit(level, arrival.tenant, body, now_ns)
        if not decision.admitted:
            life.shed = True
            self.valve.writer.shed(level, arrival.tenant, body, decision.why)
            return
        self._tickets[number] = self.valve.writer.admitted(level, arrival.tenant, body, now_ns)
        sampling, at_ns = (
            SamplingParams(arrival.output_tokens, ignore_eos=True),
            self._from_ns + arrival.at_ns,
        )
        prompt, served = [1] * arrival.prompt_tokens, level if self._in_order else 0
        self.core.accept(Request(number, prompt, sampling, served, arrival.tenant, at_ns))

    def _turn(self, coming: list[Arrival]) -> None:
        """One step of the engine; or, without work, time until something is due."""
        knobs = self.telemetry.knobs(self.clock.monotonic_ns())
        if not self.core.requests:
            self.telemetry.record_idle(self.clock.monotonic_ns(), knobs)
            due_s = min((self._next_tick_ns - self._from_ns) / NS, coming[-1].at_s if coming else 1e9)
            self.clock.advance(max(0.001, due_s - self.now_s))
            return
        step = self.core.step(knobs)
        self.drafting.append((self.now_s, knobs.speculative_tokens))
        self.telemetry.record(step, knobs)
        for emission in step.emissions:
            life, now_s = self.lives[emission.request.id], (step.ended_ns - self._from_ns) / NS
            if emission.first:
                life.first_s = now_s
            count = len(emission.tokens)
            life.gaps_s += [emission.since_ns / NS / count] * (count - emission.first)
            self.valve.writer.last_byte_ns = step.ended_ns
            if emission.finish:
                life.finished = True
                self.valve.writer.ended(self._tickets.pop(emission.request.id))


def goodput(lives: Sequence[Life], r: float = 4.0, klass: str | None = None) -> float:
    """Work of good requests over all offered work."""
    some = [life for life in lives if klass in (None, life.arrival.klass)]
    return sum(life.arrival.work(r) for life in some if life.good) / sum(
        life.arrival.work(r) for life in some
    )
