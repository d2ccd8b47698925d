"""Admission by the predicted peak of KV demand, against the plain watermark on what is held now.

A backlog larger than the pool, served by the engine's own scheduler in virtual time, over a roofline; nobody
knows where outputs end. Figures are taken once 300 requests have finished, until the backlog is admitted.
`throughput_<workload>` is output tokens a second over the better of plain watermarks of 1 and 0.95, whichever
that is for the workload; `preemptions_<workload>` is preemptions over those at the same watermark, 1.
Results have every law tried, with the share of requests that stood still for more than a second.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from frame import Bar, run
from virtual_engine import Asked, Lengths, VirtualEngine

from kvengine.core import Step
from kvengine.sched.peak import PESSIMISM
from kvengine.sched.scheduler import Knobs
from kvpilot.clock import NS

WARM_FINISHES = 300
STILL_S = 1.0
QUANTILES = {"p50": 0.0, "p80": 0.8416212335729143, "p90": PESSIMISM, "p95": 1.6448536269514722}


@dataclass(frozen=True)
class Workload:
    """What comes: how much memory there is for it, and what its clients allow."""

    blocks: int
    prompt: Lengths
    output: Callable[[random.Random], int]
    max_tokens: int
    requests: int


def _bimodal(rng: random.Random) -> int:
    """Most are short, and nothing says which are not."""
    return rng.randint(20, 100) if rng.random() < 0.8 else rng.randint(1_200, 2_500)


WORKLOADS = {
    "conversation": Workload(
        3_125, Lengths(1_000, 0.8, 16, 4_000), Lengths(220, 0.8, 8, 1_024).draw, 1_024, 1_500
    ),
    "short_chat": Workload(1_500, Lengths(180, 0.6, 16, 1_000), Lengths(70, 0.7, 4, 400).draw, 1_024, 2_000),
    "reasoning": Workload(
        6_250, Lengths(200, 0.6, 16, 1_000), Lengths(1_500, 0.8, 16, 8_000).draw, 8_000, 1_000
    ),
    "bimodal": Workload(3_125, Lengths(300, 0.6, 16, 2_000), _bimodal, 4_000, 1_200),
}


def served(load: Workload, watermark: float, z: float | None, requests: int) -> dict[str, float]:
    """One law on one workload; `z` None is the plain watermark."""
    rng = random.Random(1)
    asked = [Asked(0.0, load.prompt.draw(rng), load.output(rng), load.max_tokens) for _ in range(requests)]
    engine = VirtualEngine(load.blocks, 16, 16_384, looks_ahead=z is not None, pessimism=z)
    totals, scheduler = engine.core.totals, engine.scheduler
    warm: tuple[float, int, int] | None = None

    def watch(step: Step) -> None:
        nonlocal warm
        if warm is None and totals.finished >= WARM_FINISHES:
            warm = step.ended_ns / NS, totals.decode_tokens, scheduler.preemptions_total

    knobs = Knobs(2_048, 512, 0, 256, watermark)
    seen = engine.run(asked, knobs, watch, until=lambda engine: totals.steps > 9 and not scheduler.waiting)
    assert warm is not None
    still = sum(gap_s > STILL_S for gap_s in seen.worst_gaps_s) / len(seen.worst_gaps_s)
    return {
        "tokens_per_s": (totals.decode_tokens - warm[1]) / (seen.seconds - warm[0]),
        "preemptions": scheduler.preemptions_total - warm[2],
        "stood_still": still,
    }


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    bars, results = [], {}
    laws: dict[str, tuple[float, float | None]] = {"plain_1": (1.0, None), "plain_0.95": (0.95, None)}
    quantiles = ("p90",) if arguments.quick else tuple(QUANTILES)
    laws |= {name: (1.0, QUANTILES[name]) for name in quantiles}
    for name, load in WORKLOADS.items():
        requests = load.requests // 2 if arguments.quick else load.requests
        seen = {law: served(load, *how, requests) for law, how in laws.items()}
        results |= {f"{name}_{law}": figures for law, figures in seen.items()}
        best = max(seen[law]["tokens_per_s"] for law in ("plain_1", "plain_0.95"))
        bars.append(Bar(f"throughput_{name}", seen["p90"]["tokens_per_s"] / best, at_least=0.98))
        before = seen["plain_1"]["preemptions"]
        bars.append(Bar(f"preemptions_{name}", seen["p90"]["preemptions"] / before, at_most=0.6))
    return {"warm_finishes": WARM_FINISHES, "quantile": "p90"}, results, bars


if __name__ == "__main__":
    run("admission", 1, measure, __doc__ or "")
