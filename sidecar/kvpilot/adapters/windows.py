"""Windows: what a signal was over the last seconds, or why nobody can say.

A reading is one look at a signal: a level, a cumulative count, a pair of counts, or a cumulative histogram,
with the pilot's time at which it was known to be true. A view is what a policy's input asks for: an
aggregation over a window, with the least number of samples and the greatest age it will accept.

What counts as a sample, for `min_samples`: a reading (gauge, counter), a unit of the denominator (ratio), an
observation (distribution). Cumulative kinds are read as differences, so a window that began before the pilot
did covers what the pilot saw of it.

Invariant: nothing missing becomes a number. Cost of one value: one pass over the window for gauges (at most
`MOST_READINGS`), constant for counters and ratios, one pass over the buckets for distributions.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kvpilot.clock import NS
from kvpilot.link.histogram import HistogramSnapshot
from kvpilot.signals import SIGNALS, Kind, Missing

MOST_READINGS = 600
"""Kept per window; a longer window than a minute at 10 Hz is thinned to this many."""
MOST_SNAPSHOTS = 50
"""Kept per window of a distribution: each is a few kilobytes, and only the two ends are compared."""

Key = tuple[str, str | None]
"""(signal, class); class None is all of them."""
Ratio = tuple[float, float]
"""(numerator, denominator), both cumulative."""
Value = float | Ratio | HistogramSnapshot


class Reading(NamedTuple):
    """What a signal was, and when (the pilot's monotonic clock) it was last known to be so."""

    at_ns: int
    value: Value


class View(Protocol):
    """What an input asks for; `kvpilot.policy.rules.InputSpec` is one."""

    @property
    def signal(self) -> str: ...
    @property
    def agg(self) -> str: ...
    @property
    def window_s(self) -> float | None: ...
    @property
    def min_samples(self) -> int: ...
    @property
    def max_age_s(self) -> float: ...
    @property
    def klass(self) -> str | None: ...


@dataclass(slots=True)
class _Track:
    """The readings of one key over one window; `why` says what is wrong while there are none."""

    kind: Kind
    window_ns: int
    why: str = "no_samples"
    readings: deque[Reading] = field(default_factory=deque)

    def take(self, reading: Reading) -> None:
        kept = self.readings
        if kept and reading.at_ns <= kept[-1].at_ns:
            return
        if kept and self.kind != "gauge" and _total(reading.value) < _total(kept[-1].value):
            self.clear("reset")
        most = MOST_SNAPSHOTS if self.kind == "distribution" else MOST_READINGS
        if len(kept) > 1 and (reading.at_ns - kept[-2].at_ns) * most < self.window_ns:
            kept.pop()
        kept.append(reading)
        self.prune(reading.at_ns)

    def clear(self, why: str) -> None:
        self.readings.clear()
        self.why = why

    def prune(self, now_ns: int) -> None:
        """Drop what the window has left behind; cumulative kinds keep one reading from before it."""
        kept, start_ns = self.readings, now_ns - self.window_ns
        before = 0 if self.kind == "gauge" else 1
        while len(kept) > 1 and kept[before].at_ns <= start_ns:
            kept.popleft()


class Windows:
    """All windows that somebody asked for. `wanted` is what has to be read for them."""

    def __init__(self) -> None:
        self._tracks: dict[tuple[Key, int], _Track] = {}
        self._by_key: dict[Key, list[_Track]] = {}
        self._by_view: dict[int, tuple[View, _Track]] = {}
        """By the identity of the view, which is kept beside it."""

    @property
    def wanted(self) -> Iterable[Key]:
        return self._by_key.keys()

    def require(self, views: Iterable[View]) -> None:
        """Keep the windows of `views` and no others; those that exist already keep their readings."""
        tracks: dict[tuple[Key, int], _Track] = {}
        self._by_view = {}
        for view in views:
            identity = (view.signal, view.klass), _window_ns(view)
            # Views alike share one: two policies may ask for the same window.
            kept = tracks.get(identity) or self._tracks.get(identity)
            tracks[identity] = kept or _Track(SIGNALS[view.signal].kind, identity[1])
            self._by_view[id(view)] = view, tracks[identity]
        self._tracks = tracks
        self._by_key = {}
        for (key, _), track in tracks.items():
            self._by_key.setdefault(key, []).append(track)

    def take(self, readings: Mapping[Key, Reading | Missing]) -> None:
        """Add one tick's readings. A key that is absent has nothing new; one that is Missing is forgotten."""
        for key, tracks in self._by_key.items():
            reading = readings.get(key)
            for track in tracks:
                if isinstance(reading, Reading):
                    track.take(reading)
                elif reading is not None:
                    track.clear(reading.reason)

    def clear(self, why: str) -> None:
        """Forget all readings, for this reason: another engine, or the same one started again."""
        for track in self._tracks.values():
            track.clear(why)

    def value(self, view: View, now_ns: int) -> float | Missing:
        """What `view` asks for, as of `now_ns`."""
        known = self._by_view.get(id(view))
        track = self._tracks[(view.signal, view.klass), _window_ns(view)] if known is None else known[1]
        if not track.readings:
            return Missing(track.why)
        age_s = (now_ns - track.readings[-1].at_ns) / NS
        if age_s > view.max_age_s:
            return Missing("too_old", age_s)
        track.prune(now_ns)
        found = _AGGREGATE[track.kind](track.readings, view, track.why)
        if isinstance(found, Missing):
            return Missing(found.reason, age_s)
        return Missing("not_finite", age_s) if math.isnan(found) else found

    def age_s(self, view: View, now_ns: int) -> float | None:
        """Seconds since the newest reading of `view`; None where there is none."""
        track = self._tracks.get(((view.signal, view.klass), _window_ns(view)))
        return (now_ns - track.readings[-1].at_ns) / NS if track is not None and track.readings else None


def _window_ns(view: View) -> int:
    return round((view.window_s or 0.0) * NS)


def _total(value: Value) -> float:
    """The part of a cumulative value that can only grow."""
    if isinstance(value, HistogramSnapshot):
        return value.count
    return value[1] if isinstance(value, tuple) else value


def _gauge(readings: deque[Reading], view: View, why: str) -> float | Missing:
    if len(readings) < view.min_samples:
        return Missing("too_few_samples")
    if view.agg == "last":
        return _number(readings[-1].value)
    values = [_number(reading.value) for reading in readings]
    if view.agg == "mean":
        return sum(values) / len(values)
    return min(values) if view.agg == "min" else max(values)


def _counter(readings: deque[Reading], view: View, why: str) -> float | Missing:
    first, last = readings[0], readings[-1]
    if len(readings) < max(2, view.min_samples):
        return Missing(why if len(readings) == 1 and why != "no_samples" else "too_few_samples")
    increase = _number(last.value) - _number(first.value)
    return increase if view.agg == "increase" else increase * NS / (last.at_ns - first.at_ns)


def _ratio(readings: deque[Reading], view: View, why: str) -> float | Missing:
    first, last = readings[0].value, readings[-1].value
    assert isinstance(first, tuple)
    assert isinstance(last, tuple)
    over = last[1] - first[1]
    if over < max(1, view.min_samples):
        return Missing("too_few_samples" if over else "no_samples")
    return (last[0] - first[0]) / over


def _distribution(readings: deque[Reading], view: View, why: str) -> float | Missing:
    first, last = readings[0].value, readings[-1].value
    assert isinstance(first, HistogramSnapshot)
    assert isinstance(last, HistogramSnapshot)
    try:
        seen = last.minus(first)
    except ValueError:  # One bucket went down though the sum did not: not the same histogram any more.
        return Missing("reset")
    if seen.count < max(1, view.min_samples):
        return Missing("too_few_samples" if seen.count else "no_samples")
    found = seen.mean() if view.agg == "mean" else seen.quantile(_QUANTILES[view.agg])
    return Missing("no_samples") if found is None else found


def _number(value: Value) -> float:
    assert isinstance(value, int | float)
    return value


_QUANTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
_AGGREGATE = {"gauge": _gauge, "counter": _counter, "ratio": _ratio, "distribution": _distribution}
