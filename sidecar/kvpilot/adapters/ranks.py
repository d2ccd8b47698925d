"""The other ranks of one engine, as far as this rank's pilot compares itself with them.

Where a router deals requests unevenly, one rank queues at full memory beside ranks with room. Each rank's
pilot sees its own load over the mean. A look opens the others' pages, reads one record of each, and closes
them: it is taken once in `LOOK_NS`, and only where somebody asks.
"""

from kvpilot.adapters.pages import Page, Pages
from kvpilot.clock import NS
from kvpilot.link.page import LinkError
from kvpilot.link.records import StepRecord
from kvpilot.link.telemetry import TelemetryReader
from kvpilot.signals import Missing

LOOK_NS = NS


class Ranks:
    """See the module docstring. Looks in order of time."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._loads: list[float] = []
        self._look_ns: int | None = None

    def load_ratio(self, own: StepRecord, now_ns: int) -> float | Missing:
        """Requests running and waiting here, over the mean of all ranks; 1 while nobody has any."""
        if self._look_ns is None or now_ns >= self._look_ns:
            self._look_ns = now_ns + LOOK_NS
            self._loads = self._look()
        here = _load(own)
        if here is None or not self._loads:
            return Missing("not_provided")
        mean = (here + sum(self._loads)) / (1 + len(self._loads))
        return here / mean if mean else 1.0

    def _look(self) -> list[float]:
        try:
            pages = self._pages.other_ranks()
        except LinkError:
            # The link's own troubles are told where this rank's page is read.
            return []
        loads = [load for page in pages if (load := _newest_load(page)) is not None]
        for page in pages:
            page.close()
        return loads


def _newest_load(page: Page) -> float | None:
    try:
        newest = TelemetryReader(page.read_at).poll(limit=1)
    except LinkError:
        return None
    return _load(newest[-1]) if newest else None


def _load(record: StepRecord) -> float | None:
    """Requests that the rank has; None where it does not tell."""
    running, waiting = record.get("running"), record.get("waiting")
    return None if running is None or waiting is None else running + waiting
