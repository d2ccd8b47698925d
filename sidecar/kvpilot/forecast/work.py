"""What engine steps computed, as differences of the step record's cumulative counts.

A record's duration is that of its own step alone, so it explains the difference to the record before only if
exactly that one step lies between them. Pairs that cover more (the reader fell behind, records were torn) or
none (an idle engine told of something else), or a step without a duration, are passed over.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kvpilot.clock import NS
from kvpilot.link.records import StepRecord


class Work(NamedTuple):
    """What one step computes, in tokens."""

    prefill: float = 0.0
    decodes: float = 0.0
    """Sequences that decode: a token each, and what is drafted."""
    context: float = 0.0
    """KV positions that they read."""
    chunk_positions: float = 0.0
    """Sum over prompt chunks of length times last position."""
    drafted: float = 0.0


class WorkedStep(NamedTuple):
    """One step: what it computed, and how long that took."""

    work: Work
    seconds: float


NEEDED = ("duration_ns", "steps_total", "prefill_tokens_total", "decode_sequences_total")
"""Without these there is no telling what a step computed."""
_TOTALS = (
    "prefill_tokens_total",
    "decode_sequences_total",
    "context_tokens_total",
    "chunk_positions_total",
    "drafted_tokens_total",
)
"""In the order of `Work`. An engine without one of the last three tells less, and is fitted with less."""


def works_told(record: StepRecord) -> bool:
    """Whether this engine's records say what a step computed."""
    return all(name in record for name in NEEDED)


class WorkReader:
    """Turns records, in order, into the steps between them. Remembers the last one."""

    def __init__(self) -> None:
        self._last: StepRecord | None = None

    def read(self, records: Iterable[StepRecord]) -> Iterator[WorkedStep]:
        """Steps that these records tell whole. Nothing where the engine lacks what is `NEEDED`."""
        for record in records:
            last, self._last = self._last, record
            step = None if last is None else between(last, record)
            if step is not None:
                yield step


def between(before: StepRecord, after: StepRecord) -> WorkedStep | None:
    """The step between two records; None unless it is exactly one, with a duration."""
    if not works_told(after) or after["steps_total"] - before["steps_total"] != 1:
        return None
    work = Work(*(_difference(before, after, name) for name in _TOTALS))
    if after["duration_ns"] <= 0 or min(work) < 0 or not (work.prefill or work.decodes):
        return None
    return WorkedStep(work, after["duration_ns"] / NS)


def _difference(before: StepRecord, after: StepRecord, name: str) -> float:
    return after[name] - before[name] if name in after else 0.0
