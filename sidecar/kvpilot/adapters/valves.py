"""The valves of an engine, seen as one: sums over the pages of all API-server processes.

A process that ends takes its page's lock with it; what it had counted stays in the sums, so that totals never
fall. Requests in flight are those of live processes alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kvpilot.adapters.pages import Page, Pages
from kvpilot.adapters.windows import Key, Reading
from kvpilot.clock import NS
from kvpilot.link.page import LinkError
from kvpilot.link.valve_page import ValvePageReader, ValveSnapshot
from kvpilot.signals import Missing

RESCAN_NS = NS
_COUNTED = ("offered", "admitted", "shed")


@dataclass(frozen=True, slots=True)
class ValveSight:
    """All valves at one moment. `fractions` is what every live one sheds of each class at least."""

    processes: int
    counts: dict[Key, int]
    in_flight: int
    seconds_since_byte: float | None
    controls_sequence: int
    fractions: dict[str, float]


class Valves:
    """Follows the pages of one engine's valves."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._open: dict[int, tuple[Page, ValvePageReader]] = {}
        self._last: dict[int, ValveSnapshot] = {}
        self._rescan_ns: int | None = None
        self.error: str | None = None
        """One line about why pages are not used, for as long as they are not."""

    def observe(self, now_ns: int) -> ValveSight | None:
        """All valves now; None while there is none, nor ever was."""
        if self._rescan_ns is None or now_ns >= self._rescan_ns:
            self._rescan_ns = now_ns + RESCAN_NS
            self._follow()
        for nonce, (_, reader) in self._open.items():
            snapshot = reader.read()
            if snapshot is not None:
                self._last[nonce] = snapshot
        return self._summed() if self._last else None

    def close(self) -> None:
        """Let go of all pages."""
        for page, _ in self._open.values():
            page.close()
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
            self._open.pop(nonce)[0].close()
        for page in found:
            nonce = page.header.nonce
            try:
                if nonce in self._open:
                    page.close()
                else:
                    self._open[nonce] = (page, ValvePageReader(page.read_at))
            except LinkError as error:
                page.close()
                self.error = str(error)

    def _summed(self) -> ValveSight:
        counts: dict[Key, int] = {(name, None): 0 for name in _COUNTED}
        for snapshot in self._last.values():
            for row in snapshot.rows:
                for name, count in (("offered", row.offered), ("admitted", row.admitted), ("shed", row.shed)):
                    counts[name, None] += count
                    counts[name, row.class_name] = counts.get((name, row.class_name), 0) + count
            for class_name in snapshot.fractions:
                for name in _COUNTED:
                    counts.setdefault((name, class_name), 0)
        live = [self._last[nonce] for nonce in self._open if nonce in self._last]
        silences = [each.seconds_since_byte for each in live if each.seconds_since_byte is not None]
        classes = live[0].fractions if live else {}
        return ValveSight(
            processes=len(live),
            counts=counts,
            in_flight=sum(each.in_flight for each in live),
            seconds_since_byte=max(silences, default=None),
            controls_sequence=min((each.controls_sequence for each in live), default=0),
            fractions={name: min(each.fractions.get(name, 0.0) for each in live) for name in classes},
        )


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
