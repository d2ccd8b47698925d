"""Time, injected.

Everything that behaves over time takes a `Clock`; nothing else may ask what time it is. So a policy's unit
test, a day's replay and the live loop run the same code, and no test sleeps.

Monotonic nanoseconds decide; wall time is only ever shown to people and written to records.
"""

import asyncio
import time
from typing import Protocol

NS = 1_000_000_000


class Clock(Protocol):
    """Where time comes from."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since an arbitrary point; never goes back. Comparable within one process only."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since the Unix epoch; may jump. For display and records, never for decisions."""
        ...

    async def sleep_until(self, deadline_ns: int) -> None:
        """Return once `monotonic_ns() >= deadline_ns`; at once (after one yield) if it already is."""
        ...


class SystemClock:
    """The machine's own clocks."""

    # As they are: step loops ask often.
    monotonic_ns = staticmethod(time.monotonic_ns)
    wall_ns = staticmethod(time.time_ns)

    async def sleep_until(self, deadline_ns: int) -> None:
        await asyncio.sleep(max(0, deadline_ns - time.monotonic_ns()) / NS)


class VirtualClock:
    """A clock that moves only when told to, or straight to the deadline that its owner waits for."""

    def __init__(self, start_ns: int = 0, wall_offset_ns: int = 1_700_000_000 * NS) -> None:
        self._now_ns = start_ns
        self._wall_offset_ns = wall_offset_ns

    def monotonic_ns(self) -> int:
        return self._now_ns

    def wall_ns(self) -> int:
        return self._now_ns + self._wall_offset_ns

    async def sleep_until(self, deadline_ns: int) -> None:
        self._now_ns = max(self._now_ns, deadline_ns)
        await asyncio.sleep(0)

    def advance(self, seconds: float) -> None:
        """Move `seconds` >= 0 ahead."""
        if seconds < 0:
            raise ValueError(f"seconds={seconds}: time does not go back")
        self._now_ns += round(seconds * NS)

    def move_to(self, at_ns: int) -> None:
        """Move ahead to `at_ns`; where that has passed, nothing moves."""
        if at_ns > self._now_ns:
            self._now_ns = at_ns
