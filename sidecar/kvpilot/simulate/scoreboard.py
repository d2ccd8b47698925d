"""The pilot, the engine's defaults and every static setting of a grid over one ground, and what to say of it.

The grid is flown with the first seed; the pilot, the defaults and the best few points again with the others,
as the suite does. A pilot that keeps its hands off flies along: its forecasts come true, or not, by
themselves. Scenarios with faults have one more leg, the pilot's without them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from kvpilot.simulate import comparison
from kvpilot.simulate.bounds import Held, measured
from kvpilot.simulate.comparison import Judged
from kvpilot.simulate.faults import FaultKind
from kvpilot.simulate.foresight import LOSING
from kvpilot.simulate.grounds import OfScenario, OfTraces
from kvpilot.simulate.legs import Leg
from kvpilot.simulate.scenarios import Against, Scenario
from kvpilot.simulate.staging import leg
from kvpilot.simulate.suite import Settings
from kvpilot.simulate.sweep import Ground, Order, Row, fly_all

PILOT, DEFAULTS, HANDS_OFF, UNHARMED = "pilot", "defaults", "hands off", "unharmed"
Asks = OfTraces | OfScenario
FAULTS: Mapping[FaultKind, str] = {
    "signal_missing": "signals lost",
    "telemetry_frozen": "telemetry frozen",
    "neighbour_memory": "a neighbour's memory",
    "fragmentation": "fragmentation",
    "score_memory": "attention scores in memory",
}


@dataclass(frozen=True, slots=True)
class Scoreboard:
    """What was flown. `legs`: by name, what each leg set; `single_best`: the grid's point that is known as
    the best over many workloads.
    """

    name: str
    window_s: float
    judged: Judged
    legs: Mapping[str, Leg]
    hands_off: Row
    single_best: str | None = None
    bounds: Sequence[Held] = ()
    scenario: Scenario | None = None

    @property
    def marks(self) -> list[tuple[float, float, str]]:
        """(from, to, what) in seconds of the run: the scenario's burst, and its faults."""
        if self.scenario is None:
            return []
        burst = self.scenario.burst
        found = [(*burst, "burst")] if burst is not None else []
        return found + [(f.at_s, f.at_s + f.for_s, FAULTS[f.kind]) for f in self.scenario.faults]

    @property
    def best(self) -> Sequence[Row]:
        """The best static point's rows."""
        return self.judged.points[self.judged.best]

    @property
    def single(self) -> Sequence[Row] | None:
        return None if self.single_best is None else self.judged.points.get(self.single_best)

    @property
    def columns(self) -> list[tuple[str, Sequence[Row]]]:
        """(title, rows) of the legs that people look at."""
        shown = [(PILOT, self.judged.pilot), (DEFAULTS, self.judged.defaults), ("best static", self.best)]
        if self.single is not None and self.single_best != self.judged.best:
            shown.append(("single best", self.single))
        return shown

    @property
    def regret(self) -> float:
        """What the best static setting's goodput is above the pilot's, over the seeds of both; below 0 the
        pilot won.
        """
        seeds = {row.seed for row in self.best} & {row.seed for row in self.judged.pilot}
        return comparison.goodput([row for row in self.best if row.seed in seeds]) - comparison.goodput(
            [row for row in self.judged.pilot if row.seed in seeds]
        )

    @property
    def ratios(self) -> dict[str, float]:
        """Of the pilot's goodput."""
        pilot = self.judged.pilot
        found = {
            "vs_best_static": comparison.ratio(pilot, self.best),
            "vs_defaults": comparison.ratio(pilot, self.judged.defaults),
        }
        if self.single is not None:
            found["vs_single_best"] = comparison.ratio(pilot, self.single)
        return found

    @property
    def floors(self) -> dict[str, float]:
        """Against the best static setting."""
        return comparison.floors(self.judged.pilot, self.best)


def fly(
    asks: Asks,
    settings: Settings,
    policies: Path,
    seeds: int,
    workers: int | None = None,
    told: Callable[[int, int], None] = lambda done, all_: None,
) -> Scoreboard:
    """Fly all of it. `told`: legs landed, of how many. Raises what `Ground.stage` does, and PolicyErrors."""
    grounds = [replace(asks, seed=asks.seed + more) for more in range(seeds)]
    scenario = asks.scenario if isinstance(asks, OfScenario) else None
    first, *others = grounds
    best = min(settings.budget.best, len(settings.grid))
    points = {point.name: leg(point) for point in settings.grid}
    legs = {**_hands(settings, policies, scenario), **points}
    burst = scenario.burst if scenario is not None else None

    def order(ground: Ground, flown: Leg) -> Order:
        return Order(ground, flown, watched=True, burst=burst)

    orders = [order(first, each) for each in legs.values()]
    if (unharmed := _unharmed(first)) is not None:
        orders.append(order(unharmed, replace(legs[PILOT], name=UNHARMED)))
    count = len(orders) + len(others) * (2 + best)
    landed: list[Row] = []

    def tell(row: Row) -> None:
        landed.append(row)
        told(len(landed), count)

    rows = fly_all(orders, workers, tell)
    leading = sorted((row for row in rows if row.leg in points), key=lambda row: -row.goodput)[:best]
    again = [PILOT, DEFAULTS, *(row.leg for row in leading)]
    rows += fly_all([order(ground, legs[name]) for ground in others for name in again], workers, tell)
    judged = Judged(
        asks.name,
        "nonstationary",
        loaded=True,
        pilot=_of(rows, PILOT),
        defaults=_of(rows, DEFAULTS),
        points={name: _of(rows, name) for name in points},
    )
    board = Scoreboard(
        asks.name,
        float(judged.pilot[0].score["window_s"]),
        judged,
        legs,
        _of(rows, HANDS_OFF)[0],
        settings.best_known if settings.best_known in points else None,
    )
    if scenario is None:
        return board
    against: dict[Against, Sequence[Row]] = {
        "defaults": judged.defaults,
        "best_static": board.best,
        "unharmed": _of(rows, UNHARMED) or judged.pilot,
    }
    return replace(board, bounds=measured(scenario, judged.pilot, against), scenario=scenario)


def _hands(settings: Settings, policies: Path, scenario: Scenario | None) -> dict[str, Leg]:
    """Legs that are no points of the grid."""
    engine = {**settings.pilot.engine, **(scenario.engine if scenario is not None else {})}
    return {
        PILOT: Leg(PILOT, engine, policies),
        DEFAULTS: leg(settings.defaults, DEFAULTS),
        HANDS_OFF: Leg(HANDS_OFF, engine, hands_off=True),
    }


def _unharmed(ground: Asks) -> OfScenario | None:
    """The scenario without what hides signals; None where nothing does."""
    if not isinstance(ground, OfScenario):
        return None
    left = tuple(fault for fault in ground.scenario.faults if fault.kind not in LOSING)
    if left == ground.scenario.faults:
        return None
    return replace(ground, scenario=replace(ground.scenario, faults=left))


def _of(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row.leg == name]


def figures(board: Scoreboard) -> dict[str, Any]:
    """For `--json`: plain values; null is "nothing to measure"."""
    seen = board.judged.pilot[0].seen
    watched = board.hands_off.seen
    return {
        "legs": {title: _leg(rows, board) for title, rows in board.columns},
        "ratios": board.ratios,
        "regret": board.regret,
        "floors": board.floors,
        "best_static": board.judged.best,
        "single_best": board.single_best,
        "grid": {name: comparison.goodput(rows) for name, rows in board.judged.points.items()},
        "forecasts": {
            "hands_off": _foresight(watched),
            "flying": _foresight(seen),
        },
        "bounds": [held.as_dict() for held in board.bounds],
        "rules": dict(seen.rules) if seen is not None else {},
    }


def _foresight(seen: Any) -> dict[str, float | int | None] | None:
    if seen is None or seen.foresight is None:
        return None
    told = seen.foresight
    return {name: getattr(told, name) for name in type(told).__slots__}


def spread(rows: Sequence[Row]) -> float:
    """Of goodput over seeds: most less least."""
    values = [row.goodput for row in rows]
    return max(values) - min(values)


def _leg(rows: Sequence[Row], board: Scoreboard) -> dict[str, Any]:
    flown = board.legs[rows[0].leg]
    return {
        "setting": dict(flown.settings),
        "seeds": len(rows),
        "goodput": comparison.goodput(rows),
        "spread": spread(rows),
        "reversals_per_min": max(row.reversals_per_min for row in rows),
        "actions_per_min": max(row.actions_per_min for row in rows),
        "recovery_s": recovery_s(rows),
        "score": rows[0].score,
    }


def recovery_s(rows: Sequence[Row]) -> float | None:
    """Of the seed that took longest; None where there was no burst, or goodput never came back."""
    found = [row.seen.recovery_s if row.seen is not None else None for row in rows]
    known = [each for each in found if each is not None and each < inf]
    return max(known) if known and len(known) == len(found) else None
