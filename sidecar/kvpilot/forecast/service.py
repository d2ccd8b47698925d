"""How fast does the engine work through prompts when it has a queue, and how wrong are forecasts from that?

The rate counts only time in which somebody waited: an engine without a queue computes what arrives, and its
rate is the arrivals'. It is kept when the queue is gone: the next burst is judged by it from its first tick.

Forecasts are judged by what happened: every `MARK_S` under backlog the time for all that waits is forecast
and noted, and when so many prompt tokens have been computed or have left unserved, or the queue is empty, the
true time over the forecast one is a residual. Their quantiles are the band of every forecast made with the
rate: they also hold what the rate does not, such as clients that give up.
"""

from collections import deque
from math import erfc, log, sqrt
from typing import NamedTuple

from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.faded import FadedShare
from kvpilot.forecast.residuals import Residuals
from kvpilot.signals import Missing

TAU_S = 2.0
LEAST_BACKLOG_S = 0.25
"""Time under backlog before there is a rate; and what of it outlives a pause."""
MARK_S = 0.25
MOST_MARKS = 256
LEAST_OUTCOMES = 16
OUTCOMES = 64
"""Remembered."""
UNTRIED = Estimate(0.6, 1.0, 1.7)
"""The band while fewer outcomes are known: a factor with a deviation of `_SIGMA` in the logarithm."""
_SIGMA = 0.4


class _Mark(NamedTuple):
    at_s: float
    gone_tokens: float
    """The count of tokens out of the queue when all that waited will be."""
    forecast_s: float


class ServiceRate:
    """Prompt tokens per second under backlog. Fed once a tick with the engine's own time and counts."""

    def __init__(self) -> None:
        self._rate = FadedShare(TAU_S, LEAST_BACKLOG_S)
        self._last: tuple[float, float, float] | None = None
        self._backlog_s = 0.0
        self._marks: deque[_Mark] = deque(maxlen=MOST_MARKS)
        self._outcomes = Residuals(OUTCOMES)

    def observe(
        self, at_s: float, prompt_tokens: float, waiting_tokens: float, left_tokens: float = 0.0
    ) -> None:
        """`prompt_tokens` served since the engine started, `waiting_tokens` of requests not admitted, and
        `left_tokens`: about how many were taken out of the queue unserved, since the engine started.
        """
        last, self._last = self._last, (at_s, prompt_tokens, waiting_tokens)
        if last is None or at_s <= last[0]:
            return
        # Whoever waited at the start of the time waited in it; requests that came in it did so for a part.
        if last[2] > 0:
            elapsed_s = at_s - last[0]
            self._rate.add(at_s, max(0.0, prompt_tokens - last[1]), elapsed_s)
            self._backlog_s += elapsed_s
        self._settle(at_s, prompt_tokens + left_tokens, waiting_tokens)
        self._mark(at_s, prompt_tokens + left_tokens, waiting_tokens)

    def tokens_per_s(self) -> float | Missing:
        """The rate, as last measured."""
        rate = self._rate.share
        if rate is None:
            return Missing("no_samples")
        return rate if self._backlog_s >= LEAST_BACKLOG_S else Missing("too_few_samples")

    def age_s(self, at_s: float) -> float | None:
        """How long nobody has waited."""
        return self._rate.age_s(at_s)

    @property
    def band(self) -> Estimate:
        """True times over forecast ones."""
        if len(self._outcomes) < LEAST_OUTCOMES:
            return UNTRIED
        return Estimate(*map(self._outcomes.quantile, (0.1, 0.5, 0.9)))

    def chance_above(self, ratio: float) -> float:
        """The probability that a true time is more than `ratio` times its forecast."""
        if ratio <= 0:
            return 1.0
        known = len(self._outcomes)
        untried = erfc(log(ratio) / (_SIGMA * sqrt(2))) / 2
        return (known * self._outcomes.share_above(ratio) + LEAST_OUTCOMES * untried) / (
            known + LEAST_OUTCOMES
        )

    def _settle(self, at_s: float, gone_tokens: float, waiting_tokens: float) -> None:
        """Residuals of forecasts whose time has come."""
        marks = self._marks
        while marks and (gone_tokens >= marks[0].gone_tokens or waiting_tokens <= 0):
            mark = marks.popleft()
            self._outcomes.add((at_s - mark.at_s) / mark.forecast_s)

    def _mark(self, at_s: float, gone_tokens: float, waiting_tokens: float) -> None:
        rate = self.tokens_per_s()
        if isinstance(rate, Missing) or rate <= 0 or waiting_tokens <= 0:
            return
        if self._marks and at_s < self._marks[-1].at_s + MARK_S:
            return
        self._marks.append(_Mark(at_s, gone_tokens + waiting_tokens, waiting_tokens / rate))
