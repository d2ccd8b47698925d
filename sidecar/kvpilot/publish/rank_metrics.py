"""Metrics of one engine rank: every signal, whether it is there, the step record's other fields, tenants."""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal

from prometheus_client.core import Exemplar

from kvpilot.adapters.other_ranks import RankView
from kvpilot.adapters.windows import Reading
from kvpilot.clock import NS
from kvpilot.link.histogram import HistogramSnapshot
from kvpilot.link.telemetry import TenantRow
from kvpilot.link.valve_page import ValveRow
from kvpilot.publish.buckets import distribution
from kvpilot.publish.exemplars import Exemplars, Told
from kvpilot.publish.families import FIELD_FAMILIES, SIGNAL_FAMILIES, TENANT_COUNTS
from kvpilot.publish.sheet import Sheet
from kvpilot.publish.tenant_names import Counted, TenantNames
from kvpilot.publish.traces import trace_id
from kvpilot.signals import SIGNALS, Missing, Signal

_NAMES = {name: family.name.removeprefix("kvpilot_") for name, family in SIGNAL_FAMILIES.items()}
_FIELD_NAMES = {field: family.name.removeprefix("kvpilot_") for field, family in FIELD_FAMILIES.items()}
_NOTHING = Missing("no_samples")

Extent = Literal["own", "own_without_valves", "other"]
_PROVIDERS: dict[Extent, tuple[str, ...]] = {
    "own": ("engine", "valve", "pilot"),
    "own_without_valves": ("engine", "pilot"),
    "other": ("engine",),
}
"""Whose signals are shown of the rank that this pilot flies, and of others."""


class RankMetrics:
    """Of one engine; `own` tells the rank that this pilot flies. `traced`: exemplars name traces too."""

    def __init__(self, exemplars: Exemplars, traced: bool) -> None:
        self._exemplars = exemplars
        self._traced = traced

    def add(self, sheet: Sheet, view: RankView, now_ns: int, extent: Extent) -> None:
        """Everything about one rank that has an engine."""
        self._add_engine(sheet, view)
        ages_s = _ages_s(view, now_ns)
        for signal in SIGNALS.values():
            if signal.provider in _PROVIDERS[extent]:
                self._add_signal(sheet, signal, view, ages_s.get(signal.name), extent != "other")
        record, manifest = view.sight.record, view.sight.manifest
        assert manifest is not None
        for field, name in _FIELD_NAMES.items():
            value = record.get(field) if record is not None else None
            if value is not None and field not in manifest.unsupported_signals:
                sheet.add(name, value, rank=view.rank)

    def _add_engine(self, sheet: Sheet, view: RankView) -> None:
        manifest, rank = view.sight.manifest, view.rank
        assert manifest is not None
        sheet.add(
            "engine_info",
            1.0,
            *(manifest.engine, manifest.engine_version, manifest.model, manifest.device),
            rank=rank,
        )
        for state in ("waiting", "dead", "idle", "live", "stalled", "wedged"):
            sheet.add("engine_state", float(state == view.sight.liveness), state, rank=rank)
        sheet.add("engine_age_seconds", view.sight.age_s, rank=rank)
        sheet.add("kv_pool_blocks", manifest.blocks, rank=rank)
        sheet.add("kv_block_tokens", manifest.block_size, rank=rank)
        sheet.add("kv_block_bytes", manifest.bytes_per_block, rank=rank)

    def _add_signal(
        self, sheet: Sheet, signal: Signal, view: RankView, age_s: float | None, own: bool
    ) -> None:
        manifest = view.sight.manifest
        assert manifest is not None
        levels: Iterable[str | None] = manifest.classes if signal.per_class and manifest.classes else (None,)
        why: Missing | None = None
        for index, level in enumerate(levels):
            labels = () if not signal.per_class else (level or "",)
            if signal.kind == "distribution":
                why = self._add_distribution(sheet, signal.name, view, level, index, labels, own)
                continue
            value = _value(signal, view, level)
            if isinstance(value, Missing):
                why = value
            else:
                sheet.add(_NAMES[signal.name], value, *labels, rank=view.rank)
        # Whether it is there is told of the signal as a whole: that of its last class, where it has classes.
        sheet.add("signal_available", float(why is None), signal.name, rank=view.rank)
        if why is not None:
            sheet.add("signal_missing", 1.0, signal.name, why.reason, rank=view.rank)
        if age_s is None and why is not None:
            age_s = why.age_s
        if age_s is not None:
            sheet.add("signal_age_seconds", age_s, signal.name, rank=view.rank)

    def _add_distribution(
        self,
        sheet: Sheet,
        signal: str,
        view: RankView,
        level: str | None,
        index: int,
        labels: tuple[str, ...],
        own: bool,
    ) -> Missing | None:
        reading = view.readings.get((signal, level))
        if isinstance(reading, Missing):
            return reading
        snapshot = reading.value if isinstance(reading, Reading) else None
        if snapshot is None:
            snapshot = view.histogram(signal, None if level is None else index)
        if not isinstance(snapshot, HistogramSnapshot):
            return _NOTHING
        told = self._exemplars.of(signal, level) if own else {}
        exemplars = {bound: self._exemplar(sheet, each, view.rank) for bound, each in told.items()}
        sheet.add_distribution(_NAMES[signal], distribution(snapshot, exemplars), *labels, rank=view.rank)
        return None

    def _exemplar(self, sheet: Sheet, told: Told, rank: int) -> Exemplar:
        labels = {"decision": str(told.number)}
        if self._traced:
            trace = trace_id(sheet.engine, rank, told.nonce, told.number)
            labels["trace_id"] = f"{trace:032x}"
        return Exemplar(labels, told.value_s, round(told.wall_ns / NS, 3))


def _value(signal: Signal, view: RankView, level: str | None) -> float | Missing:
    """A gauge's or ratio's value as people are shown it; of a counter the newest count."""
    if signal.kind != "counter":
        return view.shown.get((signal.name, level), _NOTHING)
    reading = view.readings.get((signal.name, level), _NOTHING)
    if isinstance(reading, Missing):
        return reading
    return reading.value if isinstance(reading.value, float | int) else _NOTHING


def _ages_s(view: RankView, now_ns: int) -> dict[str, float]:
    """Seconds since the newest look at each signal, of any class."""
    newest: dict[str, int] = {}
    for (name, _), reading in view.readings.items():
        if isinstance(reading, Reading) and reading.at_ns > newest.get(name, -1):
            newest[name] = reading.at_ns
    return {name: max(0.0, (now_ns - at_ns) / NS) for name, at_ns in newest.items()}


class TenantMetrics:
    """Metrics by tenant, of one rank or of the valves. Bounded; see `tenant_names`."""

    def __init__(self) -> None:
        self._names = TenantNames()
        self._counted: dict[str, Counted] = {}

    def add_rows(
        self,
        sheet: Sheet,
        rows: Iterable[TenantRow],
        rank: int,
        counts: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    ) -> None:
        """What tenants hold in one rank, and what is counted of those that have a row there."""
        rows = list(rows)
        self._names.rank({row.name: row.kv_blocks + 1e-12 * row.tokens_total for row in rows})
        held: dict[str, tuple[int, int, int]] = {}
        for row in rows:
            label = self._names.label(row.name)
            running, waiting, blocks = held.get(label, (0, 0, 0))
            held[label] = (running + row.running, waiting + row.waiting, blocks + row.kv_blocks)
        for label, (running, waiting, blocks) in held.items():
            sheet.add("tenant_running", running, label, rank=rank)
            sheet.add("tenant_waiting", waiting, label, rank=rank)
            sheet.add("tenant_kv_blocks", blocks, label, rank=rank)
        self._count(
            sheet, "tenant_kv_block_seconds", {row.name: row.block_ns_total / NS for row in rows}, rank
        )
        self._count(sheet, "tenant_tokens", {row.name: row.tokens_total for row in rows}, rank)
        for column, family in TENANT_COUNTS.items():
            totals = {row.name: counts.get(row.name, {}).get(column) for row in rows}
            known = {name: float(total) for name, total in totals.items() if total is not None}
            if known:
                self._count(sheet, family, known, rank)

    def add_valve_rows(self, sheet: Sheet, rows: Iterable[ValveRow]) -> None:
        """What tenants asked of the valves."""
        totals: dict[str, dict[str, float]] = {"offered": {}, "admitted": {}, "shed": {}}
        for row in rows:
            for what, by_tenant in totals.items():
                by_tenant[row.tenant] = by_tenant.get(row.tenant, 0) + getattr(row, what)
        self._names.rank(totals["offered"])
        for what, by_tenant in totals.items():
            self._count(sheet, f"tenant_{what}", by_tenant, None)

    def _count(self, sheet: Sheet, name: str, totals: Mapping[str, float], rank: int | None) -> None:
        counted = self._counted.setdefault(name, Counted())
        for label, total in counted.add(totals, self._names).items():
            if math.isfinite(total):
                sheet.add(name, total, label, rank=rank)
