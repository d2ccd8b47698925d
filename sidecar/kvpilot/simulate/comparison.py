"""The pilot against settings that somebody could have chosen: ratios of goodput, workload by workload.

*Best static* is the best point of the grid for that workload, found with hindsight; *refined* is that one
after coordinate descent; *single best* is the one point that is best over all workloads, which is what an
operator can really have. Pure functions over rows of a sweep.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import fmean
from typing import Any

from kvpilot.simulate.suite import Group, Setting
from kvpilot.simulate.sweep import Row

LEAST = 1e-3
"""Goodput below it counts as this much: a ratio to nothing says nothing."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One workload's legs, each flown with several seeds. `points` are the grid's, by name."""

    name: str
    group: Group
    loaded: bool
    """Whether it asks for as much as the machine can do, or more."""
    pilot: Sequence[Row]
    defaults: Sequence[Row]
    points: Mapping[str, Sequence[Row]]
    refined: Sequence[Row] = ()

    @property
    def best(self) -> str:
        """The best point's name."""
        return max(self.points, key=lambda name: goodput(self.points[name]))


def goodput(rows: Sequence[Row]) -> float:
    """Mean over seeds."""
    return fmean(row.goodput for row in rows)


def ratio(rows: Sequence[Row], others: Sequence[Row]) -> float:
    """Of goodputs, over the seeds that both were flown with."""
    seeds = {row.seed for row in rows} & {row.seed for row in others}
    one = goodput([row for row in rows if row.seed in seeds])
    return one / max(goodput([row for row in others if row.seed in seeds]), LEAST)


def single_best(judged: Sequence[Judged], weights: Mapping[str, float]) -> str:
    """The grid's point with the highest weighted geometric mean of goodput over all workloads."""
    names = set.intersection(*(set(each.points) for each in judged))
    return max(
        sorted(names),
        key=lambda name: geomean(
            {each.name: max(goodput(each.points[name]), LEAST) for each in judged}, weights
        ),
    )


def geomean(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Weighted by workload."""
    total = sum(weights[name] for name in values)
    return exp(sum(weights[name] * log(max(value, LEAST)) for name, value in values.items()) / total)


def weights(groups: Mapping[str, Group], shares: Mapping[Group, float]) -> dict[str, float]:
    """Of each workload: its group's share, in equal parts."""
    counts = {group: sum(other == group for other in groups.values()) for group in shares}
    return {name: shares[group] / counts[group] for name, group in groups.items()}


def floors(pilot: Sequence[Row], static: Sequence[Row]) -> dict[str, float]:
    """Ratios of what a better total could be bought with: by count, the class that fares worst, the longest
    fifth, the tenant that fares worst, smooth goodput. What the static setting gave nobody is left out.
    """
    seeds = {row.seed for row in pilot} & {row.seed for row in static}
    ours = [row.score for row in pilot if row.seed in seeds]
    theirs = [row.score for row in static if row.seed in seeds]

    def compared(pick: Callable[[Mapping[str, Any]], float | None]) -> float | None:
        base = _mean(map(pick, theirs))
        value = _mean(map(pick, ours))
        return None if not base or value is None else value / base

    def of_class(name: str) -> float | None:
        return compared(lambda score: score["classes"][name]["goodput_work"])

    classes = [of_class(name) for name in ours[0]["classes"]]
    found = {
        "count": compared(lambda s: s["goodput_per_offered"]),
        "class": min((each for each in classes if each is not None), default=None),
        "longest_fifth": compared(lambda s: s["goodput_longest_fifth"]),
        "tenant": compared(lambda s: min((v for v in s["tenants"].values() if v is not None), default=None)),
        "smooth": compared(lambda s: s["goodput_smooth"]),
    }
    return {name: value for name, value in found.items() if value is not None}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def neighbours(point: Setting, grid: Sequence[Setting]) -> list[Setting]:
    """One step of coordinate descent: every value of the grid, and halfway beyond, in one coordinate."""
    found = []
    for name in ("chunk", "max_running"):
        value = getattr(point, name)
        found += [
            point.model_copy(update={name: max(1, round(value * factor))}) for factor in (0.5, 0.75, 1.5, 2)
        ]
    found += [
        point.model_copy(update={"drafts": drafts}) for drafts in range(6) if abs(drafts - point.drafts) == 1
    ]
    found += [
        point.model_copy(update={"watermark": mark}) for mark in (0.9, 0.95, 1.0) if mark != point.watermark
    ]
    caps = [dict(caps) for caps in {tuple(sorted(each.caps.items())) for each in grid}]
    for klass in ("interactive", "batch"):
        cap = point.caps.get(klass)
        if cap is not None:
            caps += [{**point.caps, klass: max(1, round(cap * factor))} for factor in (0.5, 2)]
            caps.append({**point.caps, klass: None})
    found += [point.model_copy(update={"caps": each}) for each in caps if each != point.caps]
    most = max(each.chunk for each in grid)
    return [each for each in found if each.chunk <= most]
