"""A rule's states and the way between them: `inactive -> pending -> active -> leaving -> inactive`.

Pure. `for` and `keepFor` are elapsed time between ticks, never counts of ticks.
"""

from typing import NamedTuple

from kvpilot.policy.state import Phase

_ASKS_WHEN = (Phase.INACTIVE, Phase.PENDING)


class Standing(NamedTuple):
    """A phase and since when."""

    phase: Phase
    since_ns: int


def asks_when(phase: Phase) -> bool:
    """Whether this phase consults `when`; the others consult `until`."""
    return phase in _ASKS_WHEN


def advance(now: Standing, holds: bool, now_ns: int, for_ns: int, keep_for_ns: int) -> Standing:
    """The next standing; `holds` is the value of the condition that this phase consults."""
    if asks_when(now.phase):
        if not holds:
            return now if now.phase is Phase.INACTIVE else Standing(Phase.INACTIVE, now_ns)
        since_ns = now.since_ns if now.phase is Phase.PENDING else now_ns
        if now_ns - since_ns >= for_ns:
            return Standing(Phase.ACTIVE, now_ns)
        return Standing(Phase.PENDING, since_ns)
    if not holds:
        return now if now.phase is Phase.ACTIVE else Standing(Phase.ACTIVE, now_ns)
    since_ns = now.since_ns if now.phase is Phase.LEAVING else now_ns
    if now_ns - since_ns >= keep_for_ns:
        return Standing(Phase.INACTIVE, now_ns)
    return Standing(Phase.LEAVING, since_ns)
