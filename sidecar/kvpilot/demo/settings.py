"""What the demo compares: scenarios, the static settings, and the legs they make."""

from dataclasses import dataclass, field
from typing import Literal

ScenarioName = Literal["burst", "oversubscribed"]

STATIC_SETTINGS: dict[str, dict[str, float]] = {
    "chunk 256": {"prefill_chunk_tokens": 256},
    "no drafts": {"speculative_tokens": 0},
    "chunk 256, no drafts": {"prefill_chunk_tokens": 256, "speculative_tokens": 0},
    "chunk 256, no drafts, 12 running": {
        "prefill_chunk_tokens": 256,
        "speculative_tokens": 0,
        "max_running": 12,
    },
}
"""What a careful operator might have set by hand. Held as constant leases: every leg flies one engine."""


@dataclass(frozen=True)
class Scenario:
    """How the engine is configured and driven. `load` is offered work over measured capacity."""

    name: ScenarioName
    summary: str
    load: float
    engine_arguments: tuple[str, ...] = ()


SCENARIOS: dict[str, Scenario] = {
    "burst": Scenario(
        "burst",
        "a bursty two-class load on the engine's own memory plan",
        load=1.1,
        engine_arguments=("--memory", "96MiB"),
    ),
    "oversubscribed": Scenario(
        "oversubscribed",
        "an operator's mistake: KV memory leaves no room for the worst step, and a neighbour moves in",
        load=0.8,
        engine_arguments=("--memory", "64MiB", "--kv-fraction", "0.85", "--external-memory", "2MiB@1s"),
    ),
}


@dataclass(frozen=True)
class Leg:
    """One pass of the same workload over the same engine."""

    name: str
    kind: Literal["off", "static", "on"]
    knobs: dict[str, float] = field(default_factory=dict)


LEGS: tuple[Leg, ...] = (
    Leg("engine defaults", "off"),
    *(Leg(name, "static", knobs) for name, knobs in STATIC_SETTINGS.items()),
    Leg("pilot", "on"),
)
