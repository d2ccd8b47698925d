"""Cumulative log-linear histograms of durations.

Sixteen equal buckets an octave from 2^16 ns (66 us) to 2^40 ns (1,100 s), one below and one above: a
duration read back as the middle of its bucket is at most 3.2 % off. Counts only grow, so the distribution
over a window is the difference of two readings.

In the page a histogram is words: sequence, sum in ns, one count a bucket. The sequence is odd while a batch
is being added. Every count is a word of its own that only grows, so even a reading taken in the middle, or
on a machine that reorders stores, is a state between two true ones, a batch apart; the sequence only says
whether sum and counts belong together.
"""

import math
import struct
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate

_LOW_BITS = 16
_HIGH_BITS = 40
_SUB_BITS = 4
_SUB = 1 << _SUB_BITS
_LOW_NS = 1 << _LOW_BITS
_HIGH_NS = 1 << _HIGH_BITS
_SHIFT = _SUB_BITS + 1
# Index of a duration is (shift << 4) + (ns >> shift) - _BIAS, so that _LOW_NS lands in bucket 1.
_BIAS = ((_LOW_BITS + 1 - _SHIFT) << _SUB_BITS) + _SUB - 1

BUCKETS = (_HIGH_BITS - _LOW_BITS) * _SUB + 2
HISTOGRAM_WORDS = 392
"""Sequence, sum, buckets, rounded up to a whole number of cache lines."""
assert BUCKETS + 2 <= HISTOGRAM_WORDS

PER_CLASS = ("itl", "ttft", "queue_wait")
ONE = "step"
PENDING = 65_536
"""Most observations of one histogram between two flushes; beyond it the oldest are lost."""

_READ = struct.Struct(f"<{BUCKETS + 2}Q")


def bucket_index(duration_ns: int) -> int:
    """The bucket of `duration_ns`; 0 for anything under 66 us, the last for anything over 1,100 s."""
    if duration_ns < _LOW_NS:
        return 0
    if duration_ns >= _HIGH_NS:
        return BUCKETS - 1
    shift = duration_ns.bit_length() - _SHIFT
    return (shift << _SUB_BITS) + (duration_ns >> shift) - _BIAS


def bucket_bounds_ns(index: int) -> tuple[int, int]:
    """Lowest duration in bucket `index`, and the lowest one above it (for the last bucket: the same)."""
    if index <= 0:
        return 0, _LOW_NS
    if index >= BUCKETS - 1:
        return _HIGH_NS, _HIGH_NS
    octave, step = divmod(index - 1, _SUB)
    width = 1 << (octave + _LOW_BITS - _SUB_BITS)
    low = (_SUB + step) * width
    return low, low + width


class HistogramSnapshot:
    """One reading: cumulative, or a window as the difference of two."""

    __slots__ = ("count", "counts", "sum_ns")

    def __init__(self, counts: Sequence[int], sum_ns: int) -> None:
        self.counts = counts
        self.sum_ns = sum_ns
        self.count = sum(counts)

    def minus(self, earlier: "HistogramSnapshot") -> "HistogramSnapshot":
        """What was added since `earlier`. Raises ValueError where that is not earlier, or another page."""
        counts = [now - then for now, then in zip(self.counts, earlier.counts, strict=True)]
        if min(counts) < 0:
            raise ValueError("not an earlier reading of this histogram: a count went down")
        return HistogramSnapshot(counts, max(0, self.sum_ns - earlier.sum_ns))

    def plus(self, other: "HistogramSnapshot") -> "HistogramSnapshot":
        """Both together."""
        counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return HistogramSnapshot(counts, self.sum_ns + other.sum_ns)

    def quantile(self, q: float) -> float | None:
        """The `q` quantile (0..1) in seconds, within 3.2 % from 66 us to 1,100 s; None when empty."""
        if not self.count:
            return None
        rank = max(1, math.ceil(q * self.count))
        seen = accumulate(self.counts)
        index = next(index for index, below in enumerate(seen) if below >= rank)
        low, high = bucket_bounds_ns(index)
        return (low + high) / 2e9

    def mean(self) -> float | None:
        """Mean in seconds, exact; None when empty."""
        return self.sum_ns / self.count / 1e9 if self.count else None


def read_histogram(read_at: Callable[[int, int], bytes], offset: int) -> HistogramSnapshot | None:
    """The histogram at `offset`; None where the page is too short. Torn readings: see the module."""
    for _ in range(3):
        raw = read_at(offset, _READ.size)
        if len(raw) < _READ.size:
            return None
        sequence, sum_ns, *counts = _READ.unpack(raw)
        if not sequence & 1 and read_at(offset, 8) == raw[:8]:
            break
    return HistogramSnapshot(counts, sum_ns)


def discard(_duration_ns: int) -> None:
    """Record nothing."""


class HistogramWriter:
    """Collects durations during a step and adds them to the page in one go.

    `record(duration_ns)` is the append of a bounded queue itself, the cheapest call Python has; `flush`
    does the arithmetic once a step. `record_many` is for one duration that many share.
    """

    __slots__ = ("_base", "_sequence", "_sum_ns", "_words", "pending", "record", "shared")

    def __init__(self, words: memoryview | None, base: int) -> None:
        self._words = words
        self._base = base
        self._sequence = 0
        self._sum_ns = 0
        self.pending: deque[int] = deque(maxlen=PENDING if words is not None else 0)
        self.record: Callable[[int], None] = self.pending.append
        self.shared: dict[int, int] = {}
        """Pending too: how many times each of these durations."""

    def record_many(self, duration_ns: int, count: int) -> None:
        """`record` the same duration `count` times, at the cost of once."""
        if self._words is not None:
            self.shared[duration_ns] = self.shared.get(duration_ns, 0) + count

    def flush(self) -> None:
        """Add what is pending."""
        words, base, pending = self._words, self._base, self.pending
        if words is None or not (pending or self.shared):
            return
        words[base] = self._sequence + 1
        sum_ns = self._sum_ns
        first = base + 2
        for duration_ns in pending:
            if _LOW_NS <= duration_ns < _HIGH_NS:
                shift = duration_ns.bit_length() - _SHIFT
                words[first + (shift << _SUB_BITS) + (duration_ns >> shift) - _BIAS] += 1
                sum_ns += duration_ns
            else:
                words[first + bucket_index(duration_ns)] += 1
                # A clock that jumped must not overflow the sum.
                sum_ns += min(max(duration_ns, 0), _HIGH_NS)
        pending.clear()
        if self.shared:
            for duration_ns, count in self.shared.items():
                words[first + bucket_index(duration_ns)] += count
                sum_ns += count * min(max(duration_ns, 0), _HIGH_NS)
            self.shared.clear()
        self._sum_ns = sum_ns
        words[base + 1] = sum_ns
        self._sequence += 2
        words[base] = self._sequence

    def disable(self) -> None:
        """Record nothing from now on. A `record` that the engine kept fills a queue that is bounded."""
        self._words = None
        self.pending.clear()
        self.shared.clear()
        self.record = discard
