"""Hold every query of every committed dashboard to a Prometheus: data, right labels, finite numbers.

What is run is the committed JSON, with Grafana's macros and variables replaced as Grafana would. The sources
only say which panels need something that not every machine has.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvboards.board import Board
from kvboards.generate import FOLDER
from kvboards.lab import Lab

LEGEND = re.compile(r"\{\{\s*(\w+)\s*\}\}")
VARIABLE = re.compile(r"\$\{(\w+)(?::\w+)?\}|\$(\w+)")
RATE_WINDOW = "5s"
"""Grafana's is four scrapes at least; the lab scrapes once a second."""
STEP_S = 1
MAY_BE_ABSENT = ("judged", "speculation")
"""What the lab's load may or may not bring about; a GPU is there, as recorded readings."""
REQUIRED = ("cluster", "model", "engine", "rank")
"""Choices that must be there wherever a pilot flies."""


class Unknown(Exception):
    """A query names a variable that its dashboard does not have."""


@dataclass(frozen=True, slots=True)
class Target:
    """One query of one panel, as committed."""

    board: str
    panel: str
    letter: str
    expr: str
    legend: str
    fields: tuple[str, ...]
    """Columns of a table that come from labels."""
    repeat: str
    """The variable for each of whose values there is such a panel; empty for one panel."""
    needs: str
    sparse: bool

    def __str__(self) -> str:
        return f"{self.board}, {self.panel!r}, query {self.letter}: {self.expr}"


def load(board: Board, folder: Path = FOLDER) -> dict[str, Any]:
    """The committed JSON of a dashboard."""
    loaded: dict[str, Any] = json.loads((folder / f"{board.name}.json").read_text())
    return loaded


def variables(dashboard: Mapping[str, Any]) -> set[str]:
    """Names of what a dashboard lets people choose, and of what Grafana itself provides."""
    built_in = {"__rate_interval", "__interval", "__range"}
    return built_in | {variable["name"] for variable in dashboard["templating"]["list"]}


def substitute(text: str, values: Mapping[str, str]) -> str:
    """`text` as Grafana sends it. Raises Unknown."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in values:
            raise Unknown(f"${name} in {text!r}")
        return values[name]

    return VARIABLE.sub(value, text)


def targets(board: Board, dashboard: Mapping[str, Any]) -> list[Target]:
    """Every query of every panel, in order."""
    shown = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    found = []
    for panel, source in zip(shown, board.panels, strict=True):
        fields = tuple(name for name, _, _ in source.columns if not name.startswith("Value"))
        found += [
            Target(
                board.name,
                panel["title"],
                target["refId"],
                target["expr"],
                target["legendFormat"],
                fields,
                source.repeat,
                source.needs,
                query.sparse,
            )
            for target, query in zip(panel["targets"], source.queries, strict=True)
        ]
    return found


async def values(lab: Lab, dashboard: Mapping[str, Any]) -> dict[str, str]:
    """What the dashboard's variables come to: all values of each, joined as Grafana joins them for `All`."""
    found = {"__rate_interval": RATE_WINDOW, "__interval": f"{STEP_S}s", "__range": "60s"}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] != "query":
            found[variable["name"]] = variable.get("current", {}).get("value") or variable.get("query", "")
            continue
        metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
        answer = await lab.query(f"label/{label}/values", **{"match[]": substitute(metric, found)})
        found[variable["name"]] = "|".join(answer["data"])
    return found


def each(target: Target, found: Mapping[str, str]) -> list[str]:
    """The target's queries: one, or one for each panel that Grafana makes of a repeated one."""
    if not target.repeat:
        return [substitute(target.expr, found)]
    return [
        substitute(target.expr, {**found, target.repeat: value}) for value in found[target.repeat].split("|")
    ]


def faults(target: Target, answer: Mapping[str, Any]) -> list[str]:
    """What is wrong with Prometheus's answer to a target; nothing is wrong with one that rightly is empty."""
    if answer["status"] != "success":
        return [f"{target}: {answer['error']}"]
    series = answer["data"]["result"]
    if not series:
        return [] if target.sparse or target.needs in MAY_BE_ABSENT else [f"{target}: no data"]
    said: set[str] = set()
    for one in series:
        said |= {
            f"{target}: no label {name!r} in {one['metric']}"
            for name in (*LEGEND.findall(target.legend), *target.fields)
            if name not in one["metric"]
        }
        if not all(math.isfinite(float(value)) for _, value in one["values"]):
            said.add(f"{target}: not a number, or without end")
    return sorted(said)


async def verdict(lab: Lab, board: Board, begin_s: float, end_s: float) -> list[str]:
    """What is wrong with a board's panels and annotations over these Unix seconds, one line each."""
    dashboard = load(board)
    found = await values(lab, dashboard)
    said: list[str] = [f"{board.name}: ${name} has no choice" for name in REQUIRED if not found.get(name, "")]
    span = {"start": begin_s, "end": end_s, "step": STEP_S}
    for target in targets(board, dashboard):
        for expr in each(target, found):
            said += faults(target, await lab.query("query_range", query=expr, **span))
    for annotation in dashboard["annotations"]["list"]:
        answer = await lab.query("query_range", query=substitute(annotation["expr"], found), **span)
        if answer["status"] != "success":
            said.append(f"{board.name}, annotation {annotation['name']}: {answer['error']}")
        elif annotation["name"] == "Decisions" and not answer["data"]["result"]:
            said.append(f"{board.name}: no decision is annotated")
    return said
