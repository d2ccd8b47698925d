"""`kvpilot replay`: what other policies would have made of a recorded flight."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from kvpilot.simulate.replay import Figure, Replayed

_TITLES = {
    "goodput_work": "Gw",
    "goodput_per_offered": "by count",
    "goodput_smooth": "smooth",
    "goodput_longest_fifth": "longest fifth",
    "ttft_p50_s": "TTFT p50 s",
    "ttft_p95_s": "TTFT p95 s",
    "itl_p50_s": "ITL p50 s",
    "itl_p95_s": "ITL p95 s",
}


def replay(
    recording: Annotated[Path, typer.Argument(help="A recording's directory, or one of its files.")],
    policies: Annotated[Path, typer.Option(help="A directory of policies: those to be tried.")],
    last: Annotated[float, typer.Option(min=1.0, help="Seconds of it: the newest.")] = 900.0,
    ago: Annotated[
        float, typer.Option(min=0.0, help="Seconds before its end at which those end, for what is past.")
    ] = 0.0,
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Flights of each account, with noise of their own.")
    ] = 3,
    despite_missing: Annotated[
        bool, typer.Option(help="Fly policies also where the recording lacks a signal that they need.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
) -> None:
    """What other policies would have made of a recorded flight, beside the simulator's own error on it."""
    from kvpilot.policy.load import PolicyErrors
    from kvpilot.simulate.replay import replay as replayed

    try:
        found = replayed(recording, policies, seeds, despite_missing, last, ago)
    except (PolicyErrors, ValueError) as error:
        sys.exit(f"kvpilot: {error}")
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    from rich.console import Console

    Console().print(_rendered(found))


def _rendered(found: "Replayed") -> "RenderableType":
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    said = found.as_dict()
    head = (
        f"{said['engine']}: {said['seconds']:,.0f} s, {said['requests']:,} requests, {found.judged:,} judged"
    )
    table = Table(title=head, title_justify="left", box=None, pad_edge=False)
    for title in ("", "recorded", "as flown", "error", "new", "change", ""):
        table.add_column(title, justify="right" if title else "left")
    for figure in found.figures:
        _add(table, figure)
    parts: list[RenderableType] = [table]
    parts.append(Text("as flown: the recorded decisions, simulated; error: how far that is from recorded"))
    parts.append(Text("within error: no smaller change than the error means anything"))
    moved = Table(title="\nwho held what", title_justify="left", box=None, pad_edge=False)
    for title in ("policy/rule", "knob", "recorded s", "from..to", "new s", "from..to"):
        named = title in ("policy/rule", "knob")
        moved.add_column(title, justify="left" if named else "right", overflow="fold")
    did = {(one.rule, one.knob): one for one in found.did}
    would = {(one.rule, one.knob): one for one in found.would}
    for key in sorted(did.keys() | would.keys()):
        cells = list[str]()
        for one in (did.get(key), would.get(key)):
            cells += ["-", "-"] if one is None else [f"{one.held_s:.1f}", f"{one.least:g}..{one.most:g}"]
        moved.add_row(*key, *cells)
    parts.append(moved)
    parts += [Text(f"- {limit}") for limit in found.limits]
    return Group(*parts)


def _add(table: "Table", figure: "Figure") -> None:
    values = (figure.recorded, figure.flown, figure.error, figure.new, figure.delta)
    cells = ["-" if value is None else f"{value:.4g}" for value in values]
    table.add_row(_TITLES.get(figure.name, figure.name), *cells, figure.verdict)
