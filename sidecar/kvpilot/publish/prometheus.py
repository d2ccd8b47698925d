"""Prometheus: every signal of the catalogue and the pilot's own workings, rendered when somebody scrapes.

A signal that is missing is absent from the page, never 0. Names come from the catalogue: `kvpilot_` + signal
+ unit where the name does not end in it, `_total` for counters, no colons. `RENAMED` holds the few that have
a name of their own in the field. Distributions are cumulative histograms since the engine started. A pilot of
a rank other than 0 labels everything with it.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from kvpilot.adapters.windows import Reading
from kvpilot.clock import NS
from kvpilot.flight import Flight
from kvpilot.journal.records import format_scope
from kvpilot.link.histogram import BUCKETS, HistogramSnapshot, bucket_bounds_ns
from kvpilot.policy.state import Phase
from kvpilot.publish.board import Tick
from kvpilot.publish.durations import Durations
from kvpilot.publish.effect_metrics import effect_metrics
from kvpilot.publish.valve_metrics import valve_metrics
from kvpilot.signals import SIGNALS, Missing, Signal
from kvpilot.version import version

RENAMED = {
    "itl_seconds": "inter_token_latency_seconds",
    "ttft_seconds": "time_to_first_token_seconds",
    "step_seconds": "step_duration_seconds",
    "kv_occupancy": "kv_used_ratio",
    "forecast.kv_exhaustion_seconds": "kv_time_to_exhaustion_seconds",
}
_UNIT_SUFFIXES = ("seconds", "bytes", "ratio")

BUCKETS_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0),
)
"""Upper bounds of exported buckets. The page's own buckets are 3 % wide: each goes where its middle lies."""


def metric_name(signal: Signal) -> str:
    """The exported name, without the suffixes that the exposition format adds by itself."""
    name = RENAMED.get(signal.name, signal.name.replace(".", "_"))
    if signal.unit in _UNIT_SUFFIXES and not name.endswith(f"_{signal.unit}"):
        name += f"_{signal.unit}"
    return f"kvpilot_{name}"


class PilotCollector:
    """Collects from the board; to be registered in a registry of the caller's own."""

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self._engine_name = flight.engine_name
        self._board = flight.pilot.board

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not render."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Everything, now."""
        rank = self._flight.rank
        for family in self._families():
            for sample in family.samples if rank else ():
                sample.labels["rank"] = str(rank)
            yield family

    def _families(self) -> Iterator[Metric]:
        yield InfoMetricFamily("kvpilot_build", "This kvpilot.", value={"version": version()})
        yield from self._pilot()
        tick = self._board.tick
        if tick is None or tick.sight.manifest is None:
            return
        yield from self._signals(tick)
        yield from self._control(tick)

    def _signals(self, tick: Tick) -> Iterator[Metric]:
        values = {(view.signal, view.klass): value for view, value in self._board.values()}
        classes = tick.sight.manifest.classes if tick.sight.manifest else ()
        for signal in SIGNALS.values():
            levels: Sequence[str | None] = classes if signal.per_class and classes else (None,)
            if signal.kind == "distribution":
                yield from self._distribution(signal, levels)
            elif signal.kind == "counter":
                yield from self._counter(signal, levels)
            else:
                yield from self._gauge(signal, levels, values)

    def _gauge(
        self,
        signal: Signal,
        levels: Sequence[str | None],
        values: dict[tuple[str, str | None], float | Missing],
    ) -> Iterator[Metric]:
        family = GaugeMetricFamily(metric_name(signal), signal.meaning, labels=self._labels(levels))
        for level in levels:
            value = values.get((signal.name, level))
            if isinstance(value, float | int):
                family.add_metric(self._label_values(level), value)
        if family.samples:
            yield family

    def _counter(self, signal: Signal, levels: Sequence[str | None]) -> Iterator[Metric]:
        family = CounterMetricFamily(metric_name(signal), signal.meaning, labels=self._labels(levels))
        for level in levels:
            reading = self._board.latest.get((signal.name, level))
            if isinstance(reading, Reading) and isinstance(reading.value, float | int):
                family.add_metric(self._label_values(level), reading.value)
        if family.samples:
            yield family

    def _distribution(self, signal: Signal, levels: Sequence[str | None]) -> Iterator[Metric]:
        family = HistogramMetricFamily(metric_name(signal), signal.meaning, labels=self._labels(levels))
        for index, level in enumerate(levels):
            snapshot = self._flight.pilot.engine.histogram(signal.name, None if level is None else index)
            if snapshot is not None:
                family.add_metric(self._label_values(level), _buckets(snapshot), snapshot.sum_ns / NS)
        if family.samples:
            yield family

    def _labels(self, levels: Sequence[str | None]) -> list[str]:
        return ["engine", "class"] if levels[0] is not None else ["engine"]

    def _label_values(self, level: str | None) -> list[str]:
        return [self._engine_name] if level is None else [self._engine_name, level]

    def _control(self, tick: Tick) -> Iterator[Metric]:
        """Knobs, leases and rules as of the last tick."""
        yield from self._knobs(tick)
        remaining = GaugeMetricFamily(
            "kvpilot_lease_remaining_seconds",
            "How long the engine would keep a lease without another renewal.",
            labels=["engine", "knob", "scope"],
        )
        for lease in tick.leases:
            labels = [self._engine_name, lease.knob, format_scope(lease.scope)]
            remaining.add_metric(labels, lease.ttl_ns / NS)
        yield remaining
        states = GaugeMetricFamily(
            "kvpilot_rule_state", "1 for the state a rule is in.", labels=["policy", "rule", "state"]
        )
        for (policy, rule), state in tick.outcome.state.rules.items() if tick.outcome else ():
            for phase in Phase:
                states.add_metric([policy, rule, phase.value], float(state.phase is phase))
        yield states
        ages = GaugeMetricFamily(
            "kvpilot_signal_age_seconds", "Since a signal was last known to be so.", labels=["signal"]
        )
        for (name, klass), reading in self._board.latest.items():
            if klass is None and isinstance(reading, Reading):
                ages.add_metric([name], max(0.0, (tick.at_ns - reading.at_ns) / NS))
        yield ages

    def _knobs(self, tick: Tick) -> Iterator[Metric]:
        labels = ["engine", "knob"]
        value = GaugeMetricFamily(
            "kvpilot_knob_value", "Value in force, as the engine echoes it.", labels=labels
        )
        limits = {
            part: GaugeMetricFamily(f"kvpilot_knob_{part}", f"The knob's {meaning}.", labels=labels)
            for part, meaning in (("baseline", "baseline"), ("min", "minimum"), ("max", "maximum"))
        }
        for knob in tick.context.knobs.values() if tick.context else ():
            names = [self._engine_name, knob.name]
            echo = tick.sight.record.get(f"knob.{knob.name}") if tick.sight.record else None
            if echo is not None:
                value.add_metric(names, echo)
            limits["baseline"].add_metric(names, knob.baseline)
            limits["min"].add_metric(names, knob.minimum)
            limits["max"].add_metric(names, knob.maximum)
        yield value
        yield from limits.values()

    def _engine(self, tick: Tick | None) -> Iterator[Metric]:
        """What the engine is in, and what a person should hear of it; there also without an engine."""
        states = GaugeMetricFamily(
            "kvpilot_engine_state", "1 for the engine's state.", labels=["engine", "state"]
        )
        now = tick.sight.liveness if tick and tick.sight.manifest else "waiting"
        for state in ("waiting", "dead", "idle", "live", "stalled", "wedged"):
            states.add_metric([self._engine_name, state], float(state == now))
        yield states
        watch = self._flight.pilot.watch
        restarts = CounterMetricFamily(
            "kvpilot_engine_restarts", "Starts of the engine that followed another one.", labels=["engine"]
        )
        restarts.add_metric([self._engine_name], watch.restarts)
        yield restarts
        alarms = GaugeMetricFamily(
            "kvpilot_alert_firing", "1 for an alert that fires.", labels=["engine", "alertname", "severity"]
        )
        for alarm in watch.firing.values():
            alarms.add_metric([self._engine_name, alarm.name, alarm.severity], 1.0)
        yield alarms
        if tick is not None and tick.sight.valve is not None:
            yield from valve_metrics(self._engine_name, tick.sight.valve)

    def _pilot(self) -> Iterator[Metric]:
        """The pilot's own workings; there also without an engine."""
        board, tick = self._board, self._board.tick
        yield _single("kvpilot_control_ticks", "Ticks flown.", board.ticks, counter=True)
        yield _single(
            "kvpilot_control_ticks_missed", "Ticks whose time passed unused.", board.missed, counter=True
        )
        yield _single(
            "kvpilot_control_ticks_failed", "Ticks that a defect ended.", board.failures, counter=True
        )
        yield _durations("kvpilot_control_tick_duration_seconds", "What a tick took.", board.durations)
        yield _durations("kvpilot_control_tick_lateness_seconds", "How late a tick began.", board.lateness)
        yield _single("kvpilot_control_armed", "1 when rules may act.", float(bool(tick and tick.armed)))
        yield _single(
            "kvpilot_control_off", "1 while a person holds the pilot off.", float(bool(tick and tick.off))
        )
        yield from self._engine(tick)
        directory = self._flight.directory
        yield _single("kvpilot_policy_load_success", "1 if the last load was taken.", float(directory.good))
        taken_s = directory.taken_wall_ns / NS
        yield _single("kvpilot_policy_last_reload_timestamp_seconds", "When a set was last taken.", taken_s)
        decisions = CounterMetricFamily(
            "kvpilot_control_decisions", "Decisions.", labels=["policy", "rule", "knob", "verdict"]
        )
        for names, count in self._flight.pilot.ledger.counts.items():
            decisions.add_metric(list(names), count)
        yield decisions
        yield from effect_metrics(self._flight.pilot.ledger)
        yield _single(
            "kvpilot_control_unconfirmed",
            "Changes without an echo yet.",
            len(self._flight.pilot.actuator.unconfirmed),
        )
        sent = CounterMetricFamily(
            "kvpilot_webhook_deliveries", "Alerts sent or given up.", labels=["receiver", "outcome"]
        )
        for (receiver, outcome), count in self._flight.outbox.outcomes.items():
            sent.add_metric([receiver, outcome], count)
        yield sent
        yield _single(
            "kvpilot_webhook_queue_length", "Alerts waiting to be sent.", self._flight.outbox.waiting
        )
        yield _single("kvpilot_journal_lost", "Journal rows lost.", self._flight.journal.lost, counter=True)


def _single(name: str, meaning: str, value: float, *, counter: bool = False) -> Metric:
    family = (CounterMetricFamily if counter else GaugeMetricFamily)(name, meaning, labels=[])
    family.add_metric([], value)
    return family


def _durations(name: str, meaning: str, durations: Durations) -> Metric:
    family = HistogramMetricFamily(name, meaning, labels=[])
    family.add_metric([], durations.buckets(), durations.sum_s)
    return family


def _bound_of(index: int) -> int:
    """Which exported bucket the page's bucket `index` belongs to."""
    low, high = bucket_bounds_ns(index)
    return bisect_left(BUCKETS_S, (low + high) / 2 / NS)


_BOUND_OF = tuple(map(_bound_of, range(BUCKETS)))


def _buckets(snapshot: HistogramSnapshot) -> list[tuple[str, float]]:
    """Cumulative counts at BUCKETS_S and infinity."""
    counts = [0] * (len(BUCKETS_S) + 1)
    for bound, count in zip(_BOUND_OF, snapshot.counts, strict=True):
        counts[bound] += count
    buckets, seen = [], 0
    for name, count in zip([*map(str, BUCKETS_S), "+Inf"], counts, strict=True):
        seen += count
        buckets.append((name, float(seen)))
    return buckets
