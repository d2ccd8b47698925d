"""Panels: what a dashboard's page says of one, and how that becomes Grafana's model.

Styles hang on a query and not on a series' name, so that a legend may be reworded without losing its colour.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.models import common as style
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import prometheus as prometheus_model

from kvboards.palette import CAUTION, HELD, MEASURED, REFERENCE

DATASOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
Kind = Literal["lines", "stat", "bars", "table", "states"]
Needs = Literal["", "gpu", "speculation", "judged"]
"""What must be there for a panel to show anything; the live test lets these be empty and no others."""


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression. `legend` in Grafana's `{{label}}` notation; `color` a meaning of the palette."""

    expr: str
    legend: str = ""
    color: str = MEASURED
    width: int = 2
    dash: tuple[int, ...] = ()
    fill: int = 0
    """Percent of opacity under the line."""
    stack: bool = False
    bars: bool = False
    right: bool = False
    """On the right axis, in `unit`."""
    unit: str = ""
    below_to: str = ""
    """Fill down to the query with this legend: a band."""
    sparse: bool = False
    """May rightly have no series (nothing shed yet): the panel must show something else then."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `unit` is Grafana's; sizes are in its grid of 24 columns and rows of 30 pixels."""

    kind: Kind
    title: str
    says: str
    queries: tuple[Query, ...]
    unit: str = "short"
    width: int = 12
    height: int = 8
    least: float | None = None
    most: float | None = None
    decimals: int | None = None
    repeat: str = ""
    needs: Needs = ""
    steps: tuple[tuple[float | None, str], ...] = ()
    """Thresholds: (from here on, colour), the first from None."""
    mapping: tuple[tuple[str, str, str], ...] = ()
    """Values shown as words: (value, word, colour)."""
    columns: tuple[tuple[str, str, str], ...] = ()
    """Of a table, in order: (field, heading, unit)."""
    sort: str = ""
    no_value: str = ""
    soft_most: float | None = None
    """Where the axis ends if no value is higher: else a line at 0 has an axis to 100."""
    log: bool = False
    link: tuple[str, str] | None = None
    """(title, address)."""


def letter(index: int) -> str:
    """Grafana's name for a panel's query number `index`."""
    return chr(ord("A") + index)


def bands(quantiles: Sequence[tuple[str, str]], buckets: str, by: str = "") -> tuple[Query, ...]:
    """p50, p95 and p99 of a histogram as bands: wider, then thinner, then dashed, for eyes without colour.

    `>= 0` leaves out moments in which nothing was observed, whose quantiles are no numbers.
    """

    grouped = f"le, {by}" if by else "le"
    rates = f"sum by ({grouped}) (rate({buckets}[$__rate_interval]))"
    looks = (
        Query("", "p50", MEASURED, width=3),
        Query("", "p95", HELD, width=2, fill=25, below_to="p50"),
        Query("", "p99", CAUTION, width=1, dash=(6, 4), fill=12, below_to="p95"),
    )
    return tuple(
        replace(
            look,
            expr=f"histogram_quantile({quantile}, {rates}) >= 0",
            legend=name,
        )
        for look, (quantile, name) in zip(looks, quantiles, strict=True)
    )


QUANTILES = (("0.5", "p50"), ("0.95", "p95"), ("0.99", "p99"))


def to_grafana(panel: Panel, number: int, at: model.GridPos) -> Any:
    """The SDK's builder of a panel."""
    maker: Any = {
        "lines": _lines,
        "stat": _stat,
        "bars": _bars,
        "table": _table,
        "states": _states,
    }[panel.kind](panel)
    maker = maker.title(panel.title).description(panel.says).id(number).grid_pos(at)
    maker = maker.datasource(DATASOURCE).unit(panel.unit)
    for index, query in enumerate(panel.queries):
        maker = maker.with_target(_target(query, index, panel.kind in ("table", "stat", "bars")))
    if panel.least is not None:
        maker = maker.min(panel.least)
    if panel.most is not None:
        maker = maker.max(panel.most)
    if panel.decimals is not None:
        maker = maker.decimals(panel.decimals)
    if panel.repeat:
        maker = maker.repeat(panel.repeat).repeat_direction("h").max_per_row(24 // panel.width)
    if panel.no_value:
        maker = maker.no_value(panel.no_value)
    if panel.link:
        maker = maker.links([build.DashboardLink(panel.link[0]).url(panel.link[1]).target_blank(True)])
    return maker


def _target(query: Query, index: int, instant: bool) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).ref_id(letter(index)).datasource(DATASOURCE)
    target = target.legend_format(query.legend or "__auto")
    if instant:
        return (
            target.instant().format(prometheus_model.PromQueryFormat.TABLE)
            if not query.legend
            else target.instant()
        )
    return target.range()


def _fixed(color: str) -> Any:
    return build.FieldColor().mode(model.FieldColorModeId.FIXED).fixed_color(color)


def _thresholds(panel: Panel, rest: str) -> Any:
    steps = panel.steps or ((None, rest),)
    return (
        build.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps([model.Threshold(value=value, color=color) for value, color in steps])
    )


def _mappings(panel: Panel) -> list[Any]:
    options = {
        value: model.ValueMappingResult(text=word, color=color, index=index)
        for index, (value, word, color) in enumerate(panel.mapping)
    }
    return [model.ValueMap(options=options)] if options else []


def _lines(panel: Panel) -> Any:
    maker = (
        timeseries.Panel()
        .show_points(style.VisibilityMode.NEVER)
        .span_nulls(False)
        .color_scheme(_fixed(MEASURED))
        .tooltip(
            common.VizTooltipOptions().mode(style.TooltipDisplayMode.MULTI).sort(style.SortOrder.DESCENDING)
        )
        .legend(
            common.VizLegendOptions()
            .show_legend(len(panel.queries) > 1 or "{{" in panel.queries[0].legend)
            .display_mode(style.LegendDisplayMode.LIST)
            .placement(style.LegendPlacement.BOTTOM)
            .calcs([])
        )
    )
    if panel.soft_most is not None:
        maker = maker.axis_soft_max(panel.soft_most)
    if panel.log:
        maker = maker.scale_distribution(
            common.ScaleDistributionConfig().type(style.ScaleDistribution.LOG).log(10)
        )
    if panel.steps:
        maker = maker.thresholds(_thresholds(panel, REFERENCE)).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(style.GraphThresholdsStyleMode.DASHED)
        )
    for index, query in enumerate(panel.queries):
        maker = maker.override_by_query(letter(index), _looks(query))
    return maker


def _looks(query: Query) -> list[model.DynamicConfigValue]:
    """A query's style, as Grafana's overrides of its fields."""
    looks: dict[str, Any] = {
        "color": {"mode": "fixed", "fixedColor": query.color},
        "custom.lineWidth": query.width,
        "custom.fillOpacity": query.fill,
    }
    if query.dash:
        looks["custom.lineStyle"] = {"fill": "dash", "dash": list(query.dash)}
    if query.stack:
        looks["custom.stacking"] = {"mode": "normal", "group": "A"}
    if query.bars:
        looks |= {"custom.drawStyle": "bars", "custom.lineWidth": 0, "custom.fillOpacity": 85}
    if query.right:
        looks["custom.axisPlacement"] = "right"
    if query.unit:
        looks["unit"] = query.unit
    if query.below_to:
        looks["custom.fillBelowTo"] = query.below_to
    return [model.DynamicConfigValue(id_val=name, value=value) for name, value in looks.items()]


def _stat(panel: Panel) -> Any:
    return (
        stat.Panel()
        .thresholds(_thresholds(panel, MEASURED))
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .mappings(_mappings(panel))
        .graph_mode(style.BigValueGraphMode.NONE)
        .color_mode(style.BigValueColorMode.VALUE)
        .text_mode(
            style.BigValueTextMode.VALUE_AND_NAME if len(panel.queries) > 1 else style.BigValueTextMode.VALUE
        )
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )


def _bars(panel: Panel) -> Any:
    return (
        bargauge.Panel()
        .display_mode(style.BarGaugeDisplayMode.BASIC)
        .orientation(style.VizOrientation.HORIZONTAL)
        .value_mode(style.BarGaugeValueMode.TEXT)
        .thresholds(_thresholds(panel, panel.queries[0].color))
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .show_unfilled(True)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )


def _table(panel: Panel) -> Any:
    """One row for each set of labels, one column for each query: a join on labels, then names and units."""
    names = {name: heading for name, heading, _ in panel.columns}
    order = {name: index for index, (name, _, _) in enumerate(panel.columns)}
    joined = ["Time", *(f"Time {index + 1}" for index in range(len(panel.queries)))]
    maker = (
        table.Panel()
        .min_width(80)
        .with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
    )
    maker = maker.with_transformation(
        model.DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": dict.fromkeys(joined, True),
                "indexByName": order,
                "renameByName": names,
            },
        )
    )
    for _, heading, unit in panel.columns:
        if unit:
            maker = maker.override_by_name(heading, [model.DynamicConfigValue(id_val="unit", value=unit)])
    if panel.sort:
        maker = maker.sort_by([common.TableSortByFieldState().display_name(panel.sort).desc(True)])
    return maker


def _states(panel: Panel) -> Any:
    return (
        statetimeline.Panel()
        .mappings(_mappings(panel))
        .show_value(style.VisibilityMode.AUTO)
        .merge_values(True)
        .row_height(0.85)
        .fill_opacity(85)
        .line_width(0)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(style.LegendDisplayMode.LIST)
            .placement(style.LegendPlacement.BOTTOM)
            .calcs([])
        )
    )


__all__ = ["QUANTILES", "Panel", "Query", "bands", "letter", "to_grafana"]
