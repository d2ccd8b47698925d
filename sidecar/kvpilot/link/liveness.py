"""Silence is classified, not assumed.

An engine rank is in exactly one state: the first of these that fits.

- `dead`: the writer's lock is gone, so its process is.
- `stalled`: work, and no step for longer than max(2 s, 5 x p99 step).
- `wedged`: answers do not leave (below), and none has left since that was found.
- `idle`: nothing running, nothing waiting, nothing awaited at the valves: gauges hold, rates are zero.
- `live`: anything else.

**Whether answers leave** is asked of both ends, for no silence alone tells: an answer that is not streamed
may honestly take minutes, and a health endpoint says 200 all the while. A request at the valves is
*awaited* until its response has ended, save while its client is slow to take bytes. Each awaited request
has to be somewhere: while the engine has as many running and waiting, nothing is wrong, however long no
byte leaves. (Several outputs of one request only make the engine's number larger.) Where it has fewer, a
request is on its way in (being parsed, tokenized, its images fetched), on its way out, or lost. It is
called lost when no valve lets a byte go and

- the engine finished a request 5 s ago, and has had fewer than are awaited for the last second; or
- the engine has had fewer than are awaited for 30 s on end: longer than a way in may take.

Only another byte, or another start of the engine, ends that. A valve process that does not write its page
any more cannot be believed in this: its requests count as nobody's. Where several ranks serve one set of
valves, one rank's count says little, and the first rule stands alone, without its second half.
"""

from dataclasses import dataclass
from typing import Literal

from kvpilot.clock import NS

Liveness = Literal["dead", "idle", "live", "stalled", "wedged"]

STALLED_AFTER_S = 2.0
STALLED_AFTER_STEPS = 5.0
UNANSWERED_AFTER_S = 5.0
"""A finished request's answer leaves in milliseconds."""
SURPLUS_FOR_S = 1.0
"""Longer than the counts of engine and valves, read at different moments, disagree by themselves."""
LOST_AFTER_S = 30.0


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
    awaited: int = 0,
    stuck: bool = False,
) -> Liveness:
    """State of one engine rank. `awaited`: at the valves, 0 without any; `stuck`: as `Answers` says."""
    if not lock_held:
        return "dead"
    if (running or waiting) and seconds_since_step > stalled_after_s(p99_step_s):
        return "stalled"
    if stuck:
        return "wedged"
    return "live" if running or waiting or awaited else "idle"


@dataclass(slots=True)
class Answers:
    """Whether the answers of one engine start leave; see the module docstring. Times are the observer's."""

    stuck: bool = False
    _finished: int | None = None
    _unanswered_ns: int | None = None
    """When the engine was first seen to have finished a request of which no byte has come."""
    _surplus_ns: int | None = None
    """Since when, without a break, more has been awaited than the engine has."""

    def observe(
        self, now_ns: int, *, awaited: int | None, held: int | None, finished: int | None, byte_left: bool
    ) -> bool:
        """One look; returns `stuck`.

        `awaited`: None where no valve can be believed. `held`: running and waiting in the engine, None where
        other ranks hold some of what is awaited. `finished`: cumulative. `byte_left`: since the last look.
        """
        if awaited is None or byte_left:
            self.stuck, self._unanswered_ns, self._surplus_ns = False, None, None
        elif awaited > (held or 0):
            self._surplus_ns = now_ns if self._surplus_ns is None else self._surplus_ns
            self.stuck = self.stuck or self._is_lost(now_ns, alone=held is not None)
        else:
            self._surplus_ns = None
        # Counted only while something is awaited: what else an engine serves leaves by other doors.
        if awaited and not byte_left and self._unanswered_ns is None and self._has_finished(finished):
            self._unanswered_ns = now_ns
        self._finished = finished
        return self.stuck

    def _has_finished(self, finished: int | None) -> bool:
        return finished is not None and self._finished is not None and finished > self._finished

    def _is_lost(self, now_ns: int, alone: bool) -> bool:
        assert self._surplus_ns is not None
        surplus_s = (now_ns - self._surplus_ns) / NS
        if alone and surplus_s >= LOST_AFTER_S:
            return True
        if self._unanswered_ns is None:
            return False
        return (now_ns - self._unanswered_ns) / NS >= UNANSWERED_AFTER_S and surplus_s >= SURPLUS_FOR_S
