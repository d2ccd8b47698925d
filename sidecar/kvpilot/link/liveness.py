"""Silence is classified, not assumed.

- `dead`: the writer's lock is gone, so its process is.
- `idle`: nothing running, nothing waiting, nothing in flight at the valve: gauges hold, rates are zero.
- `stalled`: work, and no step for longer than max(2 s, 5 x p99 step).
- `wedged`: the valve has requests in flight and no response byte for long; the engine not stalled.
- `live`: anything else.
"""

from typing import Literal

Liveness = Literal["dead", "idle", "live", "stalled", "wedged"]

STALLED_AFTER_S = 2.0
STALLED_AFTER_STEPS = 5.0
WEDGED_AFTER_S = 30.0
"""Longer than a response without streaming may honestly take on its own."""


def stalled_after_s(p99_step_s: float | None) -> float:
    """How long an engine with work may be silent. Without a known p99: STALLED_AFTER_S."""
    return max(STALLED_AFTER_S, STALLED_AFTER_STEPS * (p99_step_s or 0.0))


def classify(
    *,
    lock_held: bool,
    running: int,
    waiting: int,
    seconds_since_step: float,
    p99_step_s: float | None = None,
    in_flight: int = 0,
    seconds_since_byte: float | None = None,
) -> Liveness:
    """State of one engine rank. `seconds_since_byte`: since the last response byte, or since the oldest
    request now in flight arrived if that is later; None where there is no valve.
    """
    if not lock_held:
        return "dead"
    if not (running or waiting or in_flight):
        return "idle"
    if (running or waiting) and seconds_since_step > stalled_after_s(p99_step_s):
        return "stalled"
    if in_flight and seconds_since_byte is not None and seconds_since_byte > WEDGED_AFTER_S:
        return "wedged"
    return "live"
