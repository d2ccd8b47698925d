"""How steady a hand was: reversals of knobs, and how long goodput took to come back after a burst."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from kvpilot.adapters.actuator import Target
from kvpilot.clock import NS
from kvpilot.knobs import KNOBS
from kvpilot.score import Slo, is_good
from kvpilot.workload.outcome import Outcome

REVERSAL_SHARE = 0.2
REVERSAL_NS = 10 * NS
WINDOW_S = 10.0
RECOVERED = 0.95

Range = tuple[float, float, float]
"""Least, most, and baseline: the value where no lease is held."""


def reversals(leases: Sequence[tuple[int, Mapping[Target, float]]], ranges: Mapping[str, Range]) -> int:
    """Changes of at least a fifth of a knob's range, opposite to the previous such change of that knob and
    within 10 s of it. `leases` as in `Flown`; `ranges` by knob. A knob that the engine does not list has its
    catalogue's range.
    """
    return sum(_reversed(moves) for moves in _moves(leases, ranges).values())


def _moves(
    leases: Sequence[tuple[int, Mapping[Target, float]]], ranges: Mapping[str, Range]
) -> dict[Target, list[tuple[int, float]]]:
    """(time, change in shares of the range) of each target, large changes alone."""
    moves: dict[Target, list[tuple[int, float]]] = {}
    before: Mapping[Target, float] = {}
    for at_ns, held in leases:
        for target in before.keys() | held.keys():
            least, most, baseline = ranges.get(target[0]) or plausible_range(target[0])
            change = (held.get(target, baseline) - before.get(target, baseline)) / ((most - least) or 1.0)
            if abs(change) >= REVERSAL_SHARE:
                moves.setdefault(target, []).append((at_ns, change))
        before = held
    return moves


def plausible_range(knob: str) -> Range:
    """Of a knob of the valve: at rest it lets everybody in."""
    least, most = KNOBS[knob].plausible
    return least, most, least if KNOBS[knob].protective == "higher" else most


def _reversed(moves: Sequence[tuple[int, float]]) -> int:
    return sum(
        one * other < 0 and at_ns - since_ns <= REVERSAL_NS
        for (since_ns, one), (at_ns, other) in pairwise(moves)
    )


def recovery_s(
    outcomes: Iterable[Outcome],
    slos: Mapping[str, Slo],
    r: float,
    before: tuple[float, float],
    end_s: float,
) -> float | None:
    """Seconds from the end of a burst, `end_s`, to the end of the first 10 s window whose arrivals have 95 %
    of the goodput that those of `before` had; windows begin every second. None where there is no such one.
    """
    rows = sorted((o.arrival.at_s, o.arrival.work(r), is_good(o, slos[o.arrival.klass])) for o in outcomes)
    usual = _goodput(rows, *before)
    if usual is None:
        return None
    last_s = rows[-1][0] if rows else 0.0
    begin_s = end_s
    while begin_s + WINDOW_S <= last_s:
        now = _goodput(rows, begin_s, begin_s + WINDOW_S)
        if now is not None and now >= RECOVERED * usual:
            return begin_s + WINDOW_S - end_s
        begin_s += 1.0
    return None


def _goodput(rows: Sequence[tuple[float, float, bool]], begin_s: float, end_s: float) -> float | None:
    within = [(work, good) for at_s, work, good in rows if begin_s <= at_s < end_s]
    work = sum(work for work, _ in within)
    return sum(work for work, good in within if good) / work if work else None
