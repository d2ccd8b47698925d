"""Incidents that happened to somebody, by name: a workload, an engine, what goes wrong, and what must hold.

Figures in `happened` are the reporters'. Every scenario is a plain value; whoever flies it applies the faults
and measures the bounds. Loads are relative to the machine of the settings, and so are promises, as in the
suite; sizes are tokens.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvpilot.simulate.faults import Fault
from kvpilot.simulate.plants.acceptance import Acceptance, ByDomain, Deepening
from kvpilot.workload.spec import Part, Spell, Workload

Against = Literal["nothing", "defaults", "best_static", "unharmed"]
"""What a bound is a ratio to: itself, other legs of the scenario, or the pilot's leg without the faults."""
Balancer = Literal["round_robin", "least_kv", "prefix_affine", "by_tenant"]
METRICS = (
    *("goodput_work", "tokens_per_s", "oom", "failed", "preemptions", "kv_occupancy_max", "ttft_p95_s"),
    *("recovery_s", "reversals_per_min", "worst_tenant", "worst_rank", "worst_actions_during_fault"),
)
"""The first line is of `kvpilot.score.Score`. recovery_s: from the end of the burst until a 10 s window has
95 % of the goodput before it. worst_tenant, worst_rank: goodput of the tenant or rank that fares worst, the
one that caused it left out. worst_actions_during_fault: protective actions taken on a signal that was lost.
"""


@dataclass(frozen=True, slots=True)
class Bound:
    """What must hold of the pilot's leg; `against`: of its ratio to another leg's."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    against: Against = "nothing"


@dataclass(frozen=True, slots=True)
class Scenario:
    """See the module docstring. `engine` holds fields of `Deployment` that differ from the pilot's setting in
    the suite; `kv_tokens` is the pool's size, the device's own if None.
    """

    name: str
    happened: str
    source: str
    workload: Workload
    holds: tuple[Bound, ...]
    engine: Mapping[str, Any] = field(default_factory=dict)
    kv_tokens: int | None = None
    faults: tuple[Fault, ...] = ()
    acceptance: Acceptance | None = None
    ranks: int = 1
    balancer: Balancer = "round_robin"
    answer_s: float | None = None
    """How long clients of every class wait for a whole answer; None: as in the suite."""
    culprit: str | None = None
    """The tenant that causes it, whom `worst_tenant` leaves out."""

    @property
    def burst(self) -> tuple[float, float] | None:
        """(start, end) in seconds of the run of the part with the most load, where calm precedes and follows
        it; None where there is no such one.
        """
        parts = self.workload.parts
        if len(parts) < 3:
            return None
        place = max(range(len(parts)), key=lambda index: parts[index].load)
        start_s = sum(part.seconds for part in parts[:place])
        inside = 0 < place < len(parts) - 1
        return (start_s, start_s + parts[place].seconds) if inside else None


def _of(name: str, *parts: Part) -> Workload:
    return Workload(name=name, parts=parts)


def _calm(seconds: float, load: float = 0.7, mix: str = "chat") -> Part:
    return Part(seconds=seconds, load=load, mix=mix)


_NO_OOM = Bound("oom", at_most=0)
_NO_FLAPPING = Bound("reversals_per_min", at_most=2)
_AS_GOOD_AS_STATIC = Bound("goodput_work", at_least=0.97, against="best_static")

_ALL = (
    Scenario(
        "metastable-burst",
        "one 10-minute burst of twice the load, and the engine never came back: occupancy 28 to about 1,000 "
        "requests, 24 % of first tokens later than 300 s",
        "llm-d-router 2295",
        _of("metastable-burst", _calm(300), _calm(600, load=1.4), _calm(300)),
        (Bound("recovery_s", at_most=60), _AS_GOOD_AS_STATIC, _NO_OOM, _NO_FLAPPING),
    ),
    Scenario(
        "kv-oversubscription",
        "optimistic admission over a pool that the outputs do not fit: 161 to 96 tokens/s, time per token "
        "p99 122 to 1,111 ms",
        "TensorRT-LLM 16827",
        _of("kv-oversubscription", _calm(150, load=1.1, mix="reason")),
        (
            Bound("tokens_per_s", at_least=1.0, against="defaults"),
            Bound("preemptions", at_most=0.2, against="defaults"),
            _AS_GOOD_AS_STATIC,
            _NO_OOM,
        ),
        engine={"admission_watermark": 1.0, "max_running": 1024},
        kv_tokens=80_000,
        answer_s=600.0,
    ),
    Scenario(
        "sticky-retraction",
        "one wave of long answers, sequences taken back, and an estimate that stayed pessimistic: 429 to "
        "20-38 tokens/s, no recovery",
        "SGLang 26248",
        _of("sticky-retraction", _calm(40), _calm(30, load=1.6, mix="reason"), _calm(80)),
        (Bound("recovery_s", at_most=60), _AS_GOOD_AS_STATIC, _NO_OOM),
        kv_tokens=90_000,
        answer_s=300.0,
    ),
    Scenario(
        "speculation-edge",
        "speculation toggled by batch size alone: 232 to 24-157 tokens/s at the table's edge",
        "vLLM 49548",
        _of(
            "speculation-edge",
            Part(
                seconds=150,
                load=0.6,
                mix="chat",
                bursts=(Spell(start=0.2, length=0.1, factor=2), Spell(start=0.5, length=0.1, factor=2)),
            ),
        ),
        (
            Bound("tokens_per_s", at_least=0.97, against="best_static"),
            _AS_GOOD_AS_STATIC,
            _NO_FLAPPING,
        ),
        acceptance=Deepening(ByDomain({"json": 0.9, "python": 0.75, "prose": 0.3}, otherwise=0.5), 0.95),
    ),
    Scenario(
        "lost-metric",
        "a metric that was lost was read as zero, and load was sent to whoever was full",
        "Dynamo 14765",
        _of("lost-metric", _calm(150, load=0.9)),
        (
            Bound("goodput_work", at_least=0.97, against="unharmed"),
            Bound("worst_actions_during_fault", at_most=0),
            _NO_OOM,
        ),
        faults=(
            Fault("signal_missing", 50, 40, signals=("kv_blocks_free", "kv_blocks_cached")),
            Fault("signal_missing", 110, 20, signals=("running", "waiting", "waiting_prompt_tokens")),
        ),
    ),
    Scenario(
        "stale-metric",
        "a metric that had stopped moving was read as saturated, and everything was turned away",
        "llm-d 2408",
        _of("stale-metric", _calm(40), _calm(20, load=1.6), _calm(90, load=0.6)),
        (
            Bound("goodput_work", at_least=0.95, against="unharmed"),
            Bound("recovery_s", at_most=60),
            _NO_OOM,
        ),
        faults=(Fault("telemetry_frozen", 50, 60),),
    ),
    Scenario(
        "tenant-hog",
        "one client sends 16-52 % of the volume and holds most of the cache",
        "ServeGen, arXiv 2505.09999",
        _of("tenant-hog", _calm(50, load=0.7), _calm(100, load=1.3, mix="hog")),
        (
            Bound("worst_tenant", at_least=1.0, against="best_static"),
            _AS_GOOD_AS_STATIC,
            _NO_OOM,
        ),
        kv_tokens=150_000,
        culprit="hog",
    ),
    Scenario(
        "rank-imbalance",
        "one rank at 100 % of its KV memory while others idle",
        "vLLM 36748",
        _of("rank-imbalance", _calm(150, load=0.8, mix="hog")),
        (
            Bound("worst_rank", at_least=1.0, against="defaults"),
            Bound("goodput_work", at_least=1.0, against="defaults"),
            _NO_OOM,
        ),
        kv_tokens=60_000,
        ranks=4,
        balancer="by_tenant",
    ),
    Scenario(
        "allocator-fragmentation",
        "out of memory with memory free: an activation spike in a long prefill finds no piece that is large "
        "enough",
        "vLLM and PyTorch reports of reserved but unallocated memory",
        _of("allocator-fragmentation", _calm(40), _calm(80, load=0.8, mix="document"), _calm(30)),
        (_NO_OOM, Bound("failed", at_most=0), Bound("goodput_work", at_least=1.0, against="defaults")),
        faults=(Fault("score_memory", 0, 150, value=24.0), Fault("fragmentation", 40, 80, value=0.3)),
    ),
)

SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for scenario in _ALL}


class ScenarioError(ValueError):
    """No such scenario; one line with the nearest name."""


def scenario_named(name: str) -> Scenario:
    """Raises ScenarioError."""
    found = SCENARIOS.get(name)
    if found is None:
        near = difflib.get_close_matches(name, SCENARIOS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ScenarioError(f"--scenario {name}: {hint}known are {', '.join(SCENARIOS)}")
    return found
