"""The offered load: requests a second that arrive over the last seconds, whatever becomes of them.

Counted by the valves where there are any, since an engine never sees what they turn away; else by what the
engine has ever finished with and still holds.
"""

from collections import deque

from kvpilot.adapters.engine import Sight
from kvpilot.clock import NS
from kvpilot.signals import Missing

WINDOW_NS = 5 * NS
_ENDED = ("finished_total", "rejected_total", "cancelled_total", "failed_total")
_HELD = ("running", "waiting")


class OfferedLoad:
    """Sees every look at the engine; says the rate over the window that ends with the newest."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque()
        self._nonce: int | None = None
        self._by_valves = False

    def observe(self, sight: Sight) -> float | Missing:
        """The rate, or why there is none: counts begin anew with an engine and a first valve."""
        total = _total(sight)
        by_valves = sight.valve is not None
        if (sight.nonce, by_valves) != (self._nonce, self._by_valves):
            self._nonce, self._by_valves = sight.nonce, by_valves
            self._seen.clear()
        if total is None:
            return Missing("not_provided")
        if self._seen and total < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((sight.at_ns, total))
        # One from before the window is kept: the rate is over all of it.
        while len(self._seen) > 2 and self._seen[1][0] <= sight.at_ns - WINDOW_NS:
            self._seen.popleft()
        since_ns, then = self._seen[0]
        if sight.at_ns - since_ns < WINDOW_NS:
            return Missing("too_few_samples")
        return (total - then) * NS / (sight.at_ns - since_ns)


def _total(sight: Sight) -> float | None:
    """Requests that ever arrived."""
    if sight.valve is not None:
        return sight.valve.counts.get(("offered", None))
    record = sight.record
    if record is None:
        return None
    held, ended = [record.get(name) for name in _HELD], [record.get(name) for name in _ENDED]
    if None in held or ended[0] is None:
        return None
    return sum(count or 0.0 for count in (*held, *ended))
