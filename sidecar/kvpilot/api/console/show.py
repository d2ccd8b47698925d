"""What runs while a pilot flies: a point of history each second, and frames while somebody watches."""

import asyncio
import logging

from kvpilot.api.console.frame import frame
from kvpilot.api.console.history import History
from kvpilot.api.console.stream import event
from kvpilot.api.console.viewers import Viewers
from kvpilot.api.console.wire import encoded
from kvpilot.clock import NS, Clock
from kvpilot.flight import Flight
from kvpilot.publish.board import Board

BEAT_S = 0.5
AFTER_TICK_S = 0.03
"""Frames are made just after a tick, when the next one is far."""

_log = logging.getLogger(__name__)


class Show:
    """One for each pilot. `beat` is one turn of it; `run` beats in time with the ticks."""

    def __init__(self, flight: Flight, clock: Clock) -> None:
        self.viewers = Viewers()
        self.history = History(_classes(flight.pilot.board))
        self.failures = 0
        self._flight = flight
        self._clock = clock
        self._beats = 0

    def first(self) -> bytes:
        """What a viewer is sent at once: the history, and the newest frame."""
        history = {"columns": self.history.columns, "points": list(self.history.points)}
        return event("history", encoded(history)) + self._frame()

    def beat(self) -> None:
        """Half a second: a frame for those who watch, a point of history every other time."""
        point = None
        if self._beats % 2 == 0:
            point = self.history.take(self._flight.pilot.board)
        self._beats += 1
        if len(self.viewers):
            news = self._frame()
            self.viewers.show(news if point is None else event("point", encoded(point)) + news)

    def _frame(self) -> bytes:
        return event("frame", encoded(frame(self._flight)))

    async def run(self) -> None:
        """Until cancelled. A defect here costs frames, never a tick."""
        failed: str | None = None
        while True:
            await asyncio.sleep(self._until_next())
            try:
                self.beat()
                failed = None
            except Exception as error:
                self.failures += 1
                if failed != str(error):
                    _log.exception("the console shows nothing while this lasts")
                failed = str(error)

    def _until_next(self) -> float:
        tick = self._flight.pilot.board.tick
        if tick is None:
            return BEAT_S
        # Ticks come on a grid: five of them later, and a little.
        since_s = (self._clock.monotonic_ns() - tick.at_ns) / NS
        return min(max(BEAT_S + AFTER_TICK_S - since_s, BEAT_S / 5), BEAT_S)

    def close(self) -> None:
        """End all streams."""
        self.viewers.close()


def _classes(board: Board) -> tuple[str, ...]:
    found = [view.klass for view in board.views if view.signal == "itl_seconds" and view.klass is not None]
    return tuple(found)
