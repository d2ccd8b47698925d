"""One engine rank, as the pilot sees it: which start of it is alive, its newest step, and what that says.

Observing is the only way in: pages come from `Pages`, time from the caller, and the result is plain values.
An engine that is not there yet, died, or started again is a state of the sight, never an exception.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvpilot.adapters.pages import Page, Pages
from kvpilot.adapters.readings import HISTOGRAM_OF, read_signals
from kvpilot.adapters.valves import Valves, ValveSight, valve_readings
from kvpilot.adapters.windows import Key, Reading
from kvpilot.clock import NS
from kvpilot.link.histogram import HistogramSnapshot
from kvpilot.link.liveness import STALLED_AFTER_S, Liveness, classify
from kvpilot.link.manifest import Manifest
from kvpilot.link.page import LinkError
from kvpilot.link.records import StepRecord
from kvpilot.link.telemetry import TelemetryReader
from kvpilot.signals import Missing

RESCAN_NS = NS // 2
"""How often to look for a newer start of the engine."""


@dataclass(frozen=True, slots=True)
class Sight:
    """One look. Without `manifest` there is no engine yet; `waiting_for` then says what is missing."""

    at_ns: int
    waiting_for: str | None = None
    manifest: Manifest | None = None
    nonce: int = 0
    restarted: bool = False
    """True in the first sight of each engine start."""
    record: StepRecord | None = None
    liveness: Liveness = "dead"
    age_s: float = 0.0
    """How long this engine start has run, by its own clock until the pilot came."""
    readings: dict[Key, Reading | Missing] = field(default_factory=dict)
    valve: ValveSight | None = None


@dataclass(slots=True)
class _Attached:
    """The page of one engine start that is being read."""

    page: Page
    reader: TelemetryReader
    since_ns: int
    record: StepRecord | None = None
    record_ns: int = 0
    """When the pilot first saw `record`."""
    age_at_first_step_s: float | None = None


class EngineAdapter:
    """Follows one rank's telemetry and its engine's valves."""

    def __init__(self, pages: Pages, where: str) -> None:
        self._pages = pages
        self._where = where
        self._valves = Valves(pages)
        self._attached: _Attached | None = None
        self._rescan_ns: int | None = None
        self._error: str | None = None

    def observe(self, now_ns: int, wanted: Iterable[Key]) -> Sight:
        """Look once; reads what `wanted` needs."""
        restarted = self._follow(now_ns)
        valve = self._valves.observe(now_ns)
        attached = self._attached
        if attached is None:
            return Sight(now_ns, waiting_for=self._error or f"no engine writes to {self._where}", valve=valve)
        records = attached.reader.poll(limit=1)
        if records:
            attached.record, attached.record_ns = records[-1], now_ns
            if attached.age_at_first_step_s is None:
                attached.age_at_first_step_s = _age_s(attached.reader, records[-1])
                attached.since_ns = now_ns
        liveness = self._liveness(attached, valve, now_ns)
        wanted = list(wanted)
        readings = valve_readings(wanted, valve, now_ns)
        if attached.record is not None:
            fresh_ns = now_ns if liveness == "idle" else attached.record_ns
            readings |= read_signals(wanted, attached.reader, attached.record, fresh_ns)
        return Sight(
            at_ns=now_ns,
            manifest=attached.reader.manifest,
            nonce=attached.reader.nonce,
            restarted=restarted,
            record=attached.record,
            liveness=liveness,
            age_s=(attached.age_at_first_step_s or 0.0) + (now_ns - attached.since_ns) / NS,
            readings=readings,
            valve=valve,
        )

    def histogram(self, signal: str, class_index: int | None) -> HistogramSnapshot | None:
        """A distribution since the engine started, for exporters; None where there is none."""
        if self._attached is None or signal not in HISTOGRAM_OF:
            return None
        return self._attached.reader.histogram(HISTOGRAM_OF[signal], class_index)

    def close(self) -> None:
        """Let go of all pages."""
        self._valves.close()
        if self._attached is not None:
            self._attached.page.close()
            self._attached = None

    def _follow(self, now_ns: int) -> bool:
        """Turn to a newer start of the engine, if there is one. True when that happened."""
        if self._rescan_ns is not None and now_ns < self._rescan_ns:
            return False
        self._rescan_ns = now_ns + RESCAN_NS
        try:
            page = self._pages.telemetry()
            self._error = None
            if page is None:
                return False
            if self._attached is not None and page.header.nonce == self._attached.reader.nonce:
                page.close()
                return False
            try:
                reader = TelemetryReader(page.read_at)
            except LinkError:
                page.close()
                raise
        except LinkError as error:
            self._error = str(error)
            return False
        if self._attached is not None:
            self._attached.page.close()
        self._attached = _Attached(page, reader, now_ns, record_ns=now_ns)
        return True

    def _liveness(self, attached: _Attached, valve: ValveSight | None, now_ns: int) -> Liveness:
        record = attached.record
        silent_s = (now_ns - attached.record_ns) / NS
        steps = attached.reader.histogram("step") if silent_s > STALLED_AFTER_S else None
        return classify(
            lock_held=attached.page.is_locked(),
            running=int(record.get("running") or 0) if record else 0,
            waiting=int(record.get("waiting") or 0) if record else 0,
            seconds_since_step=silent_s,
            p99_step_s=steps.quantile(0.99) if steps else None,
            in_flight=valve.in_flight if valve else 0,
            seconds_since_byte=valve.seconds_since_byte if valve else None,
        )


def _age_s(reader: TelemetryReader, record: StepRecord) -> float:
    """How old the engine was at this step: by the engine's clock alone."""
    ended_ns = record.get("time_ns")
    return max(0.0, ((ended_ns or 0) - reader.identity.start_monotonic_ns) / NS)
