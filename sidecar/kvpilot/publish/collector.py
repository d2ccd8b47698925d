"""What a pilot exports, gathered from one tick: the sheet that the metrics page and OTLP are made from."""

from collections.abc import Callable, Iterator

from kvpilot.adapters.other_ranks import RankView
from kvpilot.flight import Flight
from kvpilot.publish.collected import Collected
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
        sheet = Sheet(self._flight.engine_name, self._flight.rank)
        for _ in self.gather(sheet):
            pass
        return sheet.collected()

    def gather(self, sheet: Sheet) -> Iterator[None]:
        """Everything onto `sheet`, in steps between which others may run: of whatever a tick changes, all is
        in the first."""
        flight = self._flight
        tick, now_ns = flight.pilot.board.tick, flight.pilot.clock.monotonic_ns()
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
        for add in self._more:
            add(sheet)
        yield
        for view in flight.others.look(now_ns) if flight.others is not None else ():
            yield
            self._add_rank(sheet, view, view.sight.at_ns, "other")

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
