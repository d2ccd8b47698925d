"""Do the pilot's forecasts come true? `python bench/forecast.py`.

The suite's workloads in virtual time, with a pilot that looks and keeps its hands off: one that acts on a
forecast keeps it from coming true. Scored by `kvpilot.forecast.scores`, from the 30th second of each run on:

- KV time to exhaustion. KV memory is exhausted where not every running request can have one more block; that
  is an event if it was not so for five seconds. An alarm begins when p10 is below five seconds and is over
  when it was above twenty for ten; every minute that one stands for nothing counts as another false one.
  `lead_time_s_p50` is over all events, 0 for those nobody warned of; beside it those that came out of half a
  minute of calm. `coverage_p10_p90` is over forecasts whose middle names a time, twice a second.
- Output lengths, as the engine predicts them when a request comes, by tenant, from what has finished until
  then: pinball loss at p10, p50 and p90 over that of a constant, the longest answer that anybody of the
  workload asks for: the least `max_tokens` that cuts nobody off. The ratio is the median over workloads.
- Late first tokens: precision and recall of `forecast.ttft_miss_ratio` >= 0.5 when a request comes.

`--quick` flies a few workloads.
"""

import argparse
import heapq
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from frame import Bar, run

from kvpilot.clock import NS
from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.scores import Outcome as Pair
from kvpilot.forecast.scores import Warnings, alarms, judge, pinball, warned
from kvpilot.inside.lengths import LengthPredictor
from kvpilot.policy.rules import PolicySet
from kvpilot.score import Slo
from kvpilot.simulate.foresight import LATE, Look, exhaustions
from kvpilot.simulate.replica import START_NS, Replica
from kvpilot.simulate.staging import leg, stage
from kvpilot.simulate.suite import Entry, Settings, load, shipped
from kvpilot.workload.outcome import Fate, Outcome

TRACES = Path(__file__).parents[2] / "shared/traces"
QUICK = ("reason-kv-0.8", "mixed-kv-1.0", "chat-1.2")
QUANTILES = (0.1, 0.5, 0.9)
LOOK_S, PAIR_LOOKS = 0.1, 5
WARM_S = 30.0
BELOW_S, OVER_S, HOLD_S, STANDING_S = 5.0, 20.0, 10.0, 60.0
CALM_S = 30.0
FAR_S = 60.0
"""What comes later than this does not come, where bands are judged."""


@dataclass(frozen=True)
class Flown:
    """One workload with one seed, scored."""

    name: str
    kv: Warnings
    calm_leads_s: Sequence[float]
    """Of the events that came out of calm."""
    pairs: Sequence[Pair]
    lengths: tuple[float, float]
    """Pinball loss of predictions, and of the constant."""
    late: tuple[int, int, int]
    """Requests that were said to be late, that were, and both."""


def fly(settings: Settings, traces: Path | None, entry: Entry, seed: int) -> Flown:
    staged = stage(settings, entry, seed, traces)
    scene = staged.scene
    replica = Replica(
        *(replace(scene.deployment, **leg(settings.pilot).settings), scene.plant(), scene.promises),
        *(PolicySet(()), scene.acceptance, scene.prompt, scene.faults),
        journalled=False,
    )
    looks: list[Look] = []

    def look() -> None:
        scheduler = replica.engine.core.scheduler
        if replica.cockpit is not None:
            board, running = replica.cockpit.pilot.board, len(scheduler.running)
            looks.append(Look.of(replica.now_s, board, scheduler.pool.available, running))
        replica.agenda.at(replica.clock.monotonic_ns() + round(LOOK_S * NS), look)

    # After the pilot's tick of the same moment.
    replica.agenda.at(START_NS + 1, look)
    outcomes = replica.fly(staged.arrivals, scene.drain_s)
    kv, calm = of_exhaustion(looks)
    return Flown(
        entry.name,
        kv,
        calm,
        pairs(looks),
        of_lengths(outcomes, scene.deployment.max_model_len),
        of_lateness(looks, outcomes, scene.promises.slos),
    )


def of_exhaustion(looks: Sequence[Look]) -> tuple[Warnings, list[float]]:
    """Alarms against events, and how long before those that came out of calm an alarm began."""
    happening = [look.at_s for look in looks if look.exhausted]
    said = [
        (look.at_s, Estimate(0.0, 0.0, 0.0) if look.exhausted else look.exhaustion)
        for look in looks
        if look.at_s >= WARM_S and (look.exhausted or look.exhaustion is not None)
    ]
    events = [at_s for at_s in exhaustions(looks) if at_s > WARM_S]
    spells = alarms([(at_s, each) for at_s, each in said if each is not None], BELOW_S, OVER_S, HOLD_S)
    end_s = looks[-1].at_s
    found = warned(spells, events, happening, end_s, STANDING_S)
    calm = []
    for event in events:
        place = bisect_left(happening, event)
        if event - (happening[place - 1] if place else 0.0) >= CALM_S:
            begins = [begin for begin, end in spells if begin < event <= end + 1.0]
            calm.append(event - begins[0] if begins else 0.0)
    return found, calm


def pairs(looks: Sequence[Look]) -> list[Pair]:
    happening = [look.at_s for look in looks if look.exhausted]
    found = []
    for look in looks[::PAIR_LOOKS]:
        said = look.exhaustion
        if look.at_s < WARM_S or look.exhausted or said is None or not isfinite(said.p50):
            continue
        place = bisect_left(happening, look.at_s)
        actual_s = happening[place] - look.at_s if place < len(happening) else inf
        found.append(Pair(said, actual_s if actual_s <= FAR_S else inf))
    return found


def of_lengths(outcomes: Sequence[Outcome], most: int) -> tuple[float, float]:
    """As the engine would predict each when it comes, with what has finished until then."""
    predictor = LengthPredictor(most)
    longest = max(one.arrival.output_tokens for one in outcomes)
    ending = [
        (one.ended_at_s, n, one.arrival.output_tokens, one.arrival.tenant)
        for n, one in enumerate(outcomes)
        if one.fate is Fate.FINISHED
    ]
    heapq.heapify(ending)
    predicted = constant = 0.0
    for one in sorted(outcomes, key=lambda each: each.arrival.at_s):
        arrival = one.arrival
        while ending and ending[0][0] <= arrival.at_s:
            _, _, tokens, tenant = heapq.heappop(ending)
            predictor.observe(tokens, tenant)
        if arrival.at_s < WARM_S:
            continue
        for q in QUANTILES:
            predicted += pinball(q, predictor.remaining(0, q, arrival.tenant), arrival.output_tokens)
            constant += pinball(q, longest, arrival.output_tokens)
    return predicted, constant


def of_lateness(
    looks: Sequence[Look], outcomes: Sequence[Outcome], slos: Mapping[str, Slo]
) -> tuple[int, int, int]:
    """Against what policies know as the promise: without what it grows by with the prompt."""
    times = [look.at_s for look in looks]
    said = late = both = 0
    for one in outcomes:
        arrival = one.arrival
        place = bisect_left(times, arrival.at_s) - 1
        ratio = looks[place].late.get(arrival.klass) if place >= 0 else None
        if ratio is None or one.fate is Fate.FAILED or arrival.at_s < WARM_S:
            continue
        ttft_s = one.ttft_s
        was = ttft_s is None or ttft_s > slos[arrival.klass].ttft_s
        said += ratio >= LATE
        late += was
        both += ratio >= LATE and was
    return said, late, both


def _fly(settings: Settings, traces: Path | None, order: tuple[Entry, int]) -> Flown:
    return fly(settings, traces, *order)


def measure(arguments: argparse.Namespace) -> tuple[Mapping[str, Any], Mapping[str, Any], list[Bar]]:
    settings = load(shipped())
    present, absent = settings.present(arguments.traces)
    only = arguments.only or (QUICK if arguments.quick else [entry.name for entry in present])
    entries = [entry for entry in present if entry.name in only]
    orders = [(entry, seed) for entry in entries for seed in range(1, (arguments.seeds or 1) + 1)]
    with ProcessPoolExecutor(arguments.workers or os.cpu_count(), get_context("spawn")) as pool:
        flown = list(pool.map(partial(_fly, settings, arguments.traces), orders))
    about = {"workloads": len(entries), "runs": len(flown), "absent": list(absent)}
    return about, *report(flown)


def report(flown: Sequence[Flown]) -> tuple[dict[str, Any], list[Bar]]:
    hours = sum(each.kv.hours for each in flown)
    events, unwarned = (
        sum(each.kv.events for each in flown),
        [0.0] * sum(each.kv.events - each.kv.warned for each in flown),
    )
    leads = [*unwarned, *(lead for each in flown for lead in each.kv.lead_s)]
    calm = sorted(lead for each in flown for lead in each.calm_leads_s)
    whole = judge([pair for each in flown for pair in each.pairs])
    lengths = {each.name: each.lengths[0] / each.lengths[1] for each in flown}
    said, late, both = (sum(column) for column in zip(*(each.late for each in flown), strict=True))
    table = {}
    for each in flown:
        verdict = judge(each.pairs)
        table[each.name] = {
            "events": each.kv.events,
            "warned": each.kv.warned,
            "false": each.kv.false_alarms,
            "forecasts": len(each.pairs),
            "covered": "-" if verdict is None else verdict.inside,
            "lengths": lengths[each.name],
            "said/were/both late": "/".join(map(str, each.late)),
        }
    results = {
        "hours": hours,
        "events": events,
        "unwarned": len(unwarned),
        "lead_time_s_p50_out_of_calm": median(calm) if calm else "-",
        "lead_times_s_out_of_calm": " ".join(f"{lead:.1f}" for lead in calm),
        "below_p10": whole.below if whole else "-",
        "above_p90": whole.above if whole else "-",
        "late_precision": both / said if said else "-",
        "late_recall": both / late if late else "-",
        **table,
    }
    bars = [
        Bar("lead_time_s_p50", median(leads) if leads else 0.0, at_least=5),
        Bar("false_alarms_per_h", sum(each.kv.false_alarms for each in flown) / hours, at_most=1),
        Bar("coverage_p10_p90", whole.inside if whole else 0.0, at_least=0.75, at_most=0.85),
        Bar(
            "pinball_vs_max_tokens",
            median(lengths.values()),
            at_most=0.5,
            spread=(min(lengths.values()), max(lengths.values())),
        ),
    ]
    return results, bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, default=TRACES, help="where the suite's own traces lie")
    parser.add_argument("--only", action="append", help="one workload of the suite; may be given again")
    parser.add_argument("--seeds", type=int, help="of each workload; one if left out")
    parser.add_argument("--workers", type=int, help="processes; one a core if left out")


if __name__ == "__main__":
    run("forecast", 1, measure, __doc__ or "", add_arguments)
