"""The last minute in a few rows, closer together towards the end.

A row sums up the steps between two moments before the end: counts are differences of cumulative counters,
levels are those of its last record. What the engine does not record is None, never 0.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from kvpilot.clock import NS
from kvpilot.incident.recording import Recording
from kvpilot.link.fields import KNOB_PREFIX
from kvpilot.link.records import StepRecord

EDGES_S = (
    *(3600, 1800, 900, 600, 300, 180, 120, 90, 60, 50, 40, 30, 20, 15, 10, 8, 6, 5, 4, 3, 2),
    *(1.5, 1, 0.75, 0.5, 0.25, 0),
)
"""Seconds before the end at which one row gives way to the next."""

_COUNTERS = ("prefill_tokens_total", "decode_tokens_total", "preemptions_total")


@dataclass(frozen=True, slots=True)
class Move:
    """A knob's value in force at the beginning and the end of a row, how often it changed between, and how
    far.
    """

    knob: str
    before: float
    after: float
    changes: int
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class Row:
    """Steps that ended at most `from_s` and more than `to_s` seconds before the end (the last row: all)."""

    from_s: float
    to_s: float
    steps: int = 0
    step_p50_ms: float | None = None
    step_max_ms: float | None = None
    running: float | None = None
    waiting: float | None = None
    prefill_tokens: float | None = None
    decode_tokens: float | None = None
    preemptions: float | None = None
    kv_used: float | None = None
    """Referenced KV blocks over all blocks."""
    host_available_bytes: float | None = None
    device_free_bytes: float | None = None
    moves: tuple[Move, ...] = field(default=())


def kv_used(recording: Recording, record: StepRecord) -> float | None:
    """Referenced KV blocks over all; cached blocks that nobody reads count as free."""
    free, blocks = record.get("kv_blocks_free"), recording.manifest.blocks
    if free is None or not blocks:
        return None
    return (blocks - free - (record.get("kv_blocks_cached") or 0)) / blocks


def timeline(recording: Recording, seconds: float = 60.0) -> list[Row]:
    """Rows of the last `seconds`, oldest first, without those before the oldest record."""
    end_ns = recording.last_sign_ns
    timed = [record for record in recording.steps if record.get("time_ns") is not None]
    if end_ns is None or not timed:
        return []
    times = [record["time_ns"] for record in timed]
    edges = [float(seconds), *(edge for edge in EDGES_S if edge < seconds)]
    rows = []
    for from_s, to_s in pairwise(edges):
        first = bisect_left(times, end_ns - from_s * NS)
        last = bisect_left(times, end_ns - to_s * NS) if to_s else bisect_right(times, end_ns)
        if last > 0:
            rows.append(_row(recording, timed, first, last, from_s, to_s))
    return rows


def _row(
    recording: Recording, timed: Sequence[StepRecord], first: int, last: int, from_s: float, to_s: float
) -> Row:
    """The row of timed[first:last]; with none of them, what held on from before."""
    inside, newest = timed[first:last], timed[last - 1]
    before = timed[first - 1] if first else None
    prefill, decode, preemptions = (_moved(before, inside, newest, name) for name in _COUNTERS)
    durations = [ns / 1e6 for record in inside if (ns := record.get("duration_ns"))]
    return Row(
        from_s=from_s,
        to_s=to_s,
        steps=len(durations) if "duration_ns" in newest else len(inside),
        step_p50_ms=median(durations) if durations else None,
        step_max_ms=max(durations, default=None),
        running=newest.get("running"),
        waiting=newest.get("waiting"),
        prefill_tokens=prefill,
        decode_tokens=decode,
        preemptions=preemptions,
        kv_used=kv_used(recording, newest),
        host_available_bytes=newest.get("host_available_bytes"),
        device_free_bytes=newest.get("device_free_bytes"),
        moves=_moves(before, inside),
    )


def _moved(
    before: StepRecord | None, inside: Sequence[StepRecord], newest: StepRecord, name: str
) -> float | None:
    """How far a counter moved; from the oldest record that is left where what came before is overwritten."""
    now = newest.get(name)
    if now is None or not inside:
        return None if now is None else 0
    if before is None:
        return now if inside[0].sequence == 1 else now - inside[0][name]
    return now - before[name]


def _moves(before: StepRecord | None, inside: Sequence[StepRecord]) -> tuple[Move, ...]:
    records = inside if before is None else (before, *inside)
    moves = []
    for name in records[0].keys() if records else ():
        if name.startswith(KNOB_PREFIX):
            values = [record[name] for record in records]
            changes = sum(a != b for a, b in pairwise(values))
            if changes:
                knob = name.removeprefix(KNOB_PREFIX)
                moves.append(Move(knob, values[0], values[-1], changes, min(values), max(values)))
    return tuple(moves)
