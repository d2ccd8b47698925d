"""Exemplars: which decision was made while observations fell into a latency bucket.

The engine's histograms are counts, not observations, so an exemplar is the middle of the page's own bucket
(within 3.2 %) that grew in the half second in which the pilot decided something.
"""

from collections.abc import Mapping
from typing import NamedTuple

from kvpilot.adapters.windows import Key, Reading
from kvpilot.clock import NS
from kvpilot.link.histogram import HistogramSnapshot, bucket_bounds_ns
from kvpilot.publish.buckets import BOUND_OF
from kvpilot.signals import Missing


class Told(NamedTuple):
    """One bucket's exemplar: the decision's number and the engine start it was made for."""

    number: int
    nonce: int
    value_s: float
    wall_ns: int


class Exemplars:
    """By signal and class, the newest for each exported bucket."""

    def __init__(self) -> None:
        self._last: dict[Key, HistogramSnapshot] = {}
        self._told: dict[Key, dict[int, Told]] = {}

    def of(self, signal: str, klass: str | None) -> Mapping[int, Told]:
        """By index of the exported bucket."""
        return self._told.get((signal, klass), {})

    def clear(self) -> None:
        """Another engine start: its histograms begin at zero."""
        self._last = {}
        self._told = {}

    def take(
        self, readings: Mapping[Key, Reading | Missing], number: int | None, nonce: int, wall_ns: int
    ) -> None:
        """Readings of a refresh; `number` of the newest decision since the last one, if there was any."""
        for key, reading in readings.items():
            if not isinstance(reading, Reading) or not isinstance(reading.value, HistogramSnapshot):
                continue
            before = self._last.get(key)
            self._last[key] = reading.value
            if number is None or before is None or reading.value.count == before.count:
                continue
            told = self._told.setdefault(key, {})
            for index, (now, then) in enumerate(zip(reading.value.counts, before.counts, strict=True)):
                if now > then:
                    value_s = sum(bucket_bounds_ns(index)) / 2 / NS
                    told[BOUND_OF[index]] = Told(number, nonce, value_s, wall_ns)
