"""The metrics page: what a scrape gets, rendered at most twice a second however many scrape.

Rendering happens in the event loop, so that a page shows whole ticks only. A page is kept for as long as the
signals it shows are: half a second.
"""

from collections.abc import Callable

from kvpilot.adapters.other_ranks import RankView
from kvpilot.clock import NS
from kvpilot.flight import Flight
from kvpilot.publish.board import REFRESH_NS
from kvpilot.publish.durations import Durations
from kvpilot.publish.exposition import OPENMETRICS, TEXT, Collected, Writer
from kvpilot.publish.picker import picker_page
from kvpilot.publish.pilot_metrics import add_control, add_pilot, add_valves
from kvpilot.publish.rank_metrics import Extent, RankMetrics, TenantMetrics
from kvpilot.publish.sheet import Sheet

More = Callable[[Sheet], None]


class Collector:
    """Everything a pilot exports, as of its last tick. `more` add what other parts of the pilot know."""

    def __init__(self, flight: Flight, more: tuple[More, ...] = (), traced: bool = False) -> None:
        self._flight = flight
        self._more = more
        self._ranks = RankMetrics(flight.pilot.board.exemplars, traced)
        self._tenants: dict[int | None, TenantMetrics] = {}

    def collect(self) -> list[Collected]:
        """Everything, now."""
        flight = self._flight
        tick, now_ns = flight.pilot.board.tick, flight.pilot.clock.monotonic_ns()
        sheet = Sheet(flight.engine_name, flight.rank)
        add_pilot(sheet, flight)
        # Valves are the whole engine's: of several ranks' pilots, the one that flies them shows them.
        if tick is not None and tick.sight.valve is not None and flight.pilot.actuator.flies_valves:
            add_valves(sheet, tick.sight.valve)
            self._tenants_of(None).add_valve_rows(sheet, flight.pilot.engine.valve_rows())
        own = self.own_view()
        if own is not None:
            assert tick is not None
            add_control(sheet, tick, now_ns)
            # Against the tick: between two ticks nothing was looked at.
            extent: Extent = "own" if flight.pilot.actuator.flies_valves else "own_without_valves"
            self._add_rank(sheet, own, tick.at_ns, extent)
        for view in flight.others.look(now_ns) if flight.others is not None else ():
            self._add_rank(sheet, view, view.sight.at_ns, "other")
        for add in self._more:
            add(sheet)
        return sheet.collected()

    def own_view(self) -> RankView | None:
        """The rank that this pilot flies; None while it has no engine."""
        flight = self._flight
        board, engine = flight.pilot.board, flight.pilot.engine
        if board.tick is None or board.tick.sight.manifest is None:
            return None
        shown = {(view.signal, view.klass): value for view, value in board.values()}
        return RankView(
            flight.rank,
            board.tick.sight,
            shown,
            board.latest,
            engine.histogram,
            engine.tenants,
            engine.tenant_counts,
        )

    def _add_rank(self, sheet: Sheet, view: RankView, now_ns: int, extent: Extent) -> None:
        self._ranks.add(sheet, view, now_ns, extent)
        self._tenants_of(view.rank).add_rows(sheet, view.tenants(), view.rank, view.tenant_counts())

    def _tenants_of(self, rank: int | None) -> TenantMetrics:
        return self._tenants.setdefault(rank, TenantMetrics())


class MetricsPage:
    """See the module docstring."""

    def __init__(self, flight: Flight, collector: Collector | None = None) -> None:
        self._flight = flight
        self.renders = 0
        self.durations = Durations()
        self.collector = collector or Collector(flight)
        self._writer = Writer()
        self._kept: dict[bool, tuple[int, bytes]] = {}
        self._collected: tuple[int, list[Collected]] | None = None
        """What both formats show, and since when."""

    def answer(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type, for a request with this `Accept` header."""
        openmetrics = "application/openmetrics-text" in accept
        return self._page(openmetrics), OPENMETRICS if openmetrics else TEXT

    def picker(self) -> bytes:
        """What an endpoint picker reads."""
        view = self.collector.own_view()
        if view is None:
            return b""
        values = {signal: value for (signal, klass), value in view.shown.items() if klass is None}
        return picker_page(view.sight.manifest, values, view.rank).encode()

    def _page(self, openmetrics: bool) -> bytes:
        clock = self._flight.pilot.clock
        now_ns = clock.monotonic_ns()
        kept = self._kept.get(openmetrics)
        if kept is not None and now_ns - kept[0] < REFRESH_NS:
            return kept[1]
        if self._collected is None or now_ns - self._collected[0] >= REFRESH_NS:
            self._collected = (now_ns, self.collector.collect())
        page = self._writer.write(self._collected[1] + self._own(), openmetrics)
        self._kept[openmetrics] = (self._collected[0], page)
        self.renders += 1
        self.durations.observe((clock.monotonic_ns() - now_ns) / NS)
        return page

    def _own(self) -> list[Collected]:
        sheet = Sheet(self._flight.engine_name, self._flight.rank)
        sheet.add("page_renders", self.renders)
        sheet.add_durations("page_render_duration_seconds", self.durations)
        return sheet.collected()
