"""How many prompt tokens a second come to the engine, and how that is shared among classes.

What came is what waits now more than before, and what was served meanwhile: from the engine's own counts, so
that it needs no valve. How the classes share in it is told by valves, which count requests by class, and by
the size of those that wait; without valves nobody can say.
"""

from collections.abc import Mapping, Sequence

from kvpilot.forecast.faded import FadedShare
from kvpilot.link.telemetry_page import ClassRow

TAU_S = 20.0
"""About as long as those wait for whom this is asked: a burst of seconds says little on half a minute."""
_UNKNOWN_TOKENS = 1.0
"""Size of a request of a class that was never seen waiting: only ratios count where all are unknown."""


class Arrivals:
    """Fed once a tick with the engine's time and counts."""

    def __init__(self) -> None:
        self._total = FadedShare(TAU_S)
        self._last: tuple[float, float] | None = None
        self._requests: dict[str, FadedShare] = {}
        self._admitted: dict[str, float] = {}
        self._sizes: dict[str, FadedShare] = {}

    def observe(
        self,
        at_s: float,
        served_tokens: float,
        waiting_tokens: float,
        rows: Sequence[ClassRow] = (),
        admitted: Mapping[str, float] | None = None,
    ) -> None:
        """`served_tokens`: prompt tokens taken care of since the engine started; `admitted`: requests let in
        by valves, by class, since they started.
        """
        seen = served_tokens + waiting_tokens
        last, self._last = self._last, (at_s, seen)
        for row in rows:
            size = self._sizes.setdefault(row.name, FadedShare(TAU_S))
            size.add(at_s, row.waiting_prompt_tokens, row.waiting)
        if last is None or at_s <= last[0]:
            return
        elapsed_s = at_s - last[0]
        # Negative where clients left the queue: what is gone never came, as far as the engine is concerned.
        self._total.add(at_s, seen - last[1], elapsed_s)
        for name, count in (admitted or {}).items():
            before = self._admitted.get(name, count)
            self._admitted[name] = count
            self._requests.setdefault(name, FadedShare(TAU_S)).add(at_s, max(0.0, count - before), elapsed_s)

    def tokens_per_s(self) -> float | None:
        """Of all classes together; None before two looks."""
        rate = self._total.share
        return None if rate is None else max(0.0, rate)

    def request_tokens(self, name: str | None = None) -> float | None:
        """Prompt tokens of a request of that class that waits; None if none was seen waiting."""
        if name is not None:
            size = self._sizes.get(name)
            return None if size is None else size.share
        part = sum(size.part for size in self._sizes.values())
        whole = sum(size.whole for size in self._sizes.values())
        return part / whole if whole > 0 else None

    def share(self, names: Sequence[str]) -> float:
        """The share of these classes in what comes, in tokens; 0 where nobody counts them."""
        rates = {name: (each.share or 0.0) * self._size(name) for name, each in self._requests.items()}
        total = sum(rates.values())
        return sum(rates.get(name, 0.0) for name in names) / total if total > 0 else 0.0

    def _size(self, name: str) -> float:
        return self.request_tokens(name) or self.request_tokens() or _UNKNOWN_TOKENS
