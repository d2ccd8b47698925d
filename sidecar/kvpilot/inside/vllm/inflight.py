"""What a step was scheduled to do, kept until its output comes back: several are under way at once."""

from collections import deque
from collections.abc import Sequence
from typing import Any


class Flight:
    """One scheduled step. `output` is the scheduler's own object and identifies it."""

    # Defaults of the class: most steps have nothing to say on most of these.
    whole = False
    """Whether every running request decodes in it."""
    changes = 0
    """How often anybody had come or gone by then."""
    prefill_tokens = 0
    chunk_positions = 0
    chunks_reach = 0
    """Sum of the last positions of its prompt chunks."""
    recomputed_tokens = 0
    kv_limited = False
    budget_limited = False
    decodes = 0
    context_tokens = 0

    def __init__(self, output: Any, started_ns: int, echo: Sequence[float]) -> None:
        self.output = output
        self.started_ns = started_ns
        self.echo = echo
        """Controls in force when it was scheduled."""


class Flights:
    """Oldest first; one that never comes back does not stay for ever."""

    _MOST = 64

    def __init__(self) -> None:
        self._flights: deque[Flight] = deque(maxlen=self._MOST)
        self.add = self._flights.append
        """Take off: `add(flight)`."""

    def take(self, output: Any) -> Flight | None:
        """The flight of `output`; those before it are given up. None where it was never seen."""
        flights = self._flights
        if flights and flights[0].output is output:
            return flights.popleft()
        if not any(flight.output is output for flight in flights):
            return None
        while True:
            flight = flights.popleft()
            if flight.output is output:
                return flight
