"""What must hold of a scenario, measured: the figure beside its bound, and whether it held.

Where a figure is a ratio, both sides are means over the seeds that both were flown with; where it is not, the
seed that fares worst counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean
from typing import Any

from kvpilot.simulate.scenarios import Against, Bound, Scenario
from kvpilot.simulate.sweep import Row

NAMES: Mapping[Against, str] = {
    "defaults": "the defaults'",
    "best_static": "the best static setting's",
    "unharmed": "the pilot's without the fault",
}

METRICS = {
    "goodput_work": "goodput by work",
    "tokens_per_s": "output tokens/s",
    "oom": "steps out of memory",
    "failed": "failed requests",
    "preemptions": "preemptions",
    "recovery_s": "seconds to recover",
    "reversals_per_min": "reversals a minute",
    "worst_tenant": "goodput of the tenant that fares worst",
    "worst_rank": "goodput of the rank that fares worst",
    "worst_actions_during_fault": "protective actions on lost signals",
}
_OF_RANKS = {"worst_rank": "goodput_work_worst", "reversals_per_min": "reversals_per_min_worst"}


@dataclass(frozen=True, slots=True)
class Held:
    """`value` None, and `holds` with it: not measured, and `note` says why. It may be infinite."""

    bound: Bound
    value: float | None
    holds: bool | None
    note: str = ""

    @property
    def asked(self) -> str:
        """The bound, for people: `goodput by work at least 0.97 of the best static setting's`."""
        bound = self.bound
        limit = f"at least {bound.at_least:g}" if bound.at_least is not None else f"at most {bound.at_most:g}"
        other = NAMES.get(bound.against)
        return f"{METRICS.get(bound.metric, bound.metric)} {limit}" + (f" of {other}" if other else "")

    @property
    def said(self) -> str:
        """`holds`, `MISSED`, or why nobody knows."""
        return self.note if self.holds is None else "holds" if self.holds else "MISSED"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; an infinite value is null."""
        bound = self.bound
        return {
            "metric": bound.metric,
            "at_least": bound.at_least,
            "at_most": bound.at_most,
            "against": None if bound.against == "nothing" else bound.against,
            "value": None if self.value in (None, inf) else self.value,
            "holds": self.holds,
            "note": self.note or None,
        }


def measured(scenario: Scenario, pilot: Sequence[Row], others: Mapping[Against, Sequence[Row]]) -> list[Held]:
    """Every bound of the scenario. `others`: the legs that bounds are ratios to; rows were watched."""
    return [_held(scenario, bound, pilot, others) for bound in scenario.holds]


def measured_ranks(scenario: Scenario, pilot: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Held]:
    """Of a scenario of several ranks, flown once: legs as `FleetResult.as_dict` says them."""
    found = []
    for bound in scenario.holds:
        if bound.against not in ("nothing", "defaults"):
            found.append(Held(bound, None, None, "not measured: that leg was not flown"))
            continue
        key = _OF_RANKS.get(bound.metric, bound.metric)
        theirs = [defaults.get(key)] if bound.against == "defaults" else []
        found.append(_judged(bound, [pilot.get(key)], theirs))
    return found


def _held(
    scenario: Scenario, bound: Bound, pilot: Sequence[Row], others: Mapping[Against, Sequence[Row]]
) -> Held:
    rows = others.get(bound.against, ()) if bound.against != "nothing" else ()
    if bound.against != "nothing" and not rows:
        return Held(bound, None, None, "not measured: that leg was not flown")
    seeds = {row.seed for row in rows} & {row.seed for row in pilot} if rows else {row.seed for row in pilot}
    ours = [_figure(row, bound.metric, scenario) for row in pilot if row.seed in seeds]
    theirs = [_figure(row, bound.metric, scenario) for row in rows if row.seed in seeds]
    return _judged(bound, ours, theirs)


def _judged(bound: Bound, ours: Sequence[float | None], theirs: Sequence[float | None]) -> Held:
    """A figure for each seed; `theirs` is empty where the bound is no ratio."""
    known, base = [each for each in ours if each is not None], [each for each in theirs if each is not None]
    if len(known) < len(ours) or not known or len(base) < len(theirs):
        return Held(bound, None, None, "not measured: there was nothing to measure")
    if base:
        value = _ratio(fmean(known), fmean(base))
    else:
        value = min(known) if bound.at_least is not None else max(known)
    holds = value >= bound.at_least if bound.at_least is not None else value <= (bound.at_most or 0.0)
    note = "never" if value == inf and bound.metric == "recovery_s" else ""
    return Held(bound, value, holds, note)


def _ratio(value: float, base: float) -> float:
    """Nothing against nothing is as much."""
    if base:
        return value / base
    return inf if value > 0 else 1.0 if value == 0 else -inf


def _figure(row: Row, metric: str, scenario: Scenario) -> float | None:
    """One metric of `scenarios.METRICS`; None where the leg had none."""
    if metric == "reversals_per_min":
        return row.reversals_per_min
    if metric == "recovery_s":
        return None if row.seen is None else row.seen.recovery_s
    if metric == "worst_actions_during_fault":
        return None if row.seen is None else float(row.seen.lost)
    if metric == "worst_tenant":
        tenants = row.score["tenants"].items()
        known = [value for name, value in tenants if name != scenario.culprit and value is not None]
        return min(known, default=None)
    value = row.score.get(metric)
    return None if value is None else float(value)
