"""Ranks of the same engine that no pilot flies, as far as exporters show them.

One pilot flies one rank; where the others have none of their own, nobody else would show their signals. They
are looked at when somebody asks, at most twice a second, never by a tick. A rank whose controls page another
pilot holds is that pilot's to show: it is left out here, so that no series exists twice.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kvpilot.adapters.engine import EngineAdapter, Sight
from kvpilot.adapters.pages import LinkFiles, Page
from kvpilot.adapters.readings import ENGINE_SIGNALS
from kvpilot.adapters.windows import Key, Reading, View, Windows
from kvpilot.clock import NS
from kvpilot.link.histogram import HistogramSnapshot
from kvpilot.link.locks import is_locked
from kvpilot.link.place import ENGINE_CONTROLS, LinkPlace
from kvpilot.link.telemetry import TenantRow
from kvpilot.signals import SIGNALS, Missing

LOOK_NS = NS // 2
RESCAN_NS = 2 * NS


@dataclass(frozen=True, slots=True)
class RankView:
    """One rank as exporters show it. `shown` are values of gauges and ratios, `readings` the newest looks."""

    rank: int
    sight: Sight
    shown: Mapping[Key, float | Missing]
    readings: Mapping[Key, Reading | Missing]
    histogram: Callable[[str, int | None], HistogramSnapshot | None]
    tenants: Callable[[], tuple[TenantRow, ...]]
    tenant_counts: Callable[[], Mapping[str, Mapping[str, int]]] = dict


class _OneRank:
    """The pages of a single rank: no valves, which belong to the whole engine."""

    def __init__(self, files: LinkFiles) -> None:
        self._files = files

    def telemetry(self) -> Page | None:
        return self._files.telemetry()

    def valves(self) -> list[Page]:
        return []

    def other_ranks(self) -> list[Page]:
        return []


@dataclass(slots=True)
class _Followed:
    adapter: EngineAdapter
    windows: Windows
    readings: dict[Key, Reading | Missing] = field(default_factory=dict)


class OtherRanks:
    """See the module docstring. `own` is the rank that this pilot flies; looks in order of time."""

    def __init__(self, place: LinkPlace, own: int, views: Sequence[View]) -> None:
        self._place = place
        self._own = own
        # Distributions are exported as they are: nobody is shown a quantile of another rank's.
        self._views = [
            view
            for view in views
            if view.signal in ENGINE_SIGNALS and SIGNALS[view.signal].kind != "distribution"
        ]
        self._followed: dict[int, _Followed] = {}
        self._seen: list[RankView] = []
        self._look_ns: int | None = None
        self._rescan_ns: int | None = None

    def look(self, now_ns: int) -> list[RankView]:
        """Each of them that has an engine, by rank."""
        if self._look_ns is not None and now_ns < self._look_ns:
            return self._seen
        self._look_ns = now_ns + LOOK_NS
        if self._rescan_ns is None or now_ns >= self._rescan_ns:
            self._rescan_ns = now_ns + RESCAN_NS
            self._rescan()
        views = [self._view(rank, each, now_ns) for rank, each in sorted(self._followed.items())]
        self._seen = [view for view in views if view.sight.manifest is not None]
        return self._seen

    def close(self) -> None:
        """Let go of all pages."""
        for each in self._followed.values():
            each.adapter.close()
        self._followed = {}

    def _view(self, rank: int, each: _Followed, now_ns: int) -> RankView:
        sight = each.adapter.observe(now_ns, set(each.windows.wanted))
        if sight.before is not None:
            each.windows.clear("restarted")
        each.readings = sight.readings
        each.windows.take(sight.readings)
        shown = {(view.signal, view.klass): each.windows.value(view, now_ns) for view in self._views}
        return RankView(
            rank,
            sight,
            shown,
            each.readings,
            each.adapter.histogram,
            each.adapter.tenants,
            each.adapter.tenant_counts,
        )

    def _rescan(self) -> None:
        ranks = {rank for rank in self._ranks() if not self._is_flown(rank)}
        for rank in self._followed.keys() - ranks:
            self._followed.pop(rank).adapter.close()
        for rank in ranks - self._followed.keys():
            files = LinkFiles(self._place, rank)
            windows = Windows()
            windows.require(self._views)
            where = str(self._place.telemetry_directory(rank))
            self._followed[rank] = _Followed(EngineAdapter(_OneRank(files), where), windows)

    def _ranks(self) -> set[int]:
        name = re.compile(rf"{re.escape(self._place.engine)}-([0-9]{{1,4}})")
        try:
            entries = os.listdir(self._place.telemetry)
        except OSError:
            return set()
        return {int(match[1]) for entry in entries if (match := name.fullmatch(entry))} - {self._own}

    def _is_flown(self, rank: int) -> bool:
        """Whether another process holds that rank's controls page."""
        try:
            fd = os.open(self._place.controls_directory(rank) / ENGINE_CONTROLS, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            return is_locked(fd)
        finally:
            os.close(fd)
