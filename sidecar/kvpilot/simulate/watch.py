"""What there is to see of one leg, as plain values: memory, queue, knobs and fates over time, latencies
against their promises, forecasts beside what came. For reports; a look changes nothing in the run.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import TYPE_CHECKING

from kvpilot.adapters.actuator import Target
from kvpilot.clock import NS
from kvpilot.journal.records import DecisionRecord, Record
from kvpilot.score import Slo, is_good
from kvpilot.simulate.deployment import Promises
from kvpilot.simulate.foresight import IN_FORCE, Foresight, Look, judged, protective_on_lost
from kvpilot.simulate.replica import START_NS, Replica
from kvpilot.simulate.stability import Range, plausible_range, recovery_s
from kvpilot.workload.outcome import Fate, Outcome

if TYPE_CHECKING:
    from kvpilot.simulate.legs import Result, Scene

LOOK_S = 0.5
BINS = 50
"""Of fates over time, at most."""
LEAST_BIN_S = 2.0
MULTIPLES = tuple(10 ** (exponent / 20) for exponent in range(-40, 21))
"""Of a promise: 0.01 to 10, where latencies are looked at; 1 is among them."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The engine at one time: share of KV blocks held, requests that run, requests that wait."""

    at_s: float
    kv: float
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Bin:
    """Arrivals of a stretch of time that begins at `at_s`. `goodput` None: nobody came."""

    at_s: float
    offered: int
    shed: int
    goodput: float | None


@dataclass(frozen=True, slots=True)
class Kept:
    """Of one class: the share of all arrivals that were served within each of `MULTIPLES` of a promise."""

    ttft: tuple[float, ...]
    itl: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """One knob and scope: its range, and (second, value) at each change, the baseline first."""

    knob: str
    scope: str
    bounds: Range
    values: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """See the module docstring. `lost`: protective decisions on an input that a fault had taken away."""

    moments: tuple[Moment, ...]
    bin_s: float
    bins: tuple[Bin, ...]
    classes: Mapping[str, Kept]
    moved: tuple[Moved, ...]
    recovery_s: float | None
    """From the end of the burst; infinite where goodput never came back, None where there was no burst."""
    foresight: Foresight | None
    lost: int
    rules: Mapping[str, int] = field(default_factory=dict)
    """Decisions in force, by policy/rule."""


class Watch:
    """Looks at one replica while it flies: `begin`, and in the end `seen`. `burst`: its start and end, in
    seconds of the run.
    """

    def __init__(self, burst: tuple[float, float] | None = None) -> None:
        self._burst = burst
        self._moments: list[Moment] = []
        self._looks: list[Look] = []

    def begin(self, replica: Replica) -> None:
        replica.agenda.at(START_NS + 1, lambda: self._look(replica))

    def _look(self, replica: Replica) -> None:
        scheduler = replica.engine.core.scheduler
        pool = scheduler.pool
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        self._moments.append(
            Moment(replica.now_s, pool.referenced / replica.deployment.blocks, running, waiting)
        )
        cockpit = replica.cockpit
        if cockpit is not None and cockpit.pilot.board.tick is not None:
            self._looks.append(Look.of(replica.now_s, cockpit.pilot.board, pool.available, running))
        replica.agenda.at(replica.clock.monotonic_ns() + round(LOOK_S * NS), lambda: self._look(replica))

    def seen(self, result: "Result", scene: "Scene", window_s: float) -> Seen:
        promises = scene.promises
        outcomes = sorted(
            (one for one in result.outcomes if one.arrival.at_s < window_s), key=lambda one: one.arrival.at_s
        )
        goods = [is_good(one, promises.slos[one.arrival.klass]) for one in outcomes]
        works = [one.arrival.work(promises.r) for one in outcomes]
        bin_s = max(LEAST_BIN_S, window_s / BINS)
        flown = result.flown
        return Seen(
            tuple(self._moments),
            bin_s,
            _bins(outcomes, goods, works, bin_s, window_s),
            {name: _kept(outcomes, name, slo) for name, slo in promises.slos.items()},
            () if flown is None else moved(flown.leases, result.ranges, scene.deployment.classes),
            self._recovery_s(outcomes, promises),
            judged(self._looks, outcomes, promises.slos) if self._looks else None,
            protective_on_lost(flown.journal, scene.faults) if flown is not None else 0,
            {} if flown is None else dict(Counter(_rules(flown.journal)).most_common()),
        )

    def _recovery_s(self, outcomes: Sequence[Outcome], promises: Promises) -> float | None:
        if self._burst is None:
            return None
        start_s, end_s = self._burst
        found = recovery_s(outcomes, promises.slos, promises.r, (0.0, start_s), end_s)
        return inf if found is None else found


def _rules(journal: Sequence[Record]) -> Iterator[str]:
    for row in journal:
        if isinstance(row, DecisionRecord) and row.verdict in IN_FORCE:
            yield f"{row.policy}/{row.rule}"


def _bins(
    outcomes: Sequence[Outcome],
    goods: Sequence[bool],
    works: Sequence[float],
    bin_s: float,
    window_s: float,
) -> tuple[Bin, ...]:
    count = max(1, -(-round(window_s * 1000) // round(bin_s * 1000)))
    offered, shed, work, good_work = [0] * count, [0] * count, [0.0] * count, [0.0] * count
    for one, good, size in zip(outcomes, goods, works, strict=True):
        place = min(count - 1, int(one.arrival.at_s / bin_s))
        offered[place] += 1
        shed[place] += one.fate is Fate.SHED
        work[place] += size
        good_work[place] += size if good else 0.0
    return tuple(
        Bin(
            place * bin_s,
            offered[place],
            shed[place],
            good_work[place] / work[place] if work[place] else None,
        )
        for place in range(count)
    )


def _kept(outcomes: Sequence[Outcome], klass: str, slo: Slo) -> Kept:
    """Whoever got no token, or not all of them, is above every multiple."""
    mine = [one for one in outcomes if one.arrival.klass == klass]
    ttfts = sorted(
        ttft_s / slo.ttft_limit_s(one.arrival.prompt_tokens)
        for one in mine
        if (ttft_s := one.ttft_s) is not None
    )
    itls = sorted(_mean_gap_s(one) / slo.itl_s for one in mine if one.fate is Fate.FINISHED)
    count = max(1, len(mine))
    return Kept(
        tuple(bisect_right(ttfts, at) / count for at in MULTIPLES),
        tuple(bisect_right(itls, at) / count for at in MULTIPLES),
    )


def _mean_gap_s(outcome: Outcome) -> float:
    gaps = outcome.gaps()
    tokens = sum(count for _, count in gaps)
    return sum(ns for ns, _ in gaps) / tokens / NS if tokens else 0.0


def moved(
    leases: Sequence[tuple[int, Mapping[Target, float]]],
    ranges: Mapping[str, Range],
    classes: Sequence[str],
) -> tuple[Moved, ...]:
    """Every knob and scope that a lease was held of, those that changed most often first."""
    found = []
    for target in {target for _, held in leases for target in held}:
        bounds = ranges.get(target[0]) or plausible_range(target[0])
        values = [(0.0, bounds[2])]
        for at_ns, held in leases:
            value = held.get(target, bounds[2])
            if value != values[-1][1]:
                values.append(((at_ns - START_NS) / NS, value))
        if all(isfinite(value) for _, value in values):
            found.append(Moved(target[0], _scope(target, classes), bounds, tuple(values)))
    return tuple(sorted(found, key=lambda each: (-len(each.values), each.knob, each.scope)))


def _scope(target: Target, classes: Sequence[str]) -> str:
    """For people: `interactive`, `batch and below`, `tenant acme`; nothing where it is everybody."""
    kind, argument = target[1]
    if kind == "class_at_most" and isinstance(argument, int) and argument < len(classes):
        return f"{classes[argument]} and below" if argument else classes[0]
    return f"tenant {argument}" if kind == "tenant" else ""
