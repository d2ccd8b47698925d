"""The last ten minutes of what the page draws, a point a second, for who comes later than the trouble."""

from collections import deque
from typing import Any

from kvpilot.clock import NS
from kvpilot.publish.board import Board
from kvpilot.publish.status import number
from kvpilot.signals import Missing

MOST_POINTS = 600
SIGNALS_DRAWN = (
    "kv_occupancy",
    "requests_running",
    "requests_waiting",
    "decode_tokens",
    "prefill_tokens",
    "forecast.kv_exhaustion_seconds",
)
PER_CLASS = ("itl_seconds", "ttft_seconds")


class History:
    """Points as arrays, in the order of `columns`; the first is wall time in seconds. Missing is None."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._keys = [(name, None) for name in SIGNALS_DRAWN] + [
            (name, klass) for name in PER_CLASS for klass in classes
        ]
        self.columns = [
            "wall_s",
            *(name if klass is None else f"{name}/{klass}" for name, klass in self._keys),
        ]
        self.points: deque[list[Any]] = deque(maxlen=MOST_POINTS)

    def take(self, board: Board) -> list[Any]:
        """Add one point and return it."""
        wall_s = board.tick.wall_ns / NS if board.tick is not None else None
        point: list[Any] = [None if wall_s is None else round(wall_s, 1)]
        for name, klass in self._keys:
            value = board.value(name, klass)
            point.append(None if isinstance(value, Missing) else _short(value))
        self.points.append(point)
        return point


def _short(value: float) -> float | str:
    """Four digits are more than a screen can show."""
    plain = number(value)
    return plain if isinstance(plain, str) else float(f"{plain:.4g}")
