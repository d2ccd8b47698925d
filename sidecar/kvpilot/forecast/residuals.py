"""How far outcomes were from predictions of late: a window of ratios actual / predicted, and its quantiles.

Quantiles of what was seen, not of a fitted law: noise has tails, and dividing a target by the 97 % quantile
is what makes a bound of a mean. After `WINDOW` more outcomes no trace of an older one is left.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque

from kvpilot.forecast.estimate import quantile

WINDOW = 256


class Residuals:
    """The latest ratios; `add` is O(log WINDOW) and a memory move, a quantile O(1)."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, ratio: float) -> None:
        """One outcome over its prediction; both above zero."""
        if len(self._recent) == self._window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(ratio)
        insort(self._sorted, ratio)

    def quantile(self, q: float) -> float:
        """The q-quantile of the ratios; there must be some."""
        return quantile(self._sorted, q)

    def share_above(self, ratio: float) -> float:
        """The share of ratios that exceed `ratio`; 0 without any."""
        return 1 - bisect_right(self._sorted, ratio) / len(self._sorted) if self._sorted else 0.0
