"""When will no KV block be available, if things go on as they do now?

For engines that do not predict what their running requests will hold (`kvpilot.forecast.survival` is for
those that do): the slope of available blocks over the last seconds, by Theil and Sen, the median slope over
all pairs of samples. A finishing request gives back dozens of blocks at once; the median of pairs ignores up
to 29 % of such jumps, where least squares would follow each. The band is that of the pairs' slopes.

At most `MOST_SAMPLES` samples are kept, so one estimate is at most 435 slopes and one sort: under 0.2 ms.
"""

from collections import deque
from collections.abc import Sequence

from kvpilot.clock import NS
from kvpilot.forecast.estimate import Estimate, quantile
from kvpilot.signals import Missing

WINDOW_S = 3.0
LEAST_SPAN_S = 0.5
LEAST_SAMPLES = 5
MOST_SAMPLES = 30
_INF = float("inf")


def slopes(samples: Sequence[tuple[int, float]]) -> list[float]:
    """Slopes per second over all pairs of (time in ns, value), ascending; pairs at one time have none."""
    return sorted(
        (after - before) * NS / (end - start)
        for index, (start, before) in enumerate(samples)
        for end, after in samples[index + 1 :]
        if end > start
    )


def theil_sen(samples: Sequence[tuple[int, float]]) -> float | None:
    """The median slope per second; None without two distinct times."""
    found = slopes(samples)
    return _median(found) if found else None


class KvExhaustion:
    """Keeps the newest samples of available blocks; `seconds` is the forecast by their slope."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, float]] = deque()
        self._spacing_ns = round(WINDOW_S / MOST_SAMPLES * NS)

    def observe(self, at_ns: int, available_blocks: float) -> None:
        """One sample. Closer to the one before than the window's share, it is passed over."""
        if self._samples and at_ns - self._samples[-1][0] < 0.8 * self._spacing_ns:
            return
        self._samples.append((at_ns, available_blocks))
        while len(self._samples) > MOST_SAMPLES or self._samples[0][0] < at_ns - WINDOW_S * NS:
            self._samples.popleft()

    def seconds(self, available_blocks: float) -> Estimate | Missing:
        """Time until nothing of `available_blocks` is left; infinite while they do not fall."""
        if available_blocks <= 0:
            return Estimate(0.0, 0.0, 0.0)
        samples = list(self._samples)
        if len(samples) < LEAST_SAMPLES or samples[-1][0] - samples[0][0] < LEAST_SPAN_S * NS:
            return Missing("too_few_samples")
        found = slopes(samples)
        if not found:
            return Missing("too_few_samples")
        slope = quantile(found, 0.1), _median(found), quantile(found, 0.9)
        return Estimate(*(_until(available_blocks, each) for each in slope))


def _median(ordered: Sequence[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _until(blocks: float, per_s: float) -> float:
    # Less than a block over the whole window is the grid on which blocks are counted, not a trend.
    return blocks / -per_s if per_s * WINDOW_S <= -1 else _INF
