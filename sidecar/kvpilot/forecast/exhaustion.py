"""When will no KV block be available, if the pool goes on as it does now?

The slope of available blocks over the last seconds, by Theil and Sen: the median slope over all pairs of
samples. A finishing request gives back dozens of blocks at once; the median of pairs ignores up to 29 % of
such jumps, where least squares would follow each.

At most `MOST_SAMPLES` samples are kept, so one estimate is at most 435 slopes and one sort: under 0.2 ms.
"""

from collections import deque
from collections.abc import Sequence

from kvpilot.clock import NS
from kvpilot.signals import Missing

WINDOW_S = 3.0
LEAST_SPAN_S = 0.5
LEAST_SAMPLES = 5
MOST_SAMPLES = 30


def theil_sen(samples: Sequence[tuple[int, float]]) -> float | None:
    """The median slope per second over pairs of (time in ns, value); None without two distinct times."""
    slopes = sorted(
        (after - before) * NS / (end - start)
        for index, (start, before) in enumerate(samples)
        for end, after in samples[index + 1 :]
        if end > start
    )
    if not slopes:
        return None
    middle = len(slopes) // 2
    return slopes[middle] if len(slopes) % 2 else (slopes[middle - 1] + slopes[middle]) / 2


class KvExhaustion:
    """Keeps the newest samples of available blocks; `seconds` is the forecast."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, float]] = deque()
        self._spacing_ns = round(WINDOW_S / MOST_SAMPLES * NS)

    def clear(self) -> None:
        """Forget everything: another engine, or the same one started again."""
        self._samples.clear()

    def observe(self, at_ns: int, available_blocks: float) -> None:
        """One sample. Closer to the one before than the window's share, it is passed over."""
        if self._samples and at_ns - self._samples[-1][0] < 0.8 * self._spacing_ns:
            return
        self._samples.append((at_ns, available_blocks))
        while len(self._samples) > MOST_SAMPLES or self._samples[0][0] < at_ns - WINDOW_S * NS:
            self._samples.popleft()

    def seconds(self, available_blocks: float) -> float | Missing:
        """Time until nothing of `available_blocks` is left; infinite while they do not fall."""
        if available_blocks <= 0:
            return 0.0
        samples = list(self._samples)
        if len(samples) < LEAST_SAMPLES or samples[-1][0] - samples[0][0] < LEAST_SPAN_S * NS:
            return Missing("too_few_samples")
        blocks_per_s = theil_sen(samples)
        # Less than a block over the whole window is the grid on which blocks are counted, not a trend.
        if blocks_per_s is None or blocks_per_s * WINDOW_S > -1:
            return float("inf")
        return available_blocks / -blocks_per_s
