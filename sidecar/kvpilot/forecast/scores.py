"""How good were the forecasts? Outcomes beside what was said before them, in figures that can be compared.

Pure: for tests on plants whose truth is known, and for simulations. Nothing here is used in a tick.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isinf
from typing import NamedTuple

from kvpilot.forecast.estimate import Estimate

_QUANTILES = (0.1, 0.5, 0.9)
_INF = float("inf")


class Outcome(NamedTuple):
    """A forecast, and what came."""

    forecast: Estimate
    actual: float


class Verdict(NamedTuple):
    """Of many outcomes. A good band has `inside` near 0.8, and `below` and `above` near 0.1."""

    outcomes: int
    inside: float
    """Share within p10..p90."""
    below: float
    above: float
    over_middle: float
    """Share above p50."""
    pinball: float
    """Mean pinball loss over the three quantiles, in the forecast's unit; finite pairs alone."""


def pinball(q: float, forecast: float, actual: float) -> float:
    """The loss that is least on average for the true q-quantile."""
    miss = actual - forecast
    return q * miss if miss >= 0 else (q - 1) * miss


def judge(outcomes: Iterable[Outcome]) -> Verdict | None:
    """The verdict; None without outcomes. Infinite is above everything finite and equal to itself."""
    pairs = list(outcomes)
    if not pairs:
        return None
    below = sum(actual < forecast.p10 for forecast, actual in pairs)
    above = sum(actual > forecast.p90 for forecast, actual in pairs)
    losses = [
        pinball(q, said, actual)
        for forecast, actual in pairs
        for q, said in zip(_QUANTILES, forecast, strict=True)
        if not isinf(said) and not isinf(actual)
    ]
    n = len(pairs)
    return Verdict(
        n,
        (n - below - above) / n,
        below / n,
        above / n,
        sum(actual > forecast.p50 for forecast, actual in pairs) / n,
        sum(losses) / len(losses) if losses else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Warnings:
    """Of a forecast of the time to an event, taken as an alarm while it says less than a horizon."""

    events: int
    warned: int
    """Events with an alarm that lasted up to them."""
    lead_s: tuple[float, ...]
    """How long before each of those the alarm began, ascending."""
    alarms: int
    false_alarms: int
    """Alarms that ended without an event; one that the record's end cuts short is not counted."""
    hours: float

    @property
    def false_per_hour(self) -> float:
        return self.false_alarms / self.hours if self.hours > 0 else 0.0


def warnings(
    said: Sequence[tuple[float, float]], events: Sequence[float], horizon_s: float, grace_s: float = 1.0
) -> Warnings:
    """`said`: (time in s, forecast seconds to the next event), ascending; `events`: their times. An alarm
    that ended at most `grace_s` before an event was about it.
    """
    spells = _spells(said, horizon_s)
    leads, used = [], set()
    for event in events:
        about = [
            i for i, (start, end) in enumerate(spells) if start <= event <= end + grace_s and start < event
        ]
        if about:
            leads.append(event - spells[about[0]][0])
            used.update(about)
    last = said[-1][0] if said else 0.0
    untrue = sum(end < last for i, (_, end) in enumerate(spells) if i not in used)
    hours = (last - said[0][0]) / 3600 if said else 0.0
    return Warnings(len(events), len(leads), tuple(sorted(leads)), len(spells), untrue, hours)


def _spells(said: Sequence[tuple[float, float]], horizon_s: float) -> list[tuple[float, float]]:
    """Times in which the forecast was below the horizon: (first, last) of each."""
    spells: list[tuple[float, float]] = []
    inside = False
    for at_s, seconds in said:
        if seconds < horizon_s:
            spells[-1:] = [(spells[-1][0], at_s)] if inside else [*spells[-1:], (at_s, at_s)]
        inside = seconds < horizon_s
    return spells


def alarms(
    said: Sequence[tuple[float, Estimate]], below_s: float, over_s: float, hold_s: float
) -> list[tuple[float, float]]:
    """(begin, end) of each alarm of a forecast of the time to an event, `said` at ascending times: it begins
    when p10 is less than `below_s`, and is over when that was more than `over_s` for `hold_s`.
    """
    found: list[tuple[float, float]] = []
    begin: float | None = None
    calm: float | None = None
    for at_s, forecast in said:
        if begin is None:
            if forecast.p10 < below_s:
                begin, calm = at_s, None
        elif forecast.p10 <= over_s:
            calm = None
        else:
            calm = at_s if calm is None else calm
            if at_s - calm >= hold_s:
                found.append((begin, calm))
                begin = None
    return found if begin is None else [*found, (begin, said[-1][0])]


def warned(
    spells: Sequence[tuple[float, float]],
    events: Sequence[float],
    happening: Sequence[float],
    seconds: float,
    standing_s: float,
    grace_s: float = 1.0,
) -> Warnings:
    """Of alarms, `events`, and all times at which what they warn of was so, each ascending, in a run of so
    many seconds. An alarm is false if it ends without that, and each `standing_s` of it without that is one
    more: who always warns, warns of nothing. One that the end cuts short before is not counted.
    """
    leads, false = [], 0
    for event in events:
        about = [begin for begin, end in spells if begin < event <= end + grace_s]
        if about:
            leads.append(event - about[0])
    for begin, end in spells:
        marks = [begin, *(at_s for at_s in happening if begin < at_s <= end + grace_s), end]
        false += sum(int((after - before) // standing_s) for before, after in pairwise(marks))
        false += len(marks) == 2 and end < seconds and end - begin < standing_s
    return Warnings(len(events), len(leads), tuple(sorted(leads)), len(spells), false, seconds / 3600)
