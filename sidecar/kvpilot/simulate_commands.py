"""`kvpilot simulate`: the pilot and the engine's defaults over a trace, in virtual time. No engine, no GPU.

Thin: parse, call, print. What is simulated is imported when the command runs.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from kvpilot.simulate.legs import Result, Scene
    from kvpilot.workload.arrival import Arrival

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
    trace: Annotated[Path, typer.Option(help="Requests: an Azure CSV.", show_default=False)],
    device: Annotated[str, typer.Option(help="As `kvpilot plan` knows them.")] = "h100",
    model: Annotated[str, typer.Option(help="A directory with config.json, or a name that plan knows.")] = (
        "llama-3-8b"
    ),
    policies: Annotated[
        Path | None, typer.Option(help="A directory of policies; the shipped ones if left out.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How much of the trace, in its own seconds.")] = 150.0,
    speed: Annotated[float, typer.Option(help="How many times as fast its requests come.")] = 1.0,
    drafts: Annotated[int, typer.Option(help="Draft tokens a sequence, by n-grams; 0 for none.")] = 0,
    seed: Annotated[int, typer.Option(help="Of classes, tenants and noise.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
) -> None:
    """What the pilot would make of a trace on a machine, beside the engine's defaults."""
    from kvengine.errors import ConfigError
    from kvpilot.policy.load import PolicyErrors
    from kvpilot.policy_directory import shipped
    from kvpilot.simulate.legs import Leg, fly_leg
    from kvpilot.workload.azure import TraceError

    legs = [Leg("defaults"), Leg("pilot", policies=policies or shipped())]
    try:
        scene = _scene(device, model, drafts, seed)
        arrivals, window_s = _arrivals(trace, seconds, speed, seed)
        results = [fly_leg(scene, leg, arrivals, window_s) for leg in legs]
    except (ConfigError, TraceError, PolicyErrors, ValueError) as error:
        _fail(error)
    if as_json:
        said = {"trace": str(trace), "device": device, "model": model, "seconds": window_s, "seed": seed}
        typer.echo(json.dumps({**said, "legs": [result.as_dict() for result in results]}))
        return
    _show(results)


def _scene(device: str, model: str, drafts: int, seed: int) -> "Scene":
    from functools import partial

    from kvpilot.simulate.legs import Scene, deployment_on
    from kvpilot.simulate.plants.named import Machine

    machine = Machine(device, model)
    deployment = deployment_on(machine, speculative_tokens=drafts)
    return Scene(deployment, partial(machine.plant, sigma=0.05, seed=seed))


def _arrivals(trace: Path, seconds: float, speed: float, seed: int) -> "tuple[list[Arrival], float]":
    """The first `seconds` of the trace, pressed together by `speed`; and how long that is."""
    import random

    from kvpilot.workload.arrival import Arrival
    from kvpilot.workload.azure import TraceError, read_azure
    from kvpilot.workload.generator import CLASSES

    if not (seconds > 0 and speed > 0):
        raise TraceError(f"--seconds {seconds:g}, --speed {speed:g}: both must be above 0")
    dice = random.Random(f"trace/{seed}")
    arrivals = []
    for row in read_azure(trace):
        if row.at_s >= seconds:
            break
        mix = dice.choices(CLASSES, [each.share for each in CLASSES])[0]
        tenant, domain = mix.pick_tenant(dice), mix.pick_domain(dice)
        lengths = max(row.prompt_tokens, 1), max(row.output_tokens, 1)
        arrivals.append(Arrival(row.at_s / speed, *lengths, mix.name, tenant, domain, dice.getrandbits(31)))
    return arrivals, seconds / speed


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
