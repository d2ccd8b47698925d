"""How much device memory will a step leave that computes so many tokens?

Free memory between steps, at its least of late (neighbours come and go), less what the manifest says that
each token's activations take. The band is what free memory was of late.
"""

from collections import deque

from kvpilot.clock import NS
from kvpilot.forecast.estimate import Estimate
from kvpilot.signals import Missing

WINDOW_S = 2.0


class DeviceHeadroom:
    """Fed with free device memory, in bytes."""

    def __init__(self, activation_bytes_per_token: int | None) -> None:
        self._bytes_per_token = activation_bytes_per_token
        self._free: deque[tuple[int, float]] = deque(maxlen=64)

    def observe(self, at_ns: int, free_bytes: float) -> None:
        self._free.append((at_ns, free_bytes))
        while self._free[0][0] < at_ns - WINDOW_S * NS:
            self._free.popleft()

    def after(self, tokens: float) -> Estimate | Missing:
        """Bytes that a step of `tokens` leaves; below 0 it does not fit."""
        if not self._bytes_per_token:
            return Missing("not_provided")
        if not self._free:
            return Missing("no_samples")
        needs = tokens * self._bytes_per_token
        free = [size for _, size in self._free]
        return Estimate(min(free) - needs, free[-1] - needs, max(free) - needs)
