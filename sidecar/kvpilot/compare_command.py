"""`kvpilot simulate --compare`: fly the scoreboard, and show it as a table, an object, plots and a page."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from kvpilot.simulate.asked import Asked
    from kvpilot.simulate.bounds import Held
    from kvpilot.simulate.foresight import Foresight
    from kvpilot.simulate.grounds import OfScenario, OfTraces
    from kvpilot.simulate.report.page import About
    from kvpilot.simulate.scoreboard import Scoreboard
    from kvpilot.simulate.suite import Settings
    from kvpilot.simulate.sweep import Row

_SCORED = (
    ("by count", "goodput_per_offered"),
    ("smooth", "goodput_smooth"),
    ("longest fifth", "goodput_longest_fifth"),
    ("TTFT p95 s", "ttft_p95_s"),
    ("ITL p95 s", "itl_p95_s"),
    ("shed", "shed"),
    ("abandoned", "abandoned"),
    ("failed", "failed"),
    ("OOM", "oom"),
    ("preempted", "preemptions"),
)
FLOORS = {
    "count": "by count",
    "class": "worst class",
    "longest_fifth": "longest fifth",
    "tenant": "worst tenant",
    "smooth": "smooth",
}


class CompareError(ValueError):
    """What is asked for cannot be written; one line."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Where the result goes. Raises CompareError, before anything is flown, for places that cannot be."""

    as_json: bool = False
    report: Path | None = None
    plots: Path | None = None

    def __post_init__(self) -> None:
        if self.report is not None and (self.report.is_dir() or not self.report.absolute().parent.is_dir()):
            raise CompareError(f"--report {self.report}: give a file in a directory that exists")
        if self.plots is not None and self.plots.exists() and not self.plots.is_dir():
            raise CompareError(f"--plots {self.plots}: is no directory")


def asked_for(
    traces: Sequence[Path],
    scenario: str | None,
    device: str,
    model: str,
    policies: Path,
    slice_: str | None,
    seconds: float,
    speed: float,
    seed: int,
    drafts: int,
    plant: Path | None,
    grid: Path | None,
) -> "tuple[OfTraces | OfScenario, Settings]":
    """The ground, and whose grid, defaults and pilot fly over it. The machine has memory for the largest step
    of any leg. Raises CompareError, SettingsError, ScenarioError.
    """
    from kvpilot.simulate.grounds import OfScenario, OfTraces
    from kvpilot.simulate.plants.named import Machine
    from kvpilot.simulate.scenarios import scenario_named
    from kvpilot.simulate.suite import load
    from kvpilot.simulate.suite import shipped as shipped_settings

    settings = load(grid or shipped_settings())
    if drafts:
        raise CompareError("--drafts: --compare flies the drafts of its grid's settings; leave it out")
    if scenario is not None:
        machine = replace(settings.machine.machine, device=device, model=model)
        return OfScenario(scenario_named(scenario), machine, policies, settings, seed), settings
    sizes = settings.machine
    machine = Machine(device, model, chunk_tokens=sizes.chunk_tokens, max_running=sizes.max_running)
    asks = OfTraces(tuple(traces), machine, policies, slice_, seconds, speed, seed, plant=plant)
    return asks, settings


def compare(
    asks: "OfTraces | OfScenario",
    settings: "Settings",
    policies: Path,
    seeds: int,
    processes: int | None,
    shown: Shown,
    grid: Path | None = None,
) -> None:
    """Fly and show; `grid` is where the settings were read, if they are not the shipped ones. Raises what
    `Ground.stage` does, PolicyErrors, CompareError.
    """
    from kvpilot.simulate.legs import load_policies
    from kvpilot.simulate.report.page import About
    from kvpilot.simulate.scoreboard import figures, fly
    from kvpilot.version import version

    if seeds < 1:
        raise CompareError(f"--seeds {seeds}: at least 1")
    # Here first: mistakes are said before any process is started.
    asked = asks.stage()
    load_policies(policies, asked.scene.deployment.classes)
    if asked.ranks > 1:
        compare_ranks(asks, asked, processes, shown)
        return

    def told(done: int, count: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {count} legs", end="\n" if done == count else "", file=sys.stderr, flush=True)

    board = fly(asks, settings, policies, seeds, processes, told)
    about = About(
        device=asks.machine.device,
        model=asks.machine.model,
        seeds=seeds,
        arrivals=len(asked.arrivals),
        oversized=asked.oversized,
        promises=asked.scene.promises.slos,
        command=command(asks, policies, seeds, grid),
        version=version(),
    )
    _write(board, about, shown)
    if shown.as_json:
        typer.echo(json.dumps({**_said(board, about), **figures(board)}))
        return
    _show(board, about)


def compare_ranks(asks: "OfTraces | OfScenario", asked: "Asked", processes: int | None, shown: Shown) -> None:
    """A scenario of several ranks: the defaults and the pilot over all of them, and what must hold. Static
    settings and the page are of one engine.
    """
    from kvpilot.simulate import fleet_report
    from kvpilot.simulate.bounds import measured_ranks
    from kvpilot.simulate.grounds import OfScenario

    if shown.report is not None or shown.plots is not None:
        raise CompareError(
            f"{asked.name}: --report and --plots are of one engine; it has {asked.ranks} ranks"
        )
    fleet = asked.fleet(None, None, processes)
    assert fleet is not None
    assert isinstance(asks, OfScenario)
    flown = fleet_report.fly(asked, fleet)
    said = {each.leg.name: each.as_dict() for each in flown}
    bounds = measured_ranks(asks.scenario, said["pilot"], said["defaults"])
    if shown.as_json:
        held = [each.as_dict() for each in bounds]
        typer.echo(json.dumps({"trace": asked.name, **fleet_report.as_dict(asked, flown), "bounds": held}))
        return
    fleet_report.show(flown)
    _show_bounds(bounds)


def command(asks: "OfTraces | OfScenario", policies: Path, seeds: int, grid: Path | None = None) -> str:
    """What flies the same again."""
    from kvpilot.policy_directory import shipped
    from kvpilot.simulate.grounds import OfScenario

    words = ["kvpilot", "simulate"]
    if isinstance(asks, OfScenario):
        words += ["--scenario", asks.scenario.name]
    else:
        words += [word for path in asks.paths for word in ("--trace", str(path))]
        words += ["--slice", asks.slice_] if asks.slice_ is not None else ["--seconds", f"{asks.seconds:g}"]
        words += ["--speed", f"{asks.speed:g}"] if asks.speed != 1 else []
        words += ["--plant", str(asks.plant)] if asks.plant is not None else []
    words += ["--device", asks.machine.device, "--model", asks.machine.model]
    words += ["--policies", str(policies)] if policies != shipped() else []
    words += ["--grid", str(grid)] if grid is not None else []
    return shlex.join([*words, "--seed", str(asks.seed), "--seeds", str(seeds), "--compare"])


def _said(board: "Scoreboard", about: "About") -> dict[str, Any]:
    return {
        "trace": board.name,
        "device": about.device,
        "model": about.model,
        "seconds": board.window_s,
        "seeds": about.seeds,
        "offered": about.arrivals,
        "oversized": about.oversized,
        "command": about.command,
    }


def _write(board: "Scoreboard", about: "About", shown: Shown) -> None:
    from kvpilot.simulate.report.figures import drawn
    from kvpilot.simulate.report.page import page
    from kvpilot.simulate.report.svg import standalone

    try:
        if shown.report is not None:
            shown.report.write_text(page(board, about), encoding="utf-8")
        if shown.plots is not None:
            shown.plots.mkdir(parents=True, exist_ok=True)
            for each in drawn(board):
                (shown.plots / f"{each.name}.svg").write_text(standalone(each), encoding="utf-8")
    except OSError as error:
        raise CompareError(f"{error.filename}: {error.strerror}; nothing was written there") from error


def _show(board: "Scoreboard", about: "About") -> None:
    from rich.console import Console
    from rich.table import Table

    from kvpilot.simulate.comparison import goodput
    from kvpilot.simulate.scoreboard import recovery_s, spread

    out = Console()
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    columns = board.columns
    for title, _ in columns:
        table.add_column(title, justify="right")
    table.add_row("Gw", *(_cell(goodput(rows)) for _, rows in columns), style="bold")
    table.add_row("  spread", *(_cell(spread(rows)) for _, rows in columns), style="dim")
    table.add_row("  seeds", *(str(len(rows)) for _, rows in columns), style="dim")
    for title, key in _SCORED:
        table.add_row(title, *(_cell(rows[0].score[key]) for _, rows in columns))
    for name in columns[0][1][0].score["classes"]:
        cells = (rows[0].score["classes"][name]["goodput_work"] for _, rows in columns)
        table.add_row(f"Gw {name}", *map(_cell, cells))
    table.add_row("recovery s", *(_cell(recovery_s(rows)) for _, rows in columns))
    table.add_row("actions/min", *(_most(rows, "actions_per_min") for _, rows in columns))
    table.add_row("reversals/min", *(_most(rows, "reversals_per_min") for _, rows in columns))
    out.print(table)
    out.print(f"\nbest static  {board.judged.best}", highlight=False)
    if board.single_best is not None:
        out.print(f"single best  {board.single_best}", highlight=False)
    ratios = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in board.ratios.items())
    out.print(f"pilot        {ratios}, regret {board.regret:+.3f}", highlight=False)
    floors = ", ".join(f"{FLOORS[name]} {value:.3f}" for name, value in board.floors.items())
    out.print(f"floors       {floors}, each over the best static setting's", highlight=False, soft_wrap=True)
    out.print(f"forecasts    {_forecasts(board)}", highlight=False, soft_wrap=True)
    _show_bounds(board.bounds)
    if about.oversized:
        print(f"{about.oversized} requests are longer than the model or the pool: the engine refused them")


def _show_bounds(bounds: "Sequence[Held]") -> None:
    from rich.console import Console

    out = Console()
    for held in bounds:
        style = {True: "green", False: "bold red", None: "yellow"}[held.holds]
        out.print(f"bound        {bound_line(held)}", highlight=False, style=style, soft_wrap=True)


def bound_line(held: "Held") -> str:
    """A bound, its figure, and whether it holds."""
    if held.value is None:
        return f"{held.asked}: {held.said}"
    value = "never" if held.value == float("inf") and held.note else f"{held.value:.3g}"
    return f"{held.asked}: {value}, {held.said}"


def _forecasts(board: "Scoreboard") -> str:
    seen = board.hands_off.seen
    told: Foresight | None = seen.foresight if seen is not None else None
    if told is None:
        return "-"
    parts = [f"KV exhausted {told.events} times, {told.warned} foretold"]
    if told.lead_s is not None:
        parts.append(f"{told.lead_s:.1f} s before")
    if told.false_alarms_per_h is not None:
        parts.append(f"{told.false_alarms_per_h:.1f} false alarms/h")
    if told.coverage is not None:
        parts.append(f"p10-p90 holds {told.coverage:.2f}")
    if told.late_precision is not None:
        parts.append(f"late first tokens: precision {told.late_precision:.2f}")
    if told.late_recall is not None:
        parts.append(f"recall {told.late_recall:.2f}")
    return ", ".join(parts)


def _most(rows: "Sequence[Row]", name: str) -> str:
    """Of all seeds; a static setting has none."""
    return _cell(max(getattr(row, name) for row in rows)) if rows[0].leg == "pilot" else "-"


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
