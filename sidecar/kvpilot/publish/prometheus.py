"""The metrics page: what a scrape gets, however many scrape.

Pages are made in the event loop, so that they show whole ticks only, and in turns of a millisecond, so that
neither a tick nor another scrape waits for one. A page is kept for as long as the signals it shows are, half
a second; while its successor is made it is still handed out, for a quarter of a second. Who comes later than
that waits for the new one.
"""

import asyncio
from typing import NamedTuple

from kvpilot.clock import NS
from kvpilot.flight import Flight
from kvpilot.pilot import TICK_NS, Pilot
from kvpilot.publish.board import REFRESH_NS, Tick
from kvpilot.publish.collected import Collected
from kvpilot.publish.collector import Collector
from kvpilot.publish.durations import Durations
from kvpilot.publish.exposition import CONTENT_TYPES, Exposition, Format, negotiated
from kvpilot.publish.picker import picker_page
from kvpilot.publish.sheet import Sheet

OLDEST_NS = REFRESH_NS * 3 // 2
"""The oldest page that is handed out while a newer one is made."""
TURN_NS = NS // 1_000
LONGEST_TURN_NS = 4 * TURN_NS
"""What one step may take, a look at eight ranks or a histogram of theirs: so close to a tick none begins."""


class Gathered(NamedTuple):
    """What is exported, since when, and of which tick."""

    at_ns: int
    tick: Tick | None
    collected: list[Collected]


class Turns:
    """Of long work in the event loop: `over` lets others run after each millisecond, and ticks be on time."""

    def __init__(self, pilot: Pilot) -> None:
        self._pilot = pilot
        self._clock = pilot.clock
        self._began_ns = self._clock.monotonic_ns()
        self._worked_ns = 0

    async def over(self) -> None:
        """To be called every now and then."""
        tick, now_ns = self._pilot.board.tick, self._clock.monotonic_ns()
        due_ns = tick.at_ns + TICK_NS if tick is not None else 0
        near = 0 < due_ns - now_ns < LONGEST_TURN_NS
        if near or now_ns - self._began_ns >= TURN_NS:
            self._worked_ns += now_ns - self._began_ns
            await self._clock.sleep_until(due_ns if near else now_ns)
            self._began_ns = self._clock.monotonic_ns()

    def worked_s(self) -> float:
        """Seconds of all turns, this one included."""
        return (self._worked_ns + self._clock.monotonic_ns() - self._began_ns) / NS


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
        self._gathered: Gathered | None = None
        """What all formats show."""
        self._gathering: asyncio.Task[Gathered] | None = None
        self._gathered_s = 0.0
        """What gathering took for pages that are not made yet."""
        self._making: dict[Format, asyncio.Task[None]] = {}

    async def answer(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type, for a request with this `Accept` header."""
        form = negotiated(accept)
        kept = self._kept.get(form)
        age_ns = self._clock.monotonic_ns() - kept[0] if kept is not None else OLDEST_NS
        if age_ns >= REFRESH_NS:
            making = self._making.get(form)
            if making is None or making.done():
                making = self._making[form] = asyncio.create_task(self._make(form))
            if age_ns >= OLDEST_NS:
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

    async def gathered(self) -> Gathered:
        """What is exported, of at most half a second ago; one gathering for all who ask."""
        if self._gathered is None or self._clock.monotonic_ns() - self._gathered.at_ns >= REFRESH_NS:
            if self._gathering is None or self._gathering.done():
                self._gathering = asyncio.create_task(self._gather())
            return await asyncio.shield(self._gathering)
        return self._gathered

    async def _gather(self) -> Gathered:
        turns, sheet = Turns(self._flight.pilot), self._sheet()
        await turns.over()
        at_ns, tick = self._clock.monotonic_ns(), self._flight.pilot.board.tick
        for _ in self.collector.gather(sheet):
            await turns.over()
        self._gathered = Gathered(at_ns, tick, sheet.collected())
        self._gathered_s += turns.worked_s()
        return self._gathered

    async def _make(self, form: Format) -> None:
        at_ns, _, collected = await self.gathered()
        turns, parts = Turns(self._flight.pilot), []
        for each in [*collected, *self._own()]:
            await turns.over()
            parts.append(self._exposition.family(each, form))
        self._kept[form] = (at_ns, Exposition.joined(parts, form))
        self.renders += 1
        self.durations.observe(turns.worked_s() + self._gathered_s)
        self._gathered_s = 0.0

    def _own(self) -> list[Collected]:
        sheet = self._sheet()
        sheet.add("page_renders", self.renders)
        sheet.add_durations("page_render_duration_seconds", self.durations)
        return sheet.collected()

    def _sheet(self) -> Sheet:
        return Sheet(self._flight.engine_name, self._flight.rank)
