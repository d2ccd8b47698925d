"""The metrics page: what a scrape gets, however many scrape.

Pages are made in the event loop, so that they show whole ticks only, and in turns of a millisecond, so that
neither a tick nor another scrape waits for one. A page is kept for as long as the signals it shows are, half
a second; while its successor is made it is still handed out, for a quarter of a second. Who comes later than
that waits for the new one.
"""

import asyncio

from kvpilot.clock import NS, Clock
from kvpilot.flight import Flight
from kvpilot.pilot import TICK_NS
from kvpilot.publish.board import REFRESH_NS
from kvpilot.publish.collected import Collected
from kvpilot.publish.collector import Collector
from kvpilot.publish.durations import Durations
from kvpilot.publish.exposition import CONTENT_TYPES, Exposition, Format, negotiated
from kvpilot.publish.picker import picker_page
from kvpilot.publish.sheet import Sheet

OLDEST_NS = REFRESH_NS * 3 // 2
"""The oldest page that is handed out while a newer one is made."""
TURN_NS = NS // 1_000
COLLECTING_NS = 15 * NS // 1_000
"""Longer than it takes to gather eight ranks, which is done in one turn: so close to a tick it waits."""


class Turns:
    """Of long work in the event loop: `over` lets others run after each millisecond of it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_ns = clock.monotonic_ns()
        self._worked_ns = 0

    async def over(self) -> None:
        """To be called every now and then."""
        if self._clock.monotonic_ns() - self._began_ns >= TURN_NS:
            self._stop()
            await asyncio.sleep(0)
            self._began_ns = self._clock.monotonic_ns()

    def worked_s(self) -> float:
        """Seconds of all turns; the work is done."""
        self._stop()
        return self._worked_ns / NS

    def _stop(self) -> None:
        self._worked_ns += self._clock.monotonic_ns() - self._began_ns


class MetricsPage:
    """See the module docstring."""

    def __init__(self, flight: Flight, collector: Collector | None = None) -> None:
        self._flight = flight
        self._clock = flight.pilot.clock
        self.renders = 0
        self.durations = Durations()
        """Of the event loop's time: what ran between the turns is not counted."""
        self.collector = collector or Collector(flight)
        self._exposition = Exposition()
        self._kept: dict[Format, tuple[int, bytes]] = {}
        self._collected: tuple[int, list[Collected]] | None = None
        """What all formats show, and since when."""
        self._making: dict[Format, asyncio.Task[None]] = {}

    async def answer(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type, for a request with this `Accept` header."""
        form = negotiated(accept)
        kept = self._kept.get(form)
        age_ns = self._clock.monotonic_ns() - kept[0] if kept is not None else OLDEST_NS
        making = self._making.get(form)
        if age_ns >= REFRESH_NS and making is None:
            making = self._making[form] = asyncio.create_task(self._make(form))
        if making is not None and age_ns >= OLDEST_NS:
            # Shielded: a scraper that goes away leaves the page to the others.
            await asyncio.shield(making)
        return self._kept[form][1], CONTENT_TYPES[form]

    def picker(self) -> bytes:
        """What an endpoint picker reads."""
        view = self.collector.own_view()
        if view is None:
            return b""
        values = {signal: value for (signal, klass), value in view.shown.items() if klass is None}
        return picker_page(view.sight.manifest, values, view.rank)

    async def _make(self, form: Format) -> None:
        try:
            await self._let_tick_pass()
            turns = Turns(self._clock)
            at_ns, collected = self._gather()
            parts = []
            for each in [*collected, *self._own()]:
                await turns.over()
                parts.append(self._exposition.family(each, form))
            self._kept[form] = (at_ns, Exposition.joined(parts, form))
            self.renders += 1
            self.durations.observe(turns.worked_s())
        finally:
            del self._making[form]

    async def _let_tick_pass(self) -> None:
        """Where the next one is too near to gather everything before it."""
        tick, now_ns = self._flight.pilot.board.tick, self._clock.monotonic_ns()
        if tick is not None and tick.at_ns + TICK_NS - now_ns < COLLECTING_NS:
            await self._clock.sleep_until(tick.at_ns + TICK_NS)

    def _gather(self) -> tuple[int, list[Collected]]:
        now_ns = self._clock.monotonic_ns()
        if self._collected is None or now_ns - self._collected[0] >= REFRESH_NS:
            self._collected = (now_ns, self.collector.collect())
        return self._collected

    def _own(self) -> list[Collected]:
        sheet = Sheet(self._flight.engine_name, self._flight.rank)
        sheet.add("page_renders", self.renders)
        sheet.add_durations("page_render_duration_seconds", self.durations)
        return sheet.collected()
