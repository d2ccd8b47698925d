"""A dashboard: rows of panels, and what all of ours share: variables, annotations, links."""

import json
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from kvboards.palette import BAD, MEASURED
from kvboards.panels import DATASOURCE, Panel, to_grafana

SELECT = 'cluster=~"$cluster", engine=~"$engine", rank=~"$rank"'
"""Which series a panel is about: what the variables at the top of the page say."""
GRID = 24
ROW_HEIGHT = 1
TAG = "kvpilot"

_APPLIED = f'kvpilot_control_decisions_total{{{SELECT}, verdict="applied"}}'
DECISIONS = f"{_APPLIED} > ({_APPLIED} offset 10s or {_APPLIED} * 0)"
"""More decisions than ten seconds ago, or the first: `increase` would miss that one."""
ALERTS = (
    f"sum by (alertname, severity, engine, rank) (kvpilot_alert_firing{{{SELECT}}}) > 0 or "
    'sum by (alertname, severity, engine, rank) (ALERTS{alertname=~"Kvpilot.*", alertstate="firing", '
    'cluster=~"$cluster"}) > 0'
)


TEXTS = {
    "Decisions": "{{policy}} / {{rule}} moved {{knob}} of {{engine}} / {{rank}}",
    "Alerts": "{{alertname}} ({{severity}}) of {{engine}} / {{rank}}",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and its panels, laid out from left to right and wrapped."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice at the top of the page, filled by `label_values(...)`."""

    name: str
    label: str
    query: str
    all: str = ".*"
    """The regular expression of `All`; empty: those that the query finds, so that earlier choices count."""


VARIABLES = (
    Variable("cluster", "Cluster", "label_values(kvpilot_engine_info, cluster)"),
    Variable("model", "Model", 'label_values(kvpilot_engine_info{cluster=~"$cluster"}, model)'),
    Variable(
        "engine",
        "Engine",
        'label_values(kvpilot_engine_info{cluster=~"$cluster", model=~"$model"}, engine)',
        all="",
    ),
    Variable(
        "rank", "Rank", 'label_values(kvpilot_engine_info{cluster=~"$cluster", engine=~"$engine"}, rank)'
    ),
)


@dataclass(frozen=True, slots=True)
class Target:
    """A choice among figures that a histogram has buckets for."""

    name: str
    label: str
    choices: tuple[str, ...]
    default: str


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard; `name` is its file and the end of its uid."""

    name: str
    title: str
    says: str
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...] = ()
    """Beyond the four that all have."""
    targets: tuple[Target, ...] = ()

    @property
    def panels(self) -> tuple[Panel, ...]:
        """In the order of their numbers, which begin at 1."""
        return tuple(panel for row in self.rows for panel in row.panels)


def to_json(board: Board) -> str:
    """The committed file."""
    made = json.loads(json.dumps(_dashboard(board).build(), cls=JSONEncoder))
    for annotation in made["annotations"]["list"]:
        # Fields of the Prometheus data source, which the builder does not know.
        annotation |= {
            "titleFormat": annotation["name"],
            "textFormat": TEXTS[annotation["name"]],
            "step": "1s",
        }
    return json.dumps(made, indent=1, sort_keys=True) + "\n"


def _dashboard(board: Board) -> build.Dashboard:
    made = (
        build.Dashboard(f"kvpilot: {board.title}")
        .uid(f"kvpilot-{board.name}")
        .description(board.says)
        .tags([TAG])
        .readonly()
        .refresh("10s")
        .time("now-30m", "now")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .timezone("browser")
    )
    made = made.with_variable(build.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for variable in (*VARIABLES, *board.variables):
        made = made.with_variable(_choice(variable))
    for target in board.targets:
        made = made.with_variable(
            build.CustomVariable(target.name)
            .label(target.label)
            .values(", ".join(target.choices))
            .current(model.VariableOption(selected=True, text=target.default, value=target.default))
        )
    for name, label, address in (
        ("console", "Console", "http://localhost:9477"),
        ("docs", "Docs", "http://localhost:9477/docs"),
    ):
        made = made.with_variable(
            build.TextBoxVariable(name)
            .label(label)
            .default_value(address)
            .hide(model.VariableHide.HIDE_VARIABLE)
        )
    made = _links(made)
    made = made.annotation(_annotation("Decisions", DECISIONS, MEASURED))
    made = made.annotation(_annotation("Alerts", ALERTS, BAD))
    return _lay_out(made, board)


def _choice(variable: Variable) -> build.QueryVariable:
    made = (
        build.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(DATASOURCE)
        .query({"query": variable.query, "refId": variable.name})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(model.VariableOption(selected=True, text="All", value="$__all"))
    )
    return made.all_value(variable.all) if variable.all else made


def _links(made: build.Dashboard) -> build.Dashboard:
    others = build.DashboardLink("kvpilot").type(model.DashboardLinkType.DASHBOARDS).tags([TAG])
    made = made.link(others.as_dropdown(True).include_vars(True).keep_time(True))
    for title, address in (("Console", "${console}"), ("Runbook", "${docs}/alerts.md")):
        link = build.DashboardLink(title).type(model.DashboardLinkType.LINK).url(address).target_blank(True)
        made = made.link(link)
    return made


def _annotation(name: str, expr: str, color: str) -> build.AnnotationQuery:
    return build.AnnotationQuery().name(name).datasource(DATASOURCE).enable(True).icon_color(color).expr(expr)


def _lay_out(made: build.Dashboard, board: Board) -> build.Dashboard:
    y, number = 0, 1
    for row_number, row in enumerate(board.rows):
        made = made.with_row(
            build.Row(row.title).id(1000 + row_number).grid_pos(model.GridPos(h=1, w=GRID, x=0, y=y))
        )
        y, x, tallest = y + ROW_HEIGHT, 0, 0
        before = ""
        for panel in row.panels:
            # Grafana makes a repeated panel into lines of its own: nothing may lie beside it.
            if x + panel.width > GRID or (x and (panel.repeat or before)):
                x, y, tallest = 0, y + tallest, 0
            at = model.GridPos(h=panel.height, w=panel.width, x=x, y=y)
            made = made.with_panel(to_grafana(panel, number, at))
            x, tallest, number = x + panel.width, max(tallest, panel.height), number + 1
            before = panel.repeat
        y += tallest
    return made
