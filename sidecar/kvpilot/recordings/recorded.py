"""A recording, read whole: one start of an engine, its steps, who came, and what was decided.

Nothing here interprets: who came is worked out by `kvpilot.simulate.recalled`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvpilot.clock import NS
from kvpilot.link.controls import Scope
from kvpilot.link.manifest import Manifest, ManifestError
from kvpilot.link.records import StepRecord
from kvpilot.link.requests import EndedRequest, ended_request
from kvpilot.recordings.recorder import FLUSH_NS, segments_in
from kvpilot.recordings.segment import SUFFIX, Chunk, RecordingError, Segment, read_segment

LEAST_STEPS = 64
_CLOCKS_APART_NS = 5 * NS
"""Further than this, engine and pilot cannot have read the same clock."""

Target = tuple[str, Scope]


class Counted(NamedTuple):
    """Requests that came to the valves in one tick, of one class and tenant."""

    at_ns: int
    level: int
    tenant: str
    offered: int
    admitted: int
    offered_tokens: int
    admitted_tokens: int


class Held(NamedTuple):
    """Every lease from `at_ns` on, and whose it was (`policy/rule`)."""

    at_ns: int
    values: Mapping[Target, float]
    by: Mapping[Target, str]


class Promise(NamedTuple):
    """Of one class, in seconds."""

    name: str
    ttft_s: float
    itl_s: float
    ttft_s_per_prompt_token: float


@dataclass(frozen=True, slots=True)
class Recorded:
    """All times are on the pilot's clock, in ns; steps and requests are shifted to it where the engine's was
    another.
    """

    path: Path
    manifest: Manifest
    nonce: int
    promises: tuple[Promise, ...]
    """Lowest class first."""
    begin_ns: int
    """When the recording of this engine start begins."""
    steps: tuple[StepRecord, ...]
    requests: tuple[EndedRequest, ...]
    counted: tuple[Counted, ...]
    held: tuple[Held, ...]
    has_valve: bool
    torn_bytes: int
    starts: int
    """Engine starts in the recording; this is the one with most steps."""

    @property
    def tells_requests(self) -> bool:
        """Whether its engine told of each request."""
        return self.manifest.request_records > 0

    @property
    def end_ns(self) -> int:
        """When its newest step ended."""
        return int(self.steps[-1].get("time_ns") or self.begin_ns)


def read_recording(path: Path, last_s: float | None = None, ago_s: float = 0.0) -> Recorded:
    """A recording's directory, or one of its files: all of it, or the `last_s` until `ago_s` before its end.
    Raises RecordingError, in one line.
    """
    files = segments_in(path) if path.is_dir() else [path]
    if not files:
        raise RecordingError(f"{path}: no recording there: no {SUFFIX} files; `kvpilot run` writes them")
    since_ns, until_ns = span = _span(files[-1], last_s, ago_s)

    def wanted(head: Mapping[str, Any]) -> bool:
        seen_ns: float = head.get("seen_ns", since_ns)
        return since_ns <= seen_ns <= until_ns + 2 * FLUSH_NS

    segments = [read_segment(file, wanted) for file in files]
    chunks = [chunk for segment in segments for chunk in segment.chunks]
    starts: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        starts.setdefault(chunk.head.get("nonce") or 0, []).append(chunk)
    if not starts:
        raise RecordingError(f"{path}: truncated: it holds not one whole chunk")
    nonce = max(starts, key=lambda one: sum(len(c.rows) for c in starts[one] if c.kind == "steps"))
    try:
        return _recorded(path, nonce, starts[nonce], segments, len(starts), span)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, RecordingError):
            raise
        raise RecordingError(f"{path}: damaged ({type(error).__name__}: {error})") from error


Span = tuple[float, float]
"""From and until when, on the pilot's clock."""


def _span(newest: Path, last_s: float | None, ago_s: float) -> Span:
    if last_s is None and not ago_s:
        return 0.0, float("inf")
    heads = [chunk.head for chunk in read_segment(newest, lambda head: False).chunks]
    until_ns = max((head["seen_ns"] for head in heads if "seen_ns" in head), default=0) - ago_s * NS
    return (0.0 if last_s is None else until_ns - last_s * NS), until_ns


def _recorded(
    path: Path, nonce: int, chunks: list[Chunk], segments: list[Segment], starts: int, span: Span
) -> Recorded:
    engines = [chunk for chunk in chunks if chunk.kind == "engine"]
    if not engines:
        raise RecordingError(f"{path}: truncated: what engine this was is not in it")
    try:
        manifest = Manifest.from_json(engines[0].head["manifest"].encode())
    except ManifestError as error:
        raise RecordingError(f"{path}: {error}") from error
    shift_ns = _clocks_apart_ns(chunks)
    steps = _steps(chunks, shift_ns, span)
    if len(steps) < LEAST_STEPS:
        raise RecordingError(
            f"{path}: {len(steps)} steps, at least {LEAST_STEPS} are needed: record an engine under load"
        )
    counted, has_valve = _counted(chunks)
    # The ring of a running engine also tells of requests that ended before anybody looked.
    begin_ns = max(engines[0].head["at_ns"], round(span[0]))
    requests = (one for one in _requests(chunks, shift_ns) if one.ended_ns >= begin_ns)
    return Recorded(
        path=path,
        manifest=manifest,
        nonce=nonce,
        promises=tuple(Promise(*each) for each in segments[-1].about["promises"]),
        begin_ns=begin_ns,
        steps=steps,
        requests=tuple(one for one in requests if one.received_ns <= span[1]),
        counted=tuple(one for one in counted if begin_ns <= one.at_ns <= span[1]),
        held=tuple(_within(list(_held(chunks)), begin_ns, span[1])),
        has_valve=has_valve,
        torn_bytes=sum(segment.torn_bytes for segment in segments),
        starts=starts,
    )


def _clocks_apart_ns(chunks: Iterable[Chunk]) -> int:
    """What to add to the engine's times; 0 where both read one clock."""
    apart = [
        chunk.head["seen_ns"] - int(chunk.rows[-1][chunk.columns.index("time_ns")])
        for chunk in chunks
        if chunk.kind == "steps" and chunk.rows and "time_ns" in chunk.columns
    ]
    least = min(apart, default=0)
    return least if abs(least) > _CLOCKS_APART_NS else 0


def _steps(chunks: Iterable[Chunk], shift_ns: int, span: Span) -> tuple[StepRecord, ...]:
    found = list[StepRecord]()
    for chunk in chunks:
        if chunk.kind != "steps":
            continue
        index = {name: place for place, name in enumerate(chunk.columns)}
        if "time_ns" not in index:
            raise RecordingError("its engine records no time_ns: nothing to replay")
        for row in chunk.rows:
            values = list(row)
            values[index["time_ns"]] += shift_ns
            if span[0] <= values[index["time_ns"]] <= span[1]:
                found.append(StepRecord(len(found) + 1, tuple(values), index))
    return tuple(found)


def _requests(chunks: Iterable[Chunk], shift_ns: int) -> Iterable[EndedRequest]:
    for chunk in chunks:
        if chunk.kind != "requests":
            continue
        tenants = chunk.head["tenants"]
        for row in chunk.rows:
            values = dict(zip(chunk.columns, map(int, row), strict=True))
            one = ended_request(tenants[values["tenant"]].encode(), values)
            yield one._replace(
                received_ns=one.received_ns + shift_ns,
                first_ns=one.first_ns and one.first_ns + shift_ns,
                ended_ns=one.ended_ns + shift_ns,
            )


def _counted(chunks: Iterable[Chunk]) -> tuple[list[Counted], bool]:
    """Differences of what valves had counted, and whether there were any valves."""
    before: dict[tuple[int, str], tuple[int, ...]] = {}
    found, seen = list[Counted](), False
    for chunk in chunks:
        if chunk.kind != "valve":
            continue
        seen = True
        tenants = chunk.head["tenants"]
        for row in chunk.rows:
            at_ns, level, tenant, *counts = map(int, row)
            key, now = (level, tenants[tenant]), tuple(counts)
            if at_ns:
                then = before.get(key, (0, 0, 0, 0))
                came = [max(0, a - b) for a, b in zip(now, then, strict=True)]
                if any(came):
                    found.append(Counted(at_ns, *key, *came))
            before[key] = now
    return found, seen


def _held(chunks: Iterable[Chunk]) -> Iterable[Held]:
    last_ns = -1
    for chunk in chunks:
        if chunk.kind != "leases":
            continue
        for change in chunk.head["changes"]:
            if change["at_ns"] <= last_ns:
                continue  # Told again, at the beginning of the next file.
            last_ns = change["at_ns"]
            yield _held_of(change)


def _within(held: Sequence[Held], begin_ns: int, until_ns: float) -> list[Held]:
    """With what was in force at the beginning, from there on."""
    before = [one for one in held if one.at_ns < begin_ns][-1:]
    begun = [one._replace(at_ns=begin_ns) for one in before]
    return begun + [one for one in held if begin_ns <= one.at_ns <= until_ns]


def _held_of(change: Mapping[str, Any]) -> Held:
    rows = {
        (knob, Scope(kind, argument)): (value, f"{policy}/{rule}")
        for knob, kind, argument, value, policy, rule in change["leases"]
    }
    return Held(
        change["at_ns"],
        {target: float(value) for target, (value, _) in rows.items()},
        {target: by for target, (_, by) in rows.items()},
    )
