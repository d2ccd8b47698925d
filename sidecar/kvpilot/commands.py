"""Every command, thin: parse, call, print. Each imports what it needs when it runs.

Exit codes: 0 done, 1 something is wrong with what was given or found (one line each on stderr), 2 usage.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

app = typer.Typer(
    help="Keeps LLM inference engines out of memory and latency trouble.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Configuration = Annotated[
    Path, typer.Option("--config", "-c", help="The configuration file.", show_default=True)
]
Paths = Annotated[list[Path], typer.Argument(help="Policy files, or directories of them.")]
Why = Annotated[str, typer.Option("--why", help="The reason; it is journalled.")]
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
        service = Service(load(config), SystemClock())
        asyncio.run(service.run())
    except (ConfigError, StartError) as error:
        sys.exit(str(error))  # A line for each mistake, as file:line:column where there is one.


@app.command()
def check(paths: Paths) -> None:
    """Every mistake in every policy file, as file:line:column: message."""
    from kvpilot.policy.load import policy_files
    from kvpilot.policy.testing import check as check_policies

    problems = check_policies(paths)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    count = len(policy_files(paths))
    typer.echo(f"{count} file{'' if count == 1 else 's'}, no mistakes")


@app.command()
def test(paths: Paths) -> None:
    """Run the tests of policy files, in virtual time."""
    from kvpilot.policy.testing import run_tests

    report = run_tests(paths)
    for line in report.lines():
        typer.echo(line)
    if not report.passed:
        raise typer.Exit(1)


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
    from kvpilot.policy.quantity import parse_duration

    knob, _, text = setting.partition("=")
    try:
        value = None if text == "none" else float(text)
    except ValueError:
        _fail(f"{setting!r}: write KNOB=NUMBER or KNOB=none")
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


def _ask(config: Path, order: Mapping[str, Any]) -> dict[str, Any]:
    """One order to the pilot of this configuration."""
    from kvpilot.api.client import SocketError, ask
    from kvpilot.config import ConfigError, load

    try:
        path = load(config).socket
        assert path is not None, "load() has filled this in"
        return ask(path, order)
    except ConfigError as error:
        sys.exit(str(error))
    except SocketError as error:
        _fail(error)
