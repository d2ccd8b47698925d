"""Every command, thin: parse, call, print. Each imports what it needs when it runs.

Exit codes: 0 done, 1 something is wrong with what was given or found (one line each on stderr), 2 usage.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from kvpilot import policy_commands, simulate_commands
from kvpilot.calibrate import calibrate
from kvpilot.plan import plan
from kvpilot.replay_command import replay
from kvpilot.top_command import top

if TYPE_CHECKING:
    from kvpilot.whereabouts import Whereabouts

app = typer.Typer(
    help="Keeps LLM inference engines out of memory and latency trouble.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Configuration = Annotated[
    Path, typer.Option("--config", "-c", help="The configuration file.", show_default=True)
]
Why = Annotated[str, typer.Option("--why", help="The reason; it is journalled.")]
AnEngine = Annotated[
    str | None, typer.Option("--engine", help="The engine's name in the link's directories.")
]
Telemetry = Annotated[
    Path | None,
    typer.Option("--telemetry", help="The link's telemetry directory, with --engine: no configuration."),
]
ARank = Annotated[int | None, typer.Option("--rank", min=0, help="Which data-parallel rank; 0 if left out.")]
MaybeConfiguration = Annotated[
    Path | None, typer.Option("--config", "-c", help="The configuration file; kvpilot.yaml if it is there.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")]
DEFAULT_CONFIG = Path("kvpilot.yaml")


def _fail(message: object) -> NoReturn:
    sys.exit(f"kvpilot: {message}")


@app.command()
def run(config: Configuration = DEFAULT_CONFIG) -> None:
    """Fly an engine until SIGTERM or SIGINT."""
    import asyncio
    import logging

    from kvpilot.clock import SystemClock
    from kvpilot.config import ConfigError, load
    from kvpilot.service import Service, StartError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for chatty in ("apscheduler", "httpx", "stamina"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        service = Service(load(config), SystemClock(), config_path=config)
        asyncio.run(service.run())
    except (ConfigError, StartError) as error:
        sys.exit(str(error))  # A line for each mistake, as file:line:column where there is one.


app.command()(policy_commands.check)
app.command("test")(policy_commands.run_tests)
app.command()(policy_commands.explain)
app.command()(policy_commands.schema)
app.command()(policy_commands.signals)
app.command()(policy_commands.knobs)
app.command()(plan)
app.command()(simulate_commands.simulate)
app.command()(calibrate)
app.command()(replay)
app.command()(top)


@app.command()
def status(config: Configuration = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """What the pilot sees, decides and does now."""
    import json

    described = _ask(config, {"do": "status"})["status"]
    if as_json:
        typer.echo(json.dumps(described))
        return
    from rich.console import Console

    from kvpilot.publish.terminal import render

    Console().print(render(described))


@app.command()
def override(
    setting: Annotated[str, typer.Argument(help="KNOB=VALUE, or KNOB=none to end an override.")],
    for_: Annotated[str, typer.Option("--for", help="How long, such as 90s, 10m or 2h.")] = "10m",
    why: Why = "",
    scope: Annotated[str, typer.Option(help="all, classAtMost=0 or tenant=NAME.")] = "all",
    config: Configuration = DEFAULT_CONFIG,
) -> None:
    """Hold a knob at a value; outranks every policy."""
    from kvpilot.clock import NS
    from kvpilot.policy.quantity import parse_duration, parse_number

    knob, _, text = setting.partition("=")
    try:
        value = None if text == "none" else parse_number(text) if text.endswith("%") else float(text)
    except ValueError:
        _fail(f"{setting!r}: write KNOB=NUMBER, such as max_running=8 or shed_fraction=50%, or KNOB=none")
    try:
        for_s = parse_duration(for_) / NS
    except ValueError as error:
        _fail(f"--for {for_}: {error}")
    order = {"do": "override", "knob": knob, "value": value, "for_s": for_s, "why": why, "scope": scope}
    _ask(config, order)
    typer.echo(f"{knob}: override ended" if value is None else f"{knob} held at {text} for {for_}")


@app.command()
def off(why: Why = "", config: Configuration = DEFAULT_CONFIG) -> None:
    """Withdraw every lease within one tick and hold everything in shadow."""
    _ask(config, {"do": "off", "why": why})
    typer.echo("off: leases withdrawn; `kvpilot on` lets policies act again")


@app.command()
def on(why: Why = "", config: Configuration = DEFAULT_CONFIG) -> None:
    """Let policies act again."""
    _ask(config, {"do": "on", "why": why})
    typer.echo("on")


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(help="Length of each leg.")] = 15.0,
    seed: Annotated[int, typer.Option(help="Which workload.")] = 1,
    scenario: Annotated[Literal["burst", "oversubscribed"], typer.Option(help="Which trouble.")] = "burst",
    trace: Annotated[
        Path | None, typer.Option(help="An Azure-format trace instead of the generator.")
    ] = None,
    serve: Annotated[bool, typer.Option(help="Keep the engine running at the end.")] = False,
    as_json: AsJson = False,
) -> None:
    """A real engine under a bursty load, with and without the pilot."""
    try:
        from kvpilot.demo import main
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kv"):
            raise
        _fail(f"{error.name} is not installed: pip install 'kvpilot[sidecar,engine]'")
    main(seconds=seconds, seed=seed, scenario=scenario, trace=trace, serve=serve, as_json=as_json)


@app.command()
def engines(
    config: MaybeConfiguration = None,
    telemetry: Telemetry = None,
    engine: AnEngine = None,
    as_json: AsJson = False,
) -> None:
    """What engines let kvpilot see and move: those it knows, or those that run beside you."""
    import json

    from rich.console import Console

    from kvpilot.adapters.capabilities import ranks_seen, valves_seen
    from kvpilot.adapters.known_engines import KNOWN
    from kvpilot.config import ConfigError
    from kvpilot.publish.capabilities import known_json, ranks_json, render_known, render_ranks

    if config is None and telemetry is None and engine is None:
        known = list(KNOWN.values())
        if as_json:
            typer.echo(json.dumps(known_json(known)))
        else:
            Console().print(render_known(known))
        return
    try:
        place = _whereabouts(config, telemetry, engine, None).place
    except ConfigError as error:
        sys.exit(str(error))
    ranks, problems = ranks_seen(place)
    for problem in problems:
        typer.echo(f"kvpilot: {problem}", err=True)
    if not ranks:
        _fail(f"{place.telemetry}: no engine {place.engine} has written here")
    if as_json:
        typer.echo(json.dumps(ranks_json(place.engine, ranks, valves_seen(place))))
    else:
        Console().print(render_ranks(place.engine, ranks, valves_seen(place)))


incident = typer.Typer(
    help="What an engine did last, how it ended, and what was decided for it.", no_args_is_help=True
)
app.add_typer(incident, name="incident")


@incident.command("show")
def incident_show(
    page: Annotated[
        Path | None,
        typer.Argument(help="A telemetry page, a copy perhaps, instead of the newest that ended."),
    ] = None,
    start: Annotated[str | None, typer.Option(help="The start with this nonce, or its first digits.")] = None,
    live: Annotated[bool, typer.Option("--live", help="The engine that lives, so far.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="How much of the end the timeline shows.")] = 60.0,
    journal: Annotated[Path | None, typer.Option(help="The pilot's journal, if it lies elsewhere.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every step to this file.")] = None,
    config: MaybeConfiguration = None,
    telemetry: Telemetry = None,
    engine: AnEngine = None,
    rank: ARank = None,
    as_json: AsJson = False,
) -> None:
    """The last 16,384 steps of an engine that is gone: verdict, evidence, timeline, decisions."""
    import json

    from kvpilot.config import ConfigError
    from kvpilot.incident.case import IncidentError, open_file, open_kept
    from kvpilot.incident.export import as_json as plain
    from kvpilot.incident.export import write_csv

    try:
        if page is not None:
            case = open_file(page, journal)
        else:
            at = _whereabouts(config, telemetry, engine, rank)
            case = open_kept(at.place, at.rank, journal or at.journal, start, live)
        if csv is not None:
            with csv.open("w", newline="") as file:
                write_csv(case, file)
    except ConfigError as error:
        sys.exit(str(error))
    except (IncidentError, OSError) as error:
        _fail(error)
    if as_json:
        typer.echo(json.dumps(plain(case, seconds)))
        return
    from rich.console import Console

    from kvpilot.incident.terminal import render

    Console().print(render(case, seconds), soft_wrap=False)


@incident.command("list")
def incident_list(
    config: MaybeConfiguration = None,
    telemetry: Telemetry = None,
    engine: AnEngine = None,
    rank: ARank = None,
    as_json: AsJson = False,
) -> None:
    """The starts of one rank whose pages are kept, newest first, and how each ended."""
    import json

    from kvpilot.config import ConfigError
    from kvpilot.incident.export import page_json
    from kvpilot.incident.kept import kept_pages
    from kvpilot.link.page import LinkError

    try:
        at = _whereabouts(config, telemetry, engine, rank)
        directory = at.place.telemetry_directory(at.rank)
        pages = kept_pages(directory, at.place.uids)
    except ConfigError as error:
        sys.exit(str(error))
    except LinkError as error:
        _fail(error)
    if not pages:
        _fail(f"{directory}: no engine has written here")
    if as_json:
        typer.echo(json.dumps([page_json(page) for page in pages]))
        return
    from rich.console import Console

    from kvpilot.incident.terminal import render_list

    Console().print(render_list(pages))


def _whereabouts(
    config: Path | None, telemetry: Path | None, engine: str | None, rank: int | None
) -> "Whereabouts":
    import os

    from kvpilot.whereabouts import whereabouts

    return whereabouts(config, telemetry, engine, os.environ, rank)


def _ask(config: Path, order: Mapping[str, Any]) -> dict[str, Any]:
    """One order to the pilot of this configuration."""
    from kvpilot.api.client import SocketError, ask
    from kvpilot.config import ConfigError, load

    try:
        loaded = load(config)
        assert loaded.socket is not None, "load() has filled this in"
        return ask(loaded.socket, order)
    except ConfigError as error:
        sys.exit(str(error))
    except SocketError as error:
        # Who wants it off at 3 a.m. should not have to mend a socket first.
        by_file = order["do"] == "off" and loaded.policies is not None
        _fail(f"{error}; `touch {loaded.policies}/off` does the same without it" if by_file else error)
