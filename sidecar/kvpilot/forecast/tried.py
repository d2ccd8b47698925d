"""What became of forecasts of exhaustion: their own record, and the band that it makes of the next one.

Every `MARK_S` a forecast is noted, and when KV memory is exhausted, the true time over the forecast one is an
outcome; where it has not come after `LIMIT_FACTOR` times what was said, the outcome is infinite. Quantiles of
late outcomes, times the next forecast, are what it should have said: nothing is assumed about why it was off.
The early end of the band has a record of its own, since it often is all that is finite. Fewer outcomes than
`LEAST_OUTCOMES` change nothing. The middle moves by at most `MOST_FACTOR` either way: whoever cried wolf ten
times is still believed when the wolf is at the door.
"""

from heapq import heappop, heappush

from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.residuals import Residuals

MARK_S = 0.25
LIMIT_FACTOR = 20.0
LEAST_LIMIT_S, MOST_LIMIT_S = 20.0, 60.0
LEAST_OUTCOMES = 16
OUTCOMES = 128
"""Remembered: half a minute of a pool that is always about to be full."""
MOST_FACTOR = 10.0
_INF = float("inf")


class _Tried:
    """Of one quantile: outcomes over what was said."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float, float]] = []
        """(when it has not come true, when it was made, what it said), the first to come due first."""
        self._marked_s = -_INF
        self._outcomes = Residuals(OUTCOMES)

    def observe(self, at_s: float, exhausted: bool) -> None:
        marks = self._marks
        while marks and (exhausted or at_s > marks[0][0]):
            _, made_s, said_s = heappop(marks)
            self._outcomes.add((at_s - made_s) / said_s if exhausted else _INF)

    def mark(self, at_s: float, said_s: float) -> None:
        if 0 < said_s < _INF and at_s >= self._marked_s + MARK_S:
            self._marked_s = at_s
            limit_s = min(max(LIMIT_FACTOR * said_s, LEAST_LIMIT_S), MOST_LIMIT_S)
            heappush(self._marks, (at_s + limit_s, at_s, said_s))

    def factor(self, q: float) -> float | None:
        """What to take this quantile times, to be right in a share `q`; None where too little was tried."""
        return None if len(self._outcomes) < LEAST_OUTCOMES else self._outcomes.quantile(q)


class TriedExhaustion:
    """Fed once a tick, in the engine's own time."""

    def __init__(self) -> None:
        self._early, self._middle = _Tried(), _Tried()

    def observe(self, at_s: float, exhausted: bool) -> None:
        """Whether not every running request can have one more block now."""
        self._early.observe(at_s, exhausted)
        self._middle.observe(at_s, exhausted)

    def mark(self, at_s: float, forecast: Estimate) -> None:
        """What is forecast now, as the model says it."""
        self._early.mark(at_s, forecast.p10)
        self._middle.mark(at_s, forecast.p50)

    def tried(self, forecast: Estimate) -> Estimate:
        """The forecast as its record makes it."""
        early, middle, late = forecast
        if not 0 < middle < _INF:
            first = self._early.factor(0.1)
            return forecast if first is None or early <= 0 else Estimate(early * first, middle, late)
        factors = [self._middle.factor(q) for q in (0.1, 0.5, 0.9)]
        if None in factors:
            return forecast
        low, centre, high = (factor for factor in factors if factor is not None)
        centre = min(max(centre, 1 / MOST_FACTOR), MOST_FACTOR)
        return Estimate(middle * min(low, centre), middle * centre, middle * max(high, centre))
