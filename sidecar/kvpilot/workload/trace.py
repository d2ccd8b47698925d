"""A recorded workload, whatever format it came in: rows in order of time, and what can be done to them.

Cut it (`sliced`), play it faster (`sped`), put several one after another (`spliced`), or press a stretch into
so many seconds at a load (`at_load`; a machine's speed gives that a meaning). Lengths, order, the shape of
bursts and shared prefixes stay as recorded. O(rows) each.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from kvpilot.workload.arrival import Arrival, Speed
from kvpilot.workload.generator import CLASSES, ClassMix


class TraceError(ValueError):
    """The file is no such trace; the message says the line and what is wrong."""


class TraceRow(NamedTuple):
    """One recorded request; `at_s` counts from the first row."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()
    """Ids of the prompt's leading blocks: two prompts share what their equal leading ids cover."""
    tenant: str = ""
    """Empty where the trace does not say."""


@dataclass(frozen=True, slots=True)
class Trace:
    """`rows` ascend in time. `block_tokens`: prompt tokens that one id of a prefix stands for."""

    name: str
    kind: str
    rows: tuple[TraceRow, ...]
    block_tokens: int = 0

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""
        return self.rows[-1].at_s - self.rows[0].at_s if self.rows else 0.0


def sliced(trace: Trace, start_s: float, end_s: float | None = None) -> Trace:
    """The arrivals in [start, end) seconds of the trace, from 0. Raises TraceError where there are none."""
    end = float("inf") if end_s is None else end_s
    kept = tuple(row._replace(at_s=row.at_s - start_s) for row in trace.rows if start_s <= row.at_s < end)
    if not kept:
        raise TraceError(
            f"{trace.name}: no arrivals from {start_s:g} to {end:g} s; it lasts {trace.seconds:g} s"
        )
    return replace(trace, rows=kept)


def sped(trace: Trace, speed: float) -> Trace:
    """Played `speed` times as fast."""
    if not 0 < speed < float("inf"):
        raise TraceError(f"speed={speed:g}: above 0; 2 plays the trace twice as fast")
    return replace(trace, rows=tuple(row._replace(at_s=row.at_s / speed) for row in trace.rows))


def spliced(traces: Sequence[Trace]) -> Trace:
    """One after another, a mean gap between them. Prefix ids of different traces stay different."""
    if not traces:
        raise TraceError("nothing to splice")
    blocks = {trace.block_tokens for trace in traces if trace.block_tokens}
    if len(blocks) > 1:
        raise TraceError(f"{', '.join(t.name for t in traces)}: prefix blocks of different sizes: {blocks}")
    rows: list[TraceRow] = []
    begin_s, first_id = 0.0, 0
    for trace in traces:
        rows += [
            row._replace(at_s=begin_s + row.at_s, prefix=tuple(first_id + one for one in row.prefix))
            for row in trace.rows
        ]
        begin_s = rows[-1].at_s + trace.seconds / max(len(trace.rows), 1)
        first_id += 1 + max((max(row.prefix, default=0) for row in trace.rows), default=0)
    kinds = "+".join(dict.fromkeys(trace.kind for trace in traces))
    return Trace("+".join(trace.name for trace in traces), kinds, tuple(rows), max(blocks, default=0))


def arrivals(trace: Trace, seed: int, classes: Sequence[ClassMix] = CLASSES) -> list[Arrival]:
    """Every row as it was recorded. Classes and domains, which traces do not know, are drawn by the shares
    of `classes`; tenants only where the trace names none.
    """
    rng = random.Random(f"trace/{seed}")
    return [_arrival(row, row.at_s, trace.block_tokens, classes, rng) for row in trace.rows]


def at_load(
    trace: Trace,
    seed: int,
    seconds: float,
    load: float,
    speed: Speed,
    classes: Sequence[ClassMix] = CLASSES,
) -> list[Arrival]:
    """A run of `seconds` at a mean `load`: a stretch that the seed picks, pressed into that time.

    What a prefix cache that forgets nothing would spare counts as no work, so that a load of 1.0 is what the
    machine could just do. A trace too short for the work is repeated.
    """
    if not (seconds > 0 and load > 0):
        raise ValueError(f"seconds={seconds}, load={load}: both must be above 0")
    rng = random.Random(f"trace/{seed}")
    picked = _stretch(trace, rng.randrange(len(trace.rows)), load * seconds, speed)
    whole_s = picked[-1].at_s + trace.seconds / len(trace.rows)
    # A share first: `seconds / whole_s` is infinite where the trace's gaps are next to nothing.
    shares = [row.at_s / whole_s if whole_s > 0 else 0.0 for row in picked]
    return [
        _arrival(row, seconds * share, trace.block_tokens, classes, rng)
        for row, share in zip(picked, shares, strict=True)
    ]


def oversized(offered: Sequence[Arrival], max_model_len: int, pool_tokens: int) -> int:
    """How many an engine of these sizes refuses at the door: longer than the model or than the whole pool."""
    most = min(max_model_len, pool_tokens)
    return sum(one.prompt_tokens + one.output_tokens > most for one in offered)


def _stretch(trace: Trace, at: int, needed_s: float, speed: Speed) -> list[TraceRow]:
    """Rows from `at` on, around the end if need be, until their work takes that long; times from 0."""
    rows, seen = trace.rows, set[int]()
    mean_gap_s = trace.seconds / len(rows)
    picked: list[TraceRow] = []
    span_s, previous_s = 0.0, None
    while needed_s > 0:
        row = rows[at]
        # Where the trace starts over, its mean gap stands in for the one that was never recorded.
        span_s += mean_gap_s if previous_s is None or row.at_s < previous_s else row.at_s - previous_s
        picked.append(row._replace(at_s=span_s))
        fresh = row.prompt_tokens - trace.block_tokens * _known(row.prefix, seen)
        needed_s -= speed.seconds(max(fresh, 1), row.output_tokens)
        at, previous_s = (at + 1) % len(rows), row.at_s
    return picked


def _known(prefix: Sequence[int], seen: set[int]) -> int:
    """How many leading blocks have been seen; all have been from now on."""
    known = next((place for place, one in enumerate(prefix) if one not in seen), len(prefix))
    seen.update(prefix[known:])
    return known


def _arrival(
    row: TraceRow, at_s: float, block_tokens: int, classes: Sequence[ClassMix], rng: random.Random
) -> Arrival:
    mix = rng.choices(classes, [mix.share for mix in classes])[0]
    tenant = mix.pick_tenant(rng)
    return Arrival(
        at_s,
        max(row.prompt_tokens, 1),
        max(row.output_tokens, 1),
        mix.name,
        row.tenant or tenant,
        mix.pick_domain(rng),
        rng.getrandbits(31),
        row.prefix,
        block_tokens if row.prefix else 0,
    )
