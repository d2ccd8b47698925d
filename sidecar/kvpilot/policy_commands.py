"""The commands that need no pilot: about policy files, the catalogues they are written in, and the journal.

Thin, like all commands: parse, call, print. Each imports what it needs when it runs.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kvpilot.policy.against import EngineHas

Paths = Annotated[list[Path], typer.Argument(help="Policy files, or directories of them.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON and nothing else.")]
AsPage = Annotated[bool, typer.Option("--markdown", help="As the page in docs/.")]
AnEnginesPages = Annotated[
    Path | None,
    typer.Option("--engine", help="Check against the engine that writes its telemetry here, too."),
]


def check(paths: Paths, engine: AnEnginesPages = None) -> None:
    """Every mistake in every policy file, as file:line:column: message."""
    from kvpilot.policy.checking import check as check_policies

    checked = check_policies(paths, None if engine is None else _engine(engine))
    for problem in checked.problems:
        typer.echo(problem)
    if checked.problems:
        raise typer.Exit(1)
    typer.echo(f"{checked.files} file{'' if checked.files == 1 else 's'}, no mistakes")


def run_tests(
    paths: Paths,
    junit: Annotated[Path | None, typer.Option(help="Write the results as JUnit XML to this file.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show what happened, tick by tick.")] = False,
) -> None:
    """Run the tests of policy files, in virtual time."""
    from kvpilot.clock import SystemClock
    from kvpilot.policy.testing import run_tests as run

    report = run(paths, SystemClock(), trace)
    for line in report.lines():
        typer.echo(line)
    if junit is not None:
        from kvpilot.policy.junit import junit_xml

        try:
            junit.write_bytes(junit_xml(report))
        except OSError as error:
            sys.exit(f"kvpilot: {junit}: {error.strerror}")
    if not report.passed:
        raise typer.Exit(1)


def _engine(directory: Path) -> "EngineHas":
    import os

    from kvpilot.adapters.engine_has import engine_at
    from kvpilot.link.page import LinkError
    from kvpilot.link.trust import trusted_uids

    try:
        return engine_at(directory, trusted_uids(os.environ))
    except LinkError as error:
        sys.exit(f"kvpilot: {error}")


def explain(
    decision: Annotated[str | None, typer.Argument(help="Its number; the newest ones if left out.")] = None,
    last: Annotated[
        int | None, typer.Option(min=1, help="How many of the newest; 10 if nothing is said.")
    ] = None,
    journal: Annotated[Path | None, typer.Option(help="The pilot's journal, if it lies elsewhere.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The configuration; kvpilot.yaml if it is there.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Why: inputs and their ages, rule, arbitration, verdict, and the effect beside what was expected."""
    import json
    from dataclasses import replace

    from kvpilot.clock import SystemClock
    from kvpilot.explain.export import as_json as plain
    from kvpilot.explain.inquiry import inquire, now
    from kvpilot.explain.terminal import lines
    from kvpilot.journal.store import JournalError

    number = None if decision is None else decision.removeprefix("#")
    if number is not None and not (number.isascii() and number.isdecimal() and len(number) < 19):
        sys.exit(f"kvpilot: {decision!r}: a decision is a number, such as 412")
    if number is not None and last is not None:
        sys.exit("kvpilot: give the number of a decision or --last, not both")
    at, socket = _journal_and_socket(journal, config)
    try:
        found = inquire(at, None if number is None else int(number), last or 10)
    except JournalError as error:
        sys.exit(f"kvpilot: {error}")
    status = _status(socket)
    if status is not None:
        found = [replace(each, now=now(each, status)) for each in found]
    if as_json:
        typer.echo(json.dumps(plain(found, status is not None)))
        return
    if status is None:
        typer.echo("No pilot answers: this is what the journal says.\n")
    if not found:
        typer.echo("no decisions yet")
    for each in found:
        for line in lines(each, SystemClock().wall_ns()):
            typer.echo(line)
        typer.echo()


def _journal_and_socket(journal: Path | None, config: Path | None) -> tuple[Path, Path | None]:
    """Where to look. A journal that is named needs no configuration, and is of no running pilot we know."""
    import os

    from kvpilot.config import ConfigError, load
    from kvpilot.link.place import ENVIRON_ENGINE, ENVIRON_TELEMETRY
    from kvpilot.whereabouts import whereabouts

    if journal is not None and config is None:
        return journal, None
    default = Path("kvpilot.yaml")
    try:
        if config is not None or default.exists():
            loaded = load(config or default)
            assert loaded.journal is not None, "load() has filled this in"
            return journal or loaded.journal, loaded.socket
        if not (os.environ.get(ENVIRON_TELEMETRY) and os.environ.get(ENVIRON_ENGINE)):
            sys.exit(
                f"kvpilot: there is no {default} here: name it with --config, or a journal with --journal"
            )
        return whereabouts(None, None, None, os.environ).journal, None
    except ConfigError as error:
        sys.exit(str(error))


def _status(socket: Path | None) -> dict[str, Any] | None:
    """The running pilot's; None where none answers, which is no mistake here."""
    from kvpilot.api.client import SocketError, ask

    if socket is None:
        return None
    try:
        return dict(ask(socket, {"do": "status"})["status"])
    except (SocketError, KeyError):
        return None


def schema(
    tests: Annotated[bool, typer.Option("--tests", help="Of NAME.test.yaml instead.")] = False,
) -> None:
    """The JSON Schema of policy files, for editors."""
    from kvpilot.policy.editor import as_text, schema_of_policies, schema_of_tests

    typer.echo(as_text(schema_of_tests() if tests else schema_of_policies()), nl=False)


def signals(as_json: AsJson = False, page: AsPage = False) -> None:
    """Everything that policies can see: unit, plausible range, aggregations, and which engines have it."""
    from kvpilot.publish.catalogue import as_json as plain
    from kvpilot.publish.catalogue import render_signals, signal_rows, signals_page

    rows = signal_rows()
    _show(plain(rows) if as_json else signals_page(rows) if page else render_signals(rows))


def knobs(as_json: AsJson = False, page: AsPage = False) -> None:
    """Everything that policies can move: unit, plausible range, which way is safe, and in which engines."""
    from kvpilot.publish.catalogue import as_json as plain
    from kvpilot.publish.catalogue import knob_rows, knobs_page, render_knobs

    rows = knob_rows()
    _show(plain(rows) if as_json else knobs_page(rows) if page else render_knobs(rows))


def _show(what: Any) -> None:
    """Plain data as JSON, text as it is, a table as a table."""
    import json

    if isinstance(what, list):
        typer.echo(json.dumps(what))
    elif isinstance(what, str):
        typer.echo(what, nl=False)
    else:
        from rich.console import Console

        Console().print(what)
