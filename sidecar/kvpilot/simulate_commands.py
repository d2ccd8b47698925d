"""`kvpilot simulate`: the pilot and the engine's defaults over a trace, in virtual time. No engine, no GPU.

Thin: parse, call, print. What is simulated is imported when the command runs.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from kvpilot.simulate.legs import Result

_SHOWN = (
    ("Gw", "goodput_work"),
    ("by count", "goodput_per_offered"),
    ("smooth", "goodput_smooth"),
    ("longest fifth", "goodput_longest_fifth"),
    ("TTFT p95 s", "ttft_p95_s"),
    ("ITL p95 s", "itl_p95_s"),
    ("offered", "offered"),
    ("finished", "finished"),
    ("shed", "shed"),
    ("abandoned", "abandoned"),
    ("failed", "failed"),
    ("unfinished", "unfinished"),
    ("OOM", "oom"),
    ("preempted", "preemptions"),
    ("actions", "actions"),
)


def simulate(
    trace: Annotated[
        list[Path] | None,
        typer.Option(
            help="Azure CSV, Mooncake JSONL, ServeGen clients or lengths. Several: one after another.",
            show_default=False,
        ),
    ] = None,
    scenario: Annotated[
        str | None, typer.Option(help="An incident by name, such as metastable-burst, in place of a trace.")
    ] = None,
    device: Annotated[str, typer.Option(help="As `kvpilot plan` knows them.")] = "h100",
    model: Annotated[str, typer.Option(help="A directory with config.json, or a name that plan knows.")] = (
        "llama-3-8b"
    ),
    plant: Annotated[
        Path | None, typer.Option(help="What `kvpilot calibrate --out` wrote, in place of a roofline.")
    ] = None,
    policies: Annotated[
        Path | None, typer.Option(help="A directory of policies; the shipped ones if left out.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How much of each trace, in its own seconds.")] = 150.0,
    slice_: Annotated[
        str | None, typer.Option("--slice", help="START:END in each trace's own seconds, for --seconds.")
    ] = None,
    speed: Annotated[float, typer.Option(help="How many times as fast its requests come.")] = 1.0,
    drafts: Annotated[int, typer.Option(help="Draft tokens a sequence, by n-grams; 0 for none.")] = 0,
    seed: Annotated[int, typer.Option(help="Of classes, tenants and noise.")] = 1,
    replicas: Annotated[
        int | None, typer.Option(help="A fleet of so many, over processes, behind --balancer.")
    ] = None,
    balancer: Annotated[
        str | None, typer.Option(help="round_robin, least_kv, prefix_affine or by_tenant.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="For a fleet or --compare; one a core if left out.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Against a grid of static settings too, over all cores.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="With --compare: how often the leading legs are flown.")] = 3,
    grid: Annotated[
        Path | None,
        typer.Option(help="With --compare: settings such as bench/settings.yaml, for another grid."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="With --compare: one HTML page that stands on its own.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="With --compare: a directory for charts, SVG.")] = None,
    record: Annotated[
        Path | None, typer.Option(help="Record the piloted flight there, for `kvpilot replay`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
) -> None:
    """What the pilot would make of a trace on a machine, beside the engine's defaults."""
    from kvengine.errors import ConfigError
    from kvpilot.compare_command import Shown, asked_for
    from kvpilot.compare_command import compare as fly_compared
    from kvpilot.policy.load import PolicyErrors
    from kvpilot.policy_directory import shipped
    from kvpilot.simulate import fleet_report
    from kvpilot.simulate.asked import of_scenario, of_traces
    from kvpilot.simulate.legs import fly_leg
    from kvpilot.simulate.plants.named import Machine
    from kvpilot.simulate.scenarios import scenario_named
    from kvpilot.simulate.suite import load
    from kvpilot.simulate.suite import shipped as shipped_settings

    if (scenario is None) == (not trace):
        _fail("what arrives? Give --trace FILE, or --scenario NAME, one of them")
    by = policies or shipped()
    if not compare and (report or plots or grid):
        _fail("--report, --plots and --grid are of a comparison: give --compare as well")
    if compare and (replicas is not None or balancer is not None):
        _fail("--compare is of one engine: leave --replicas and --balancer out")
    if record is not None and (compare or replicas is not None):
        _fail("--record is of one engine: leave --compare and --replicas out")
    if record is not None and record.exists():
        _fail(f"{record}: is there already: name a new directory to record in")
    try:
        if compare:
            asks = asked_for(
                *(trace or [], scenario, device, model, by, slice_, seconds, speed, seed, drafts, plant, grid)
            )
            fly_compared(*asks, by, seeds, processes, Shown(as_json, report, plots), grid)
            return
        if scenario is not None:
            settings = load(shipped_settings())
            found = scenario_named(scenario)
            machine = replace(settings.machine.machine, device=device, model=model)
            asked = of_scenario(found, machine, by, settings, seed)
        else:
            machine = Machine(device, model)
            asked = of_traces(trace or [], machine, by, slice_, seconds, speed, seed, drafts, plant)
        fleet = asked.fleet(replicas, balancer, processes)
        if fleet is not None:
            flown = fleet_report.fly(asked, fleet)
        else:
            legs = [replace(leg, record=record) if leg.policies else leg for leg in asked.legs]
            results = [fly_leg(asked.scene, leg, asked.arrivals, asked.window_s) for leg in legs]
    except (ConfigError, PolicyErrors, ValueError) as error:
        _fail(error)
    if as_json:
        said = {
            "trace": asked.name,
            "device": device,
            "model": model,
            "seconds": asked.window_s,
            "seed": seed,
        }
        if fleet is not None:
            typer.echo(json.dumps({**said, **fleet_report.as_dict(asked, flown)}))
            return
        more = {"oversized": asked.oversized}
        typer.echo(json.dumps({**said, **more, "legs": [result.as_dict() for result in results]}))
        return
    if fleet is not None:
        fleet_report.show(flown)
    else:
        _show(results)
    if asked.oversized:
        print(f"{asked.oversized} requests are longer than the model or the pool: the engine refused them")


def _show(results: "list[Result]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for result in results:
        table.add_column(result.leg.name, justify="right")
    scores = [result.score.as_dict() for result in results]
    for title, key in _SHOWN:
        table.add_row(title, *(_cell(each[key]) for each in scores))
    for name in scores[0]["classes"]:
        table.add_row(f"Gw {name}", *(_cell(each["classes"][name]["goodput_work"]) for each in scores))
    Console().print(table)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _fail(message: object) -> NoReturn:
    sys.exit(f"kvpilot: {message}")
