"""What goes wrong in a run besides load: lost fields, telemetry that stands still, memory that is not there.

Plain values, and the two places where they enter: between an engine's page and its pilot, and between a step
and the device's memory. Neither engine nor pilot knows that there are such things.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvpilot.adapters.engine import EngineAdapter, Sight
from kvpilot.adapters.pages import Page, Pages
from kvpilot.adapters.readings import read_signals
from kvpilot.adapters.windows import Key
from kvpilot.link.page import PageHeader
from kvpilot.link.records import StepRecord
from kvpilot.simulate.pages import MemoryPage, MemoryPages

FaultKind = Literal["signal_missing", "telemetry_frozen", "neighbour_memory", "fragmentation", "score_memory"]
"""signal_missing    records lack the fields of `signals`
telemetry_frozen  the engine's page stays as it was: nothing in it moves, its age grows
neighbour_memory  `value` is the share of the steps' headroom that somebody else takes; it shows as not free
fragmentation     `value` is the share of free memory that no allocation can use; it shows as free
score_memory      `value` bytes for each (prompt token, position) pair while a chunk is computed
"""
SHARES = ("neighbour_memory", "fragmentation")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong from `at_s` on, for `for_s` seconds of the run. Raises ValueError."""

    kind: FaultKind
    at_s: float
    for_s: float
    value: float = 0.0
    signals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.at_s < 0 or not self.for_s > 0:
            raise ValueError(
                f"{self.kind}: at_s={self.at_s}, for_s={self.for_s}: must not lie before the run"
            )
        if bool(self.signals) != (self.kind == "signal_missing"):
            raise ValueError(f"{self.kind}: names of fields belong to signal_missing, and to nothing else")
        if self.kind in SHARES and not 0 < self.value < 1:
            raise ValueError(f"{self.kind}: value={self.value}: a share, above 0 and below 1")

    def active(self, now_s: float) -> bool:
        return self.at_s <= now_s < self.at_s + self.for_s


Now = Callable[[], float]
"""Seconds of the run."""


def usable_share(faults: Sequence[Fault], now_s: float, kinds: Iterable[str] = SHARES) -> float:
    """Of the headroom, that these kinds of faults leave."""
    share = 1.0
    for fault in faults:
        if fault.kind in kinds and fault.active(now_s):
            share *= 1 - fault.value
    return share


@dataclass(slots=True)
class _FrozenPage:
    """A page that stands still while a fault says so."""

    page: MemoryPage
    faults: Sequence[Fault]
    now_s: Now
    kept: bytes | None = None

    @property
    def header(self) -> PageHeader:
        return self.page.header

    def read_at(self, offset: int, size: int) -> bytes:
        if not any(fault.active(self.now_s()) for fault in self.faults):
            self.kept = None
            return self.page.read_at(offset, size)
        if self.kept is None:
            self.kept = bytes(self.page.buffer)
        return self.kept[offset : offset + size]

    def is_locked(self) -> bool:
        return self.page.is_locked()

    def close(self) -> None:
        """A reader lets go; the page stays."""


class HarmedPages:
    """`pages` as a pilot sees them: the engine's own freezes by the faults, the valves' do not."""

    def __init__(self, pages: MemoryPages, faults: Sequence[Fault], now_s: Now) -> None:
        self._pages = pages
        self._faults = [fault for fault in faults if fault.kind == "telemetry_frozen"]
        self._now_s = now_s

    def telemetry(self) -> Page | None:
        page = self._pages.telemetry()
        return _FrozenPage(page, self._faults, self._now_s) if isinstance(page, MemoryPage) else page

    def valves(self) -> list[Page]:
        return self._pages.valves()

    def other_ranks(self) -> list[Page]:
        return self._pages.other_ranks()


class HarmedEngine(EngineAdapter):
    """The adapter of a rank whose records lose fields by the faults."""

    def __init__(self, pages: Pages, where: str, faults: Sequence[Fault], now_s: Now) -> None:
        super().__init__(pages, where)
        self._faults = [fault for fault in faults if fault.kind == "signal_missing"]
        self._now_s = now_s

    def observe(self, now_ns: int, wanted: Iterable[Key]) -> Sight:
        wanted = list(wanted)
        sight = super().observe(now_ns, wanted)
        lost = {name for fault in self._faults if fault.active(self._now_s()) for name in fault.signals}
        attached = self._attached
        if not lost or sight.record is None or attached is None:
            return sight
        record = _without(sight.record, lost)
        fresh_ns = now_ns if sight.liveness == "idle" else attached.record_ns
        # All of what records say is read again, so that what follows from a lost field is lost as well.
        again = read_signals(wanted, attached.reader, record, fresh_ns)
        records = tuple(_without(one, lost) for one in sight.records)
        return replace(sight, record=record, records=records, readings={**sight.readings, **again})


def _without(record: StepRecord, lost: set[str]) -> StepRecord:
    kept = [name for name in record.keys() if name not in lost]  # noqa: SIM118 - iterating is `keys` too
    return StepRecord(
        record.sequence, tuple(record[name] for name in kept), {name: i for i, name in enumerate(kept)}
    )
