"""What a pilot foretold in a run, beside what came: exhausted KV memory, and first tokens that were late.

Exhaustion is scored by `kvpilot.forecast.scores`, with the alarms of `bench/forecast.py`. A pilot that acts
on a forecast keeps it from coming true, so the fair flight for it is one in which it keeps its hands off.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from statistics import median

from kvpilot.adapters.windows import Reading
from kvpilot.clock import NS
from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.scores import Outcome as Pair
from kvpilot.forecast.scores import alarms, judge, warned
from kvpilot.journal.records import DecisionRecord, Record, RuleRecord
from kvpilot.knobs import KNOBS
from kvpilot.publish.board import Board
from kvpilot.score import Slo
from kvpilot.simulate.faults import Fault
from kvpilot.workload.outcome import Fate, Outcome

WARM_S = 15.0
"""A pilot learns so long before its forecasts are judged."""
BELOW_S, OVER_S, HOLD_S, STANDING_S = 5.0, 20.0, 10.0, 60.0
"""An alarm begins when p10 is below the first and is over when it was above the second for the third; each of
the fourth that one stands for nothing is one more false alarm."""
FAR_S = 60.0
"""What comes later than this does not come, where bands are judged."""
CALM_S = 5.0
"""Exhaustion within this of the one before is the same event."""
LATE = 0.5
"""Probability of a late first token from which on it is foretold."""
IN_FORCE = ("unconfirmed", "clamped")
"""Verdicts, as they are journalled, of decisions that put something into a controls page."""
NOW = Estimate(0.0, 0.0, 0.0)
LOSING = ("signal_missing", "telemetry_frozen")


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a pilot. `late`: probability of a late first token, by class, where it is told."""

    at_s: float
    exhaustion: Estimate | None
    exhausted: bool
    late: Mapping[str, float]

    @staticmethod
    def of(at_s: float, board: Board, available_blocks: int, running: int) -> "Look":
        """KV memory is exhausted where not every running request could have one more block."""
        late = {
            klass: reading.value
            for (name, klass), reading in board.latest.items()
            if name == "forecast.ttft_miss_ratio" and klass is not None and isinstance(reading, Reading)
            if isinstance(reading.value, float | int)
        }
        bands = board.tick.bands if board.tick is not None else {}
        soon = bands.get(("forecast.kv_exhaustion_seconds", None))
        return Look(at_s, soon, running > 0 and available_blocks < running, late)


@dataclass(frozen=True, slots=True)
class Foresight:
    """Scores. None where there was nothing to score."""

    events: int
    """Times at which KV memory ran out."""
    warned: int
    lead_s: float | None
    """Median of those warned of."""
    false_alarms_per_h: float | None
    coverage: float | None
    """Share of outcomes within p10..p90; 0.8 is right."""
    late_precision: float | None = None
    late_recall: float | None = None


def judged(looks: Sequence[Look], outcomes: Sequence[Outcome], slos: Mapping[str, Slo]) -> Foresight:
    """Looks ascend in time; there is at least one."""
    happening = [look.at_s for look in looks if look.exhausted]
    said = [
        (look.at_s, NOW if look.exhausted else look.exhaustion)
        for look in looks
        if look.at_s >= WARM_S and (look.exhausted or look.exhaustion is not None)
    ]
    spells = alarms([(at_s, each) for at_s, each in said if each is not None], BELOW_S, OVER_S, HOLD_S)
    events = [at_s for at_s in exhaustions(looks) if at_s > WARM_S]
    found = warned(spells, events, happening, looks[-1].at_s, STANDING_S)
    verdict = judge(_pairs(looks, happening))
    precision, recall = lateness(looks, outcomes, slos)
    return Foresight(
        found.events,
        found.warned,
        median(found.lead_s) if found.lead_s else None,
        found.false_per_hour if said else None,
        None if verdict is None else verdict.inside,
        precision,
        recall,
    )


def exhaustions(looks: Sequence[Look]) -> list[float]:
    """When KV memory ran out: the first look of each spell, spells apart by `CALM_S` at least."""
    found: list[float] = []
    last_s = -inf
    for look in looks:
        if look.exhausted:
            if look.at_s - last_s >= CALM_S:
                found.append(look.at_s)
            last_s = look.at_s
    return found


def _pairs(looks: Sequence[Look], happening: Sequence[float]) -> list[Pair]:
    """Forecasts whose middle names a time, and how long it was until KV memory was next exhausted."""
    pairs = []
    for look in looks:
        said = look.exhaustion
        if look.at_s < WARM_S or look.exhausted or said is None or not isfinite(said.p50):
            continue
        place = bisect_left(happening, look.at_s)
        actual_s = happening[place] - look.at_s if place < len(happening) else inf
        pairs.append(Pair(said, actual_s if actual_s <= FAR_S else inf))
    return pairs


def lateness(
    looks: Sequence[Look], outcomes: Sequence[Outcome], slos: Mapping[str, Slo]
) -> tuple[float | None, float | None]:
    """(precision, recall) of foretelling that a request, let in, gets its first token late or never; against
    what policies know as the promise, without what it grows by with the prompt.
    """
    times = [look.at_s for look in looks]
    said = late = both = 0
    for one in outcomes:
        klass, place = one.arrival.klass, bisect_left(times, one.arrival.at_s) - 1
        early = one.arrival.at_s < WARM_S
        ratio = looks[place].late.get(klass) if place >= 0 else None
        if ratio is None or early or one.fate in (Fate.SHED, Fate.FAILED):
            continue
        ttft_s = one.ttft_s
        came_late = ttft_s is None or ttft_s > slos[klass].ttft_s
        said += ratio >= LATE
        late += came_late
        both += ratio >= LATE and came_late
    return both / said if said else None, both / late if late else None


def protective_on_lost(journal: Sequence[Record], faults: Sequence[Fault]) -> int:
    """Decisions in force, taken while a fault hid signals, that were protective and whose rule asks for an
    input that was missing then.
    """
    hiding = [fault for fault in faults if fault.kind in LOSING]
    start_ns = _start_ns(journal)
    asked = {row.key: set(row.described.get("inputs", ())) for row in journal if isinstance(row, RuleRecord)}
    return sum(
        row.verdict in IN_FORCE
        and any(fault.active((row.at_wall_ns - start_ns) / NS) for fault in hiding)
        and bool(asked.get(row.text or "", set()) & _missing(row))
        and _protective(row)
        for row in journal
        if isinstance(row, DecisionRecord)
    )


def _start_ns(journal: Sequence[Record]) -> int:
    """A pilot journals its rules before its first tick, when the run begins."""
    return next((row.at_wall_ns for row in journal if isinstance(row, RuleRecord)), 0)


def _missing(row: DecisionRecord) -> set[str]:
    return {name for name, value in row.inputs.items() if isinstance(value, str)}


def _protective(row: DecisionRecord) -> bool:
    """Whether it moved its knob to the safe side; a release, or a renewal of the same value, did not."""
    if row.after is None or row.before is None or row.knob not in KNOBS:
        return False
    change = row.after - row.before
    return change > 0 if KNOBS[row.knob].protective == "higher" else change < 0
