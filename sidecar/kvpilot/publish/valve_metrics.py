"""Prometheus: what the valves say of themselves, as sums over their processes."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvpilot.adapters.valves import ValveSight
from kvpilot.journal.records import format_scope


def valve_metrics(engine: str, valve: ValveSight) -> Iterator[Metric]:
    """Metrics of the valves beside `engine`."""
    processes = GaugeMetricFamily(
        "kvpilot_valve_processes",
        "Valves that live: they write their page, or they are silent.",
        labels=["engine", "state"],
    )
    processes.add_metric([engine, "writing"], valve.processes - valve.silent)
    processes.add_metric([engine, "silent"], valve.silent)
    yield processes
    shed = CounterMetricFamily(
        "kvpilot_valve_shed",
        "Requests turned away, by why: a fraction, no credits left, or the server is shutting down.",
        labels=["engine", "class", "reason"],
    )
    for (class_name, why), count in valve.shed_by.items():
        shed.add_metric([engine, class_name, why], count)
    yield shed
    left = GaugeMetricFamily(
        "kvpilot_valve_credits_left_tokens",
        "Prompt tokens that may still be accepted until the next tick; absent without a limit.",
        labels=["engine", "class"],
    )
    for class_name, tokens in valve.credits_left.items():
        left.add_metric([engine, class_name], tokens)
    yield left
    obeyed = GaugeMetricFamily(
        "kvpilot_valve_lease_value",
        "Value of a lease that every valve obeys, by its own word.",
        labels=["engine", "knob", "scope"],
    )
    for (knob, scope), value in valve.obeyed.items():
        obeyed.add_metric([engine, knob, format_scope(scope)], value)
    yield obeyed
