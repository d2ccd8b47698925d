"""Does the pilot win without being tuned? `python bench/goodput.py`.

The suite of bench/settings.yaml in virtual time: the engine's defaults, 24 static settings, and the pilot
with the shipped policies, one set for everything. The best three points of each workload and the pilot are
flown with five seeds; the best point of eight workloads is refined by coordinate descent. All of it is fixed
in that file, part of the suite is held out of tuning, and everything is relative to the machine.

`--trace FILE` judges on traces that nobody has seen (Azure CSV, Mooncake JSONL, ServeGen clients, lengths),
at `--load`; both may be given again. `--traces` is the directory of the suite's own; workloads whose trace is
not there are named in the results. About 90 minutes on two cores; `--quick` flies a few workloads, ten
minutes.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frame import Bar, run

from kvpilot.policy_directory import shipped as shipped_policies
from kvpilot.simulate import comparison
from kvpilot.simulate.comparison import Judged, geomean, ratio
from kvpilot.simulate.grounds import OfSuite
from kvpilot.simulate.legs import fly_leg
from kvpilot.simulate.scenarios import scenario_named
from kvpilot.simulate.stability import recovery_s
from kvpilot.simulate.staging import leg
from kvpilot.simulate.suite import Entry, Setting, Settings, load, shipped
from kvpilot.simulate.sweep import Order, Row, fly_all
from kvpilot.workload.spec import Part

TRACES = Path(__file__).parents[2] / "shared/traces"
QUICK = ("chat-0.75", "chat-1.2", "code-azure-1.0", "pulses-1.1", "shift", "chat-kv-1.2")
QUICK_POINTS = 6
DESCENTS = 2
"""Rounds of coordinate descent at most."""
RECOVERY = "metastable-burst"


class Bench:
    """Flies what is asked and keeps what came of it."""

    def __init__(self, settings: Settings, arguments: argparse.Namespace) -> None:
        self.settings = settings
        self.quick = arguments.quick
        self._arguments = arguments
        self._policies = arguments.policies or shipped_policies()
        self._seeds = 1 if arguments.quick else arguments.seeds or settings.budget.seeds_of_best
        self._grid = (
            settings.grid[:: len(settings.grid) // QUICK_POINTS] if arguments.quick else settings.grid
        )
        self._flown = 0
        self._traces: Path | None = None

    def judge(self, entries: Sequence[Entry], traces: Path | None) -> list[Judged]:
        self._traces = traces
        first = self._fly(
            [
                order
                for entry in entries
                for order in (
                    *(self._order(entry, 1, point) for point in (self.settings.defaults, *self._grid)),
                    *(self._order(entry, seed, None) for seed in self._all_seeds),
                )
            ],
        )
        again = self._again(entries, first)
        rows = [*first, *again]
        refined = self._refine([e for e in entries if e.name in self.settings.budget.refined], rows)
        names = {point.name for point in self._grid}
        default = self.settings.defaults.name
        found = []
        for entry in entries:
            mine: dict[str, list[Row]] = {}
            for row in rows:
                if row.workload == entry.name:
                    mine.setdefault(row.leg, []).append(row)
            points = {name: flown for name, flown in mine.items() if name in names}
            loaded = max(part.load for part in entry.parts) >= 1
            found.append(
                Judged(
                    entry.name,
                    entry.group,
                    loaded,
                    mine["pilot"],
                    mine[default],
                    points,
                    refined.get(entry.name, ()),
                )
            )
        return found

    def _order(self, entry: Entry, seed: int, point: Setting | None) -> Order:
        """One leg of a point, or the pilot's."""
        flown = leg(point) if point is not None else leg(self.settings.pilot, "pilot", self._policies)
        return Order(OfSuite(self.settings, entry, seed, self._traces), flown)

    @property
    def _all_seeds(self) -> range:
        return range(1, self._seeds + 1)

    def _again(self, entries: Sequence[Entry], rows: Sequence[Row]) -> list[Row]:
        """The best few points of each workload with the other seeds."""
        if self._seeds == 1:
            return []
        by_name = {point.name: point for point in self._grid}
        orders = []
        for entry in entries:
            mine = [row for row in rows if row.workload == entry.name and row.leg in by_name]
            best = sorted(mine, key=lambda row: -row.goodput)[: self.settings.budget.best]
            orders += [
                self._order(entry, seed, by_name[row.leg]) for row in best for seed in self._all_seeds[1:]
            ]
        return self._fly(orders)

    def _refine(self, entries: Sequence[Entry], rows: Sequence[Row]) -> dict[str, list[Row]]:
        """Coordinate descent from each workload's best point on the first seed; its end with all seeds."""
        by_name = {point.name: point for point in self._grid}
        best: dict[str, tuple[float, Setting]] = {}
        for entry in entries:
            mine = [
                row for row in rows if row.workload == entry.name and row.leg in by_name and row.seed == 1
            ]
            top = max(mine, key=lambda row: row.goodput)
            best[entry.name] = (top.goodput, by_name[top.leg])
        moving = list(entries)
        for _ in range(0 if self.quick else DESCENTS):
            asked = [
                (entry, near)
                for entry in moving
                for near in comparison.neighbours(best[entry.name][1], self._grid)
            ]
            flown = self._fly([self._order(entry, 1, near) for entry, near in asked])
            moving = []
            for (entry, near), row in zip(asked, flown, strict=True):
                if row.goodput > best[entry.name][0]:
                    best[entry.name] = (row.goodput, near)
                    moving = [*(e for e in moving if e is not entry), entry]
        orders = [
            self._order(entry, seed, best[entry.name][1]) for entry in entries for seed in self._all_seeds
        ]
        found: dict[str, list[Row]] = {}
        for row in self._fly(orders):
            found.setdefault(row.workload, []).append(row)
        return found

    def _fly(self, orders: Sequence[Order]) -> list[Row]:
        def told(row: Row) -> None:
            self._flown += 1
            if not self._arguments.json:
                print(f"\r{self._flown} legs", end="", file=sys.stderr, flush=True)

        return fly_all(orders, self._arguments.workers, told)

    def recovery(self) -> float | None:
        """Seconds until goodput is back after ten minutes of twice the load."""
        from kvpilot.simulate.asked import of_scenario

        scenario = scenario_named(RECOVERY)
        assert scenario.burst is not None
        asked = of_scenario(scenario, self.settings.machine.machine, self._policies, self.settings, 1)
        flown = fly_leg(asked.scene, asked.legs[-1], asked.arrivals, asked.window_s)
        slos, (start_s, end_s) = asked.scene.promises.slos, scenario.burst
        return recovery_s(flown.outcomes, slos, asked.scene.promises.r, (0.0, start_s), end_s)


def report(judged: Sequence[Judged], settings: Settings) -> tuple[dict[str, Any], list[Bar]]:
    weights = comparison.weights({each.name: each.group for each in judged}, _present(judged, settings))
    single = comparison.single_best(judged, weights)
    table: dict[str, Any] = {}
    static, against_single, default, refined, nonstationary, floors = {}, {}, {}, {}, {}, {}
    for each in judged:
        best = each.points[each.best]
        static[each.name] = ratio(each.pilot, best)
        against_single[each.name] = ratio(each.pilot, each.points[single])
        if each.loaded:
            default[each.name] = ratio(each.pilot, each.defaults)
        if each.refined:
            refined[each.name] = ratio(each.pilot, each.refined)
            if each.group == "nonstationary":
                nonstationary[each.name] = refined[each.name]
        floor = comparison.floors(each.pilot, best)
        floors[each.name] = min(floor.values())
        table[each.name] = {
            "pilot": comparison.goodput(each.pilot),
            "spread": max(row.goodput for row in each.pilot) - min(row.goodput for row in each.pilot),
            "defaults": comparison.goodput(each.defaults),
            "best": comparison.goodput(best),
            "vs_best": static[each.name],
            "vs_refined": refined.get(each.name, "-"),
            "vs_single": against_single[each.name],
            **{f"floor_{name}": value for name, value in floor.items()},
            "reversals": max(row.reversals_per_min for row in each.pilot),
            "point": each.best,
        }
    pilots = [row for each in judged for row in each.pilot]
    bars = [
        Bar("worst_vs_best_static", min(static.values()), at_least=0.97),
        Bar("geomean_vs_best_static", geomean(static, weights), at_least=1.05),
        *([Bar("geomean_vs_refined", geomean(refined, weights), at_least=1.02)] if refined else []),
        *(
            [Bar("geomean_nonstationary_vs_refined", geomean(nonstationary, weights), at_least=1.05)]
            if nonstationary
            else []
        ),
        Bar("geomean_vs_single_best", geomean(against_single, weights), at_least=1.12),
        *([Bar("geomean_vs_default_loaded", geomean(default, weights), at_least=1.5)] if default else []),
        Bar("worst_floor", min(floors.values()), at_least=0.9),
        Bar("oom", sum(row.score["oom"] for row in pilots), at_most=0),
        Bar("aborted", sum(row.score["failed"] for row in pilots), at_most=0),
        Bar("reversals_per_min", max(row.reversals_per_min for row in pilots), at_most=2),
    ]
    return {"workloads": table, "single_best": single}, bars


def _present(judged: Sequence[Judged], settings: Settings) -> Mapping[Any, float]:
    """Shares of the groups that were flown."""
    groups = {each.group for each in judged}
    return {group: share for group, share in settings.shares.items() if group in groups}


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    settings = load(shipped())
    arguments.load = arguments.load or [0.8, 1.2]
    bench = Bench(settings, arguments)
    about = {"machine": f"{settings.machine.device}, {settings.machine.model}", "load": arguments.load}
    if arguments.trace:
        judged = []
        for path in arguments.trace:
            for at in arguments.load:
                part = Part(seconds=settings.budget.slice_s, load=at, trace=path.name)
                entry = Entry(name=f"{path.stem}-{at:g}", group="nonstationary", parts=(part,))
                judged += bench.judge([entry], path.parent)
        return about, *report(judged, settings)
    flown, absent = settings.present(arguments.traces)
    if arguments.quick:
        flown = [entry for entry in flown if entry.name in QUICK]
    if arguments.only:
        flown = [entry for entry in flown if entry.name in arguments.only]
    results, bars = report(bench.judge(flown, arguments.traces), settings)
    seconds = None if arguments.quick else bench.recovery()
    if not arguments.quick:
        bars.append(Bar("recovery_s", float("inf") if seconds is None else seconds, at_most=60))
    return {**about, "absent": absent, "workloads": len(flown)}, results, bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, action="append", help="an unseen trace; may be given again")
    parser.add_argument(
        "--load", type=float, action="append", help="of unseen traces (0.8 and 1.2 if left out)"
    )
    parser.add_argument("--traces", type=Path, default=TRACES, help="where the suite's own traces lie")
    parser.add_argument("--policies", type=Path, help="a directory of policies; the shipped ones if left out")
    parser.add_argument("--only", action="append", help="one workload of the suite; may be given again")
    parser.add_argument("--seeds", type=int, help="of pilot and best points; the settings' if left out")
    parser.add_argument("--workers", type=int, help="processes; one a core if left out")


if __name__ == "__main__":
    run("goodput", 1, measure, __doc__ or "", add_arguments)
