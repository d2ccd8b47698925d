"""One engine rank, as the pilot sees it: which start of it is alive, its newest step, and what that says.

Observing is the only way in: pages come from `Pages`, time from the caller, and the result is plain values.
An engine that is not there yet, died, or started again is a state of the sight, never an exception.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvpilot.adapters.condition import RANK_LOAD, condition
from kvpilot.adapters.pages import Page, Pages
from kvpilot.adapters.ranks import Ranks
from kvpilot.adapters.readings import HISTOGRAM_OF, read_signals
from kvpilot.adapters.valves import Valves, ValveSight, valve_readings
from kvpilot.adapters.windows import Key, Reading
from kvpilot.clock import NS
from kvpilot.link.ending import Ending
from kvpilot.link.histogram import HistogramSnapshot
from kvpilot.link.liveness import STALLED_AFTER_S, Answers, Liveness, classify
from kvpilot.link.manifest import Manifest
from kvpilot.link.page import LinkError
from kvpilot.link.records import StepRecord
from kvpilot.link.requests import EndedRequest
from kvpilot.link.telemetry import ClassRow, TelemetryReader, TenantRow
from kvpilot.link.valve_page import ValveRow
from kvpilot.signals import Missing

RESCAN_NS = NS // 2
"""How often to look for a newer start of the engine."""
MOST_RECORDS = 33
"""Read at one look: a look every tick at steps of 3 ms and more misses none, and one at faster steps sees a
sample of them; the counts in records are cumulative."""


@dataclass(frozen=True, slots=True)
class Ended:
    """An engine start that is over. Without `ending` it said nothing: its process vanished."""

    nonce: int
    ending: Ending | None
    replaced: bool = False
    """It still lives, and a newer start has come beside it."""


@dataclass(frozen=True, slots=True)
class Sight:
    """One look. Without `manifest` there is no engine yet; `waiting_for` then says what is missing."""

    at_ns: int
    waiting_for: str | None = None
    manifest: Manifest | None = None
    nonce: int = 0
    restarted: bool = False
    """True in the first sight of each engine start."""
    before: Ended | None = None
    """With `restarted`: the start that this pilot followed until now, if any."""
    ended: Ended | None = None
    """How this start ended; None while it lives."""
    record: StepRecord | None = None
    records: tuple[StepRecord, ...] = ()
    """What came since the last look, oldest first, the newest `MOST_RECORDS` of it; `record` is the last."""
    rows: tuple[ClassRow, ...] = ()
    """The queues of the engine's classes, lowest first, as far as it tells them."""
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
    before: Ended | None
    """The start that was followed until this one came."""
    record: StepRecord | None = None
    record_ns: int = 0
    """When the pilot first saw `record`."""
    steps: float | None = None
    step_ns: int = 0
    """When the pilot last saw the engine's count of steps change."""
    answers: Answers = field(default_factory=Answers)
    ended: Ended | None = None
    age_at_first_step_s: float | None = None


class EngineAdapter:
    """Follows one rank's telemetry and its engine's valves."""

    def __init__(self, pages: Pages, where: str) -> None:
        self._pages = pages
        self._where = where
        self._valves = Valves(pages)
        self._ranks = Ranks(pages)
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
        records = _read_newest(attached, now_ns)
        liveness = _liveness(attached, valve, now_ns)
        wanted = list(wanted)
        readings = valve_readings(wanted, valve, now_ns)
        if attached.record is not None:
            fresh_ns = now_ns if liveness == "idle" else attached.record_ns
            readings |= read_signals(wanted, attached.reader, attached.record, fresh_ns)
            readings |= self._condition(wanted, attached, liveness, valve is not None, now_ns)
        return Sight(
            at_ns=now_ns,
            manifest=attached.reader.manifest,
            nonce=attached.reader.nonce,
            restarted=restarted,
            before=attached.before if restarted else None,
            ended=attached.ended,
            record=attached.record,
            records=tuple(records),
            rows=attached.reader.classes(),
            liveness=liveness,
            age_s=(attached.age_at_first_step_s or 0.0) + (now_ns - attached.since_ns) / NS,
            readings=readings,
            valve=valve,
        )

    def _condition(
        self, wanted: Iterable[Key], attached: _Attached, liveness: Liveness, valve: bool, now_ns: int
    ) -> dict[Key, Reading | Missing]:
        assert attached.record is not None
        found = condition(attached.record, liveness, (now_ns - attached.record_ns) / NS, valve, now_ns)
        if RANK_LOAD in wanted:
            ratio = self._ranks.load_ratio(attached.record, now_ns)
            found[RANK_LOAD] = ratio if isinstance(ratio, Missing) else Reading(now_ns, ratio)
        return {key: reading for key, reading in found.items() if key in wanted}

    def histogram(self, signal: str, class_index: int | None) -> HistogramSnapshot | None:
        """A distribution since the engine started, for exporters; None where there is none."""
        if self._attached is None or signal not in HISTOGRAM_OF:
            return None
        return self._attached.reader.histogram(HISTOGRAM_OF[signal], class_index)

    def top_tenant(self) -> str | Missing | None:
        """Who holds most KV memory now; None while nobody holds any. O(tenants)."""
        if self._attached is None or "tenants" in self._attached.reader.manifest.unsupported_signals:
            return Missing("not_provided")
        held = [row for row in self._attached.reader.tenants() if row.kv_blocks > 0 and row.name]
        return max(held, key=lambda row: (row.kv_blocks, row.name)).name if held else None

    def tenants(self) -> tuple[TenantRow, ...]:
        """What each tenant holds, for exporters; empty where the engine does not tell. O(tenants)."""
        if self._attached is None or "tenants" in self._attached.reader.manifest.unsupported_signals:
            return ()
        return self._attached.reader.tenants()

    def tenant_counts(self) -> dict[str, dict[str, int]]:
        """What the engine counts by tenant beside that, by column; empty where it counts nothing."""
        return {} if self._attached is None else self._attached.reader.tenant_counts()

    def ended_requests(self) -> list[EndedRequest]:
        """Requests that have ended since the last call; none where the engine does not tell of them."""
        return [] if self._attached is None else self._attached.reader.requests()

    def valve_rows(self) -> list[ValveRow]:
        """What valves have counted, by class and tenant, for exporters."""
        return self._valves.rows()

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
        before = None
        if self._attached is not None:
            before = _ended(self._attached)
            self._attached.page.close()
        self._attached = _Attached(page, reader, now_ns, before, record_ns=now_ns, step_ns=now_ns)
        return True


def _read_newest(attached: _Attached, now_ns: int) -> list[StepRecord]:
    records = attached.reader.poll(limit=MOST_RECORDS)
    if not records:
        return records
    attached.record, attached.record_ns = records[-1], now_ns
    # A record may also tell what moved between steps: an engine that takes requests in and computes none
    # of them is silent all the same.
    steps = records[-1].get("steps_total")
    if steps is None or steps != attached.steps:
        attached.steps, attached.step_ns = steps, now_ns
    if attached.age_at_first_step_s is None:
        attached.age_at_first_step_s = _age_s(attached.reader, records[-1])
        attached.since_ns = now_ns
    return records


def _liveness(attached: _Attached, valve: ValveSight | None, now_ns: int) -> Liveness:
    record, manifest = attached.record, attached.reader.manifest
    running = int(record.get("running") or 0) if record else 0
    waiting = int(record.get("waiting") or 0) if record else 0
    silent_s = (now_ns - attached.step_ns) / NS
    steps = attached.reader.histogram("step") if silent_s > STALLED_AFTER_S else None
    stuck = attached.answers.observe(
        now_ns,
        awaited=valve.awaited if valve else None,
        held=running + waiting if manifest.world.get("dp", 1) == 1 else None,
        finished=int(record.get("finished_total") or 0) if record else 0,
        byte_left=valve.byte_left if valve else False,
    )
    lock_held = attached.page.is_locked()
    if not lock_held and attached.ended is None:
        attached.ended = _ended(attached)
    return classify(
        lock_held=lock_held,
        running=running,
        waiting=waiting,
        seconds_since_step=silent_s,
        p99_step_s=steps.quantile(0.99) if steps else None,
        awaited=(valve.awaited or 0) if valve else 0,
        stuck=stuck,
    )


def _ended(attached: _Attached) -> Ended:
    return Ended(attached.reader.nonce, attached.reader.ending(), replaced=attached.page.is_locked())


def _age_s(reader: TelemetryReader, record: StepRecord) -> float:
    """How old the engine was at this step: by the engine's clock alone."""
    ended_ns = record.get("time_ns")
    return max(0.0, ((ended_ns or 0) - reader.identity.start_monotonic_ns) / NS)
