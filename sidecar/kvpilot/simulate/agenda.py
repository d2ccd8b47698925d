"""What is still to happen in virtual time, in order; two things at one moment in the order they were put in.

O(log n) to add and to take.
"""

from collections.abc import Callable
from heapq import heappop, heappush

from kvpilot.clock import VirtualClock

Happening = Callable[[], None]

NEVER_NS = 1 << 62


class Agenda:
    """Moves `clock` to each happening as it comes due."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self._heap: list[tuple[int, int, Happening]] = []
        self._added = 0

    def at(self, at_ns: int, happening: Happening) -> None:
        """At that moment, or at once where it has passed."""
        self._added += 1
        heappush(self._heap, (at_ns, self._added, happening))

    @property
    def next_ns(self) -> int:
        """When the next thing happens."""
        return self._heap[0][0] if self._heap else NEVER_NS

    def pass_to(self, until_ns: int) -> None:
        """Let everything up to and at `until_ns` happen, then it is that moment."""
        heap, clock = self._heap, self.clock
        while heap and heap[0][0] <= until_ns:
            at_ns, _, happening = heappop(heap)
            clock.move_to(at_ns)
            happening()
        clock.move_to(until_ns)

    def pass_one(self, until_ns: int) -> bool:
        """Let the next thing up to `until_ns` happen. False, at that moment, if there is none."""
        if self.next_ns > until_ns:
            self.clock.move_to(until_ns)
            return False
        at_ns, _, happening = heappop(self._heap)
        self.clock.move_to(at_ns)
        happening()
        return True
