"""What became of one arrival, as its client saw it and as the engine timed it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvpilot.workload.arrival import Arrival


class Fate(StrEnum):
    """Every arrival ends in exactly one of these."""

    FINISHED = "finished"
    """All tokens asked for came back, with the engine's times."""
    SHED = "shed"
    """The last answer was 429, or 503 with a time to come back; no retry was left or worth waiting for."""
    FAILED = "failed"
    """An error, a broken connection, or an answer short of its tokens."""
    ABANDONED = "abandoned"
    """The client lost patience and hung up."""
    UNFINISHED = "unfinished"
    """Still running when the drain ended."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`received_ns` and `emitted` (time, tokens of that step) are on the engine's clock, the rest on the
    client's.

    A retry keeps its first arrival: `waited_s` is what passed between the first attempt and the last one.
    """

    arrival: Arrival
    fate: Fate
    attempts: int
    waited_s: float
    ended_at_s: float
    http_status: int | None = None
    error: str | None = None
    received_ns: int = 0
    emitted: Sequence[tuple[int, int]] = ()

    @property
    def ttft_s(self) -> float | None:
        """First arrival to first token; None when no token came."""
        if not self.emitted:
            return None
        return self.waited_s + (self.emitted[0][0] - self.received_ns) / 1e9

    @property
    def output_tokens(self) -> int:
        return sum(tokens for _, tokens in self.emitted)

    def gaps(self) -> list[tuple[int, int]]:
        """(nanoseconds, tokens) of each emission after the first: its tokens share the time equally.

        Tokens that came together with the first one have no previous emission, so no gap.
        """
        return [
            (at - before, tokens)
            for (before, _), (at, tokens) in zip(self.emitted, self.emitted[1:], strict=False)
        ]
