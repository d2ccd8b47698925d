"""What became of forecasts of exhaustion: their own record, and the band that it makes of the next one.

Every `MARK_S` a forecast is noted, and when KV memory is exhausted, the true time over the forecast one is an
outcome; where it has not come after `LIMIT_FACTOR` times what was said, the outcome is infinite. Quantiles of
late outcomes, times the next forecast, are what it should have said: nothing is assumed about why it was off.
What is so at one load is not at the next, so the quantiles taken move as well: out a little whenever the
truth fell outside the band, in a little less whenever it did not, until one time in ten falls outside on
either side (adaptive conformal inference: Gibbs and Candes, NeurIPS 2021).

The early end of the band has a record of its own, since it often is all that is finite. Fewer outcomes than
`LEAST_OUTCOMES` change nothing. The middle moves by at most `MOST_FACTOR` either way: whoever cried wolf ten
times is still believed when the wolf is at the door.
"""

from heapq import heappop, heappush

from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.residuals import Residuals

MARK_S = 0.25
LIMIT_FACTOR = 10.0
LEAST_LIMIT_S, MOST_LIMIT_S = 10.0, 60.0
LEAST_OUTCOMES = 16
OUTCOMES = 128
"""Remembered: half a minute of a pool that is always about to be full."""
MOST_FACTOR = 10.0
OUTSIDE = 0.1
"""Of the truths, on either side of the band."""
PACE = 0.02
"""How far an outcome moves the quantiles taken."""
_MOST_OUT, _MOST_IN = 0.005, 0.4
_INF = float("inf")


class _Tried:
    """Of one quantile: outcomes over what was said, and which of their quantiles make a good band."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float, float, Estimate]] = []
        """(when it has not come true, when it was made, what the model said, what was said in the end), the
        first to come due first.
        """
        self._marked_s = -_INF
        self._outcomes = Residuals(OUTCOMES)
        self._low = self._high = OUTSIDE

    def observe(self, at_s: float, exhausted: bool) -> None:
        marks = self._marks
        while marks and (exhausted or at_s > marks[0][0]):
            _, made_s, said_s, band = heappop(marks)
            actual_s = at_s - made_s if exhausted else _INF
            self._outcomes.add(actual_s / said_s)
            self._low = _moved(self._low, actual_s < band.p10)
            self._high = _moved(self._high, actual_s > band.p90)

    def mark(self, at_s: float, said_s: float, band: Estimate) -> None:
        if 0 < said_s < _INF and at_s >= self._marked_s + MARK_S:
            self._marked_s = at_s
            limit_s = min(max(LIMIT_FACTOR * said_s, LEAST_LIMIT_S), MOST_LIMIT_S)
            heappush(self._marks, (at_s + limit_s, at_s, said_s, band))

    def factors(self) -> Estimate | None:
        """What to take this quantile times, for a band; None where too little was tried."""
        if len(self._outcomes) < LEAST_OUTCOMES:
            return None
        low, middle, high = map(self._outcomes.quantile, (self._low, 0.5, 1 - self._high))
        return Estimate(low, middle, high)


def _moved(share: float, outside: bool) -> float:
    return min(max(share + PACE * (OUTSIDE - outside), _MOST_OUT), _MOST_IN)


class TriedExhaustion:
    """Fed once a tick, in the engine's own time."""

    def __init__(self) -> None:
        self._early, self._middle = _Tried(), _Tried()

    def observe(self, at_s: float, exhausted: bool) -> None:
        """Whether not every running request can have one more block now."""
        self._early.observe(at_s, exhausted)
        self._middle.observe(at_s, exhausted)

    def judged(self, at_s: float, forecast: Estimate) -> Estimate:
        """What the model forecasts now, as its record makes it; noted, to be judged in its turn."""
        band = self._tried(forecast)
        self._early.mark(at_s, forecast.p10, band)
        self._middle.mark(at_s, forecast.p50, band)
        return band

    def _tried(self, forecast: Estimate) -> Estimate:
        early, middle, late = forecast
        if not 0 < middle < _INF:
            first = self._early.factors()
            return forecast if first is None or early <= 0 else Estimate(early * first.p10, middle, late)
        factors = self._middle.factors()
        if factors is None:
            return forecast
        centre = min(max(factors.p50, 1 / MOST_FACTOR), MOST_FACTOR)
        low, high = min(factors.p10, centre), max(factors.p90, centre)
        return Estimate(middle * low, middle * centre, middle * high)
