"""The valves of an engine, seen as one: sums over the pages of all API-server processes.

A process that ends takes its page's lock with it; what it had counted stays in the sums, so that totals never
fall. Requests in flight are those of live processes alone.

A valve writes its summary several times a second, also when nobody calls it. One that does not is *silent*:
its process hangs, or its server runs no lifespan. What it has counted is true, but whether its requests are
being answered cannot be told, so they are left out of what is awaited.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvpilot.adapters.pages import Page, Pages
from kvpilot.adapters.windows import Key, Reading
from kvpilot.clock import NS
from kvpilot.inside.credits import BYTES_PER_TOKEN
from kvpilot.inside.valve_leases import SHED_FRACTION
from kvpilot.knobs import KNOBS
from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.link.page import LinkError
from kvpilot.link.valve_page import ValvePageReader, ValveRow, ValveSnapshot
from kvpilot.policy.grid import protective_first
from kvpilot.signals import Missing

RESCAN_NS = NS
SILENT_NS = 2 * NS
"""By the pilot's clock, since the summary last changed: ten times as long as a valve that is well takes."""
VALVE_KNOBS = {
    knob.name: knob
    for knob in (
        ManifestKnob("shed_fraction", "ratio", 0.0, 1.0, 0.0, 0.01, "valve"),
        ManifestKnob("admission_credits", "tokens", 0.0, 2.0**30, 2.0**30, 1.0, "valve"),
        ManifestKnob("prompt_bytes_per_token", "bytes", 0.25, 1024.0, BYTES_PER_TOKEN, 0.01, "valve"),
    )
}
"""What every valve can do, for engines that do not list it. The baseline of credits stands for no limit."""
_COUNTED = {
    "offered": "offered",
    "admitted": "admitted",
    "shed": "shed",
    "offered_prompt_tokens": "offered_tokens",
    "admitted_prompt_tokens": "admitted_tokens",
}
"""Signals, and the counters of a page's rows that they sum."""


@dataclass(frozen=True, slots=True)
class ValveSight:
    """All valves at one moment. `fractions` is what every live one sheds of each class at least."""

    processes: int
    counts: dict[Key, int]
    in_flight: int
    controls_sequence: int
    fractions: dict[str, float]
    obeyed: Mapping[tuple[str, Scope], float] = field(default_factory=dict)
    """The value of each lease that every live one obeys, by its own word: that echo, not the write, is
    *applied*. Of an opening fraction, what is still shed."""
    credits_left: Mapping[str, float] = field(default_factory=dict)
    """Prompt tokens that all together may still accept of each class; absent where one has no limit."""
    shed_by: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Requests turned away by (class, why), ever."""
    admitted_bytes: int = 0
    """Bytes of the bodies let in, ever."""
    silent: int = 0
    """Processes that live and no longer write."""
    awaited: int | None = None
    """Requests in flight that wait for the engine, not for their own client; None where all are silent."""
    byte_left: bool = False
    """Whether a byte of an answer left any of them since the last look."""


@dataclass(slots=True)
class _Followed:
    """One process's page, and when the pilot last saw its summary change."""

    page: Page
    reader: ValvePageReader
    written_ns: int = 0
    changed_ns: int = 0
    last_byte_ns: int = 0


class Valves:
    """Follows the pages of one engine's valves."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._open: dict[int, _Followed] = {}
        self._last: dict[int, ValveSnapshot] = {}
        self._rescan_ns: int | None = None
        self._counted: tuple[list[tuple[tuple[ValveRow, ...], tuple[str, ...]]], dict[Key, int]] | None = None
        """What rows said, and their sums."""
        self.error: str | None = None
        """One line about why pages are not used, for as long as they are not."""

    def observe(self, now_ns: int) -> ValveSight | None:
        """All valves now; None while there is none, nor ever was."""
        if self._rescan_ns is None or now_ns >= self._rescan_ns:
            self._rescan_ns = now_ns + RESCAN_NS
            self._follow()
        byte_left = False
        for nonce, followed in self._open.items():
            snapshot = followed.reader.read()
            if snapshot is not None:
                self._last[nonce] = snapshot
                byte_left |= _take(followed, snapshot, now_ns)
        return self._summed(now_ns, byte_left) if self._last else None

    def rows(self) -> list[ValveRow]:
        """What each valve had counted when it was last read, by class and tenant."""
        return [row for snapshot in self._last.values() for row in snapshot.rows]

    def close(self) -> None:
        """Let go of all pages."""
        for followed in self._open.values():
            followed.page.close()
        self._open = {}

    def _follow(self) -> None:
        """Open the pages of new processes, let go of those whose process ended."""
        try:
            found = self._pages.valves()
            self.error = None
        except LinkError as error:
            found, self.error = [], str(error)
        live = {page.header.nonce for page in found}
        for nonce in [nonce for nonce in self._open if nonce not in live]:
            self._open.pop(nonce).page.close()
        for page in found:
            nonce = page.header.nonce
            try:
                if nonce in self._open:
                    page.close()
                else:
                    self._open[nonce] = _Followed(page, ValvePageReader(page.read_at))
            except LinkError as error:
                page.close()
                self.error = str(error)

    def _counts(self) -> dict[Key, int]:
        """Sums over all rows; those of the last look where every row is still the same."""
        told = [(snapshot.rows, tuple(snapshot.fractions)) for snapshot in self._last.values()]
        if self._counted is not None and self._counted[0] == told:
            return self._counted[1]
        counts: dict[Key, int] = {(name, None): 0 for name in _COUNTED}
        for rows, classes in told:
            for class_name in classes:
                for name in _COUNTED:
                    counts.setdefault((name, class_name), 0)
            for row in rows:
                for name, counter in _COUNTED.items():
                    count, key = getattr(row, counter), (name, row.class_name)
                    counts[name, None] += count
                    counts[key] = counts.get(key, 0) + count
        self._counted = told, counts
        return counts

    def _summed(self, now_ns: int, byte_left: bool) -> ValveSight:
        counts = self._counts()
        live = [self._last[nonce] for nonce in self._open if nonce in self._last]
        heard = [
            self._last[nonce]
            for nonce, followed in self._open.items()
            if nonce in self._last and now_ns - followed.changed_ns <= SILENT_NS
        ]
        classes = live[0].fractions if live else {}
        return ValveSight(
            processes=len(live),
            counts=counts,
            in_flight=sum(each.in_flight for each in live),
            controls_sequence=min((each.controls_sequence for each in live), default=0),
            fractions={name: min(each.fractions.get(name, 0.0) for each in live) for name in classes},
            obeyed=_obeyed(live),
            credits_left={
                name: sum(each.credits_left[name] for each in live)
                for name in classes
                if all(name in each.credits_left for each in live)
            },
            shed_by=_shed_by(self._last.values()),
            admitted_bytes=sum(row.admitted_bytes for each in self._last.values() for row in each.rows),
            silent=len(live) - len(heard),
            awaited=sum(max(0, each.in_flight - each.taking) for each in heard) if heard else None,
            byte_left=byte_left,
        )


def _obeyed(live: Sequence[ValveSnapshot]) -> dict[tuple[str, Scope], float]:
    """What every one of them obeys: where one has read more than another, the least protective value."""
    values: dict[tuple[str, Scope], list[float]] = {}
    for each in live:
        for lease in each.leases:
            opens = lease.knob == SHED_FRACTION
            if lease.knob in KNOBS and (lease.opened < 1.0 if opens else lease.opened <= 0.0):
                value = lease.value * (1.0 - lease.opened) if opens else lease.value
                values.setdefault((lease.knob, lease.scope), []).append(value)
    return {
        target: max(found, key=lambda value, knob=target[0]: protective_first(knob, value))  # type: ignore[misc]
        for target, found in values.items()
        if len(found) == len(live)
    }


def _shed_by(snapshots: Iterable[ValveSnapshot]) -> dict[tuple[str, str], int]:
    counts: Counter[tuple[str, str]] = Counter()
    for snapshot in snapshots:
        for row in snapshot.rows:
            for why, count in row.shed_by.items():
                counts[row.class_name, why] += count
    return dict(counts)


def _take(followed: _Followed, snapshot: ValveSnapshot, now_ns: int) -> bool:
    """Note what is new in a page; True if a byte has left, as far as a first look can tell."""
    if snapshot.written_ns != followed.written_ns or not followed.changed_ns:
        followed.written_ns, followed.changed_ns = snapshot.written_ns, now_ns
    was, followed.last_byte_ns = followed.last_byte_ns, snapshot.last_byte_ns
    return was != snapshot.last_byte_ns


def valve_readings(
    wanted: Iterable[Key], sight: ValveSight | None, at_ns: int
) -> dict[Key, Reading | Missing]:
    """Readings of those `wanted` signals that valves provide."""
    readings: dict[Key, Reading | Missing] = {}
    for key in wanted:
        if key[0] not in VALVE_SIGNALS:
            continue
        value = None
        if sight is not None and sight.processes:
            value = sight.in_flight if key == ("in_flight", None) else sight.counts.get(key)
        readings[key] = Missing("not_provided") if value is None else Reading(at_ns, float(value))
    return readings


VALVE_SIGNALS = frozenset({*_COUNTED, "in_flight"})
