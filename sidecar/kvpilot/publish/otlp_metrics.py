"""The metrics page as OTLP: the same families under the same names, cumulative.

With `genai` also what the GenAI semantic conventions call a server's time to first token. Their other two
figures, a request's duration and its mean time per output token, engines do not tell; the gap between two
tokens (`kvpilot_inter_token_latency_seconds`) is neither and is not passed off as one.
"""

from collections.abc import Iterable, Mapping, Sequence

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource

from kvpilot.publish.collected import Collected, Distribution
from kvpilot.publish.families import Family
from kvpilot.publish.otlp_spans import SCOPE

_UNITS = {"seconds": "s", "bytes": "By", "ratio": "1", "watts": "W", "joules": "J", "hertz": "Hz"}
_PILOTS = ("The pilot", "Policies and decisions")
_TTFT = "kvpilot_time_to_first_token_seconds"
_CUMULATIVE = AggregationTemporality.CUMULATIVE


class MetricsMaker:
    """Makes one request's data. `started_wall_ns` is when the pilot's own counters began."""

    def __init__(self, resource: Resource, started_wall_ns: int, genai: bool) -> None:
        self._resource = resource
        self._started_wall_ns = started_wall_ns
        self._genai = genai

    def __call__(
        self,
        collected: Iterable[Collected],
        wall_ns: int,
        engine_started_wall_ns: int | None,
        model: str | None,
        provider: str | None,
    ) -> MetricsData:
        """All families as of `wall_ns`."""
        metrics = []
        for each in collected:
            pilots = each.family.room in _PILOTS or engine_started_wall_ns is None
            start_ns = self._started_wall_ns if pilots else engine_started_wall_ns
            metrics.append(_metric(each, start_ns or self._started_wall_ns, wall_ns))
            if self._genai and each.family.name == _TTFT and model is not None:
                metrics.append(
                    _time_to_first_token(each, start_ns or 0, wall_ns, model, provider or "kvpilot")
                )
        scoped = ScopeMetrics(SCOPE, metrics, "")
        return MetricsData([ResourceMetrics(self._resource, [scoped], "")])


def _metric(each: Collected, start_ns: int, wall_ns: int) -> Metric:
    family = each.family
    data: Gauge | Sum | Histogram
    if family.kind == "histogram":
        points = [
            _point(found, dict(zip(family.labels, labels, strict=True)), start_ns, wall_ns)
            for labels, found in each.distributions
        ]
        data = Histogram(points, _CUMULATIVE)
    else:
        numbers = [
            NumberDataPoint(dict(zip(family.labels, labels, strict=True)), start_ns, wall_ns, value)
            for labels, value in each.samples
        ]
        data = Sum(numbers, _CUMULATIVE, True) if family.kind == "counter" else Gauge(numbers)
    return Metric(family.name, family.meaning, _unit(family), data)


def _unit(family: Family) -> str:
    return _UNITS.get(family.name.rsplit("_", 1)[-1], "1")


def _point(
    found: Distribution, attributes: Mapping[str, str], start_ns: int, wall_ns: int
) -> HistogramDataPoint:
    counts = _apart(found.counts)
    total = sum(counts)
    # Not told by the page: the exporter leaves them out where they are infinite.
    least, most = float("inf"), float("-inf")
    return HistogramDataPoint(
        attributes, start_ns, wall_ns, total, found.sum, counts, list(found.bounds), least, most
    )


def _apart(cumulative: Sequence[float]) -> list[int]:
    before, counts = 0, []
    for count in cumulative:
        counts.append(int(count) - before)
        before = int(count)
    return counts


def _time_to_first_token(each: Collected, start_ns: int, wall_ns: int, model: str, provider: str) -> Metric:
    """Of all classes, by the conventions' name and attributes. An engine does not know whether a client
    asked for a chat: it completes text.
    """
    said = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": model,
    }
    points = [
        _point(found, {**said, **dict(zip(each.family.labels, labels, strict=True))}, start_ns, wall_ns)
        for labels, found in each.distributions
    ]
    meaning = "Request received to its first token, as the engine measures it."
    return Metric("gen_ai.server.time_to_first_token", meaning, "s", Histogram(points, _CUMULATIVE))
