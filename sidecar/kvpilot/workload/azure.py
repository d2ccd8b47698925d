"""Azure's LLM inference traces, read and scaled to the machine at hand.

The format is CSV with the header `TIMESTAMP,ContextTokens,GeneratedTokens`, times ascending. A trace of a
large service becomes a run of seconds on a small engine in two steps: lengths shrink by one factor, chosen so
that all but the longest in a hundred fit the model; then a stretch of the trace that holds the wanted work is
pressed into the wanted seconds. Ratios of lengths and the shape of the bursts stay as recorded. O(rows log
rows).
"""

import csv
import random
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from kvpilot.workload.arrival import Arrival, Speed
from kvpilot.workload.generator import CLASSES, ClassMix
from kvpilot.workload.trace import TraceError as TraceError
from kvpilot.workload.trace import TraceRow as TraceRow

HEADER = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

_FITTING_SHARE = 0.99
"""Share of the rows that fit without being cut."""


def read_azure(path: str | Path) -> list[TraceRow]:
    """All rows of the file. Raises TraceError."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return parse_azure(file, str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise TraceError(f"trace {path}: {reason}; give an Azure CSV trace") from error


def parse_azure(lines: Iterable[str], name: str = "trace") -> list[TraceRow]:
    """The rows of CSV text. Raises TraceError."""
    rows: list[TraceRow] = []
    first: datetime | None = None
    try:
        for number, cells in enumerate(csv.reader(lines), 1):
            if number == 1:
                if tuple(cell.strip().lstrip("\ufeff") for cell in cells) != HEADER:
                    raise TraceError(f"{name}:1: the header must be {','.join(HEADER)}")
            elif cells:
                at, prompt, output = _cells(cells, name, number)
                first = first or at
                at_s = (at - first).total_seconds()
                if rows and at_s < rows[-1].at_s:
                    raise TraceError(f"{name}:{number}: earlier than the row before; sort by TIMESTAMP")
                rows.append(TraceRow(at_s, prompt, output))
    except csv.Error as error:
        raise TraceError(f"{name}: {error}") from error
    if not rows:
        raise TraceError(f"{name}: no rows; give an Azure CSV trace with the header {','.join(HEADER)}")
    return rows


def _cells(cells: Sequence[str], name: str, number: int) -> tuple[datetime, int, int]:
    try:
        stamp, prompt, output = cells
        at = datetime.fromisoformat(stamp.strip()).replace(tzinfo=None)
        tokens = int(prompt), int(output)
        if min(tokens) < 0:
            raise ValueError
    except ValueError as error:
        raise TraceError(
            f"{name}:{number}: not a time and two token counts: {','.join(cells)[:80]!r}"
        ) from error
    return at, *tokens


def scale(
    rows: Sequence[TraceRow],
    seed: int,
    seconds: float,
    load: float,
    speed: Speed,
    max_tokens: int,
    classes: Sequence[ClassMix] = CLASSES,
) -> list[Arrival]:
    """A run of `seconds` at a mean `load`, from a stretch of the trace that the seed picks.

    `max_tokens` bounds prompt + output of every request (the model's length). Traces know no classes, tenants
    or domains: these are drawn by the shares of `classes`. A trace too short for the work is repeated.
    """
    if not (seconds > 0 and load > 0 and max_tokens >= 2):
        raise ValueError(f"seconds={seconds}, load={load}, max_tokens={max_tokens}: too small")
    if not rows:
        raise TraceError("no rows to scale")
    rng = random.Random(f"trace/{seed}")
    factor = _length_factor(rows, max_tokens)
    picked: list[TraceRow] = []
    span_s, needed_s = 0.0, load * seconds
    mean_gap_s = rows[-1].at_s / len(rows)
    at, previous_s = rng.randrange(len(rows)), None
    while needed_s > 0:
        row = rows[at]
        # Where the trace starts over, its mean gap stands in for the one that was never recorded.
        gap_s = mean_gap_s if previous_s is None or row.at_s < previous_s else row.at_s - previous_s
        span_s += gap_s
        prompt, output = _shrink(row, factor, max_tokens)
        picked.append(TraceRow(span_s, prompt, output))
        needed_s -= speed.seconds(prompt, output)
        at, previous_s = (at + 1) % len(rows), row.at_s
    whole_s = span_s + mean_gap_s
    # A share first: `seconds / whole_s` is infinite where the trace's gaps are next to nothing.
    shares = [row.at_s / whole_s if whole_s > 0 else 0.0 for row in picked]
    return [_arrival(row, seconds * share, classes, rng) for row, share in zip(picked, shares, strict=True)]


def _length_factor(rows: Sequence[TraceRow], max_tokens: int) -> float:
    totals = sorted(row.prompt_tokens + row.output_tokens for row in rows)
    return min(1.0, max_tokens / max(totals[int(_FITTING_SHARE * (len(totals) - 1))], 1))


def _shrink(row: TraceRow, factor: float, max_tokens: int) -> tuple[int, int]:
    """Both lengths by one factor, at least a token each; the few that still do not fit lose prompt first."""
    output = min(max(round(row.output_tokens * factor), 1), max_tokens - 1)
    prompt = min(max(round(row.prompt_tokens * factor), 1), max_tokens - output)
    return prompt, output


def _arrival(row: TraceRow, at_s: float, classes: Sequence[ClassMix], rng: random.Random) -> Arrival:
    mix = rng.choices(classes, [mix.share for mix in classes])[0]
    return Arrival(
        at_s,
        row.prompt_tokens,
        row.output_tokens,
        mix.name,
        mix.pick_tenant(rng),
        mix.pick_domain(rng),
        rng.getrandbits(31),
    )
