"""Queue wait, the chance to miss the TTFT, and credits, for each class: a frozen view of one moment.

A request waits for all prompt tokens ahead of it, at the rate that the engine serves under backlog. Where
classes are served in order, that is those of its class and of higher ones, less what higher classes will
bring meanwhile; where requests are served as they came, it is everybody's. An empty queue means no wait,
whatever the rate; anything else is unknown until the engine has been seen with a backlog once. Before that
nothing should be turned away for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvpilot.forecast.arrivals import Arrivals
from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.service import ServiceRate
from kvpilot.signals import Missing

_INF = float("inf")
_RUSH = (0.5, 1.0, 1.5)
"""For p10, p50 and p90: what higher classes bring while one waits, over what they bring now."""


@dataclass(frozen=True, slots=True)
class QueueForecast:
    """`waiting` is prompt tokens by class, lowest class first; `all` where the engine tells no classes."""

    rate: float | Missing
    """Prompt tokens per second under backlog."""
    service: ServiceRate
    waiting: Mapping[str, float]
    overtaking: Mapping[str, float] = field(default_factory=dict)
    """Prompt tokens per second that come with higher classes, by class."""
    own_tokens: Mapping[str, float] = field(default_factory=dict)
    """Prompt tokens of a typical request, by class."""
    promises: Mapping[str, float] = field(default_factory=dict)
    """TTFT targets in seconds, by class."""
    by_class: bool = True
    """Whether higher classes are served first."""
    on_the_way: float = 0.0
    """Prompt tokens that a valve has let in and the engine has not shown yet: nobody may grant them again."""

    def wait(self, name: str) -> Estimate | Missing:
        """Seconds that a request of this class waits if it comes now."""
        ahead, band = self._ahead(name), self.service.band
        found = []
        for factor, rush in zip(band, _RUSH, strict=True):
            seconds = self._seconds(name, ahead, rush)
            if isinstance(seconds, Missing):
                return seconds
            found.append(seconds * factor)
        return Estimate(*found)

    def ttft_miss(self, name: str, ttft_s: float) -> float | Missing:
        """The probability that the first token of such a request comes later than `ttft_s`."""
        own = self.own_tokens.get(name)
        if own is None:
            return Missing("no_samples")
        seconds = self._seconds(name, self._ahead(name) + own)
        if isinstance(seconds, Missing):
            return seconds
        return self.service.chance_above(ttft_s / seconds) if seconds > 0 else 0.0

    def ttft_ratio(self, name: str, ttft_s: float) -> float | Missing:
        """Predicted time to the first token of such a request, over its target."""
        own = self.own_tokens.get(name)
        seconds = self._seconds(name, self._ahead(name) + (own or 0.0))
        return seconds if isinstance(seconds, Missing) else seconds / ttft_s

    def pressing_wait_ratio(self) -> float | Missing:
        """Predicted wait to be admitted over the target, for the class with the tightest one: 0 while nobody
        is ahead of it.
        """
        if not self.promises:
            return Missing("not_provided")
        name = min(self.promises, key=lambda each: self.promises[each])
        seconds = self._seconds(name, self._ahead(name))
        return seconds if isinstance(seconds, Missing) else seconds / self.promises[name]

    def credits(self, name: str, ttft_s: float) -> float | Missing:
        """Prompt tokens of this class and below that can still be served within `ttft_s`. A margin, for
        errors that cost more on one side than on the other, is the caller's to take from the target.

        Where requests are served as they come, what is let in of one class is ahead of everybody who comes
        later: the target is scaled to what the most pressing class was promised.

        Clients that give up make waits shorter than the rate says; nobody is let in on the strength of that.
        """
        if name not in self.waiting:
            return Missing("not_provided")
        if isinstance(self.rate, Missing):
            return self.rate
        promised = self._ahead(name) + self.on_the_way
        left = max(0.0, self.rate - self.overtaking.get(name, 0.0))
        within_s = ttft_s * self._press(name)
        return max(0.0, left * within_s / max(1.0, self.service.band.p50) - promised)

    def _press(self, name: str) -> float:
        """The tightest promise over this class's, where all wait in one queue; at most 1."""
        own = self.promises.get(name)
        if self.by_class or not own:
            return 1.0
        return min(1.0, min(self.promises.values()) / own)

    def _ahead(self, name: str) -> float:
        names = list(self.waiting)
        first = names.index(name) if self.by_class else 0
        return sum(self.waiting[each] for each in names[first:])

    def _seconds(self, name: str, tokens: float, rush: float = 1.0) -> float | Missing:
        if tokens <= 0:
            return 0.0
        if isinstance(self.rate, Missing):
            return self.rate
        left = self.rate - rush * self.overtaking.get(name, 0.0)
        return tokens / left if left > 0 else _INF


def overtaking(arrivals: Arrivals, names: list[str]) -> dict[str, float]:
    """Prompt tokens per second that come with classes above each of `names` (lowest first)."""
    total = arrivals.tokens_per_s() or 0.0
    return {name: total * arrivals.share(names[level + 1 :]) for level, name in enumerate(names)}
