"""The recorder: what a tick saw and did, kept in files of bounded size and age.

    recorder.take(moment)       from the tick: an append to a bounded queue, nothing else
    recorder.run / close        the thread that packs, writes, and drops what is too old

Nothing of a prompt gets here: step records are counts, requests are lengths, times and salted hashes, tenants
are names that the operator configured or salted hashes. A disk that fails costs recording, never a tick; that
is said once.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from kvpilot.clock import NS
from kvpilot.link.fields import KNOB_PREFIX
from kvpilot.link.requests import REQUEST_COLUMNS, EndedRequest
from kvpilot.link.valve_page import ValveRow
from kvpilot.publish.board import Tick
from kvpilot.recordings.segment import SUFFIX, Chunk, begin

SEGMENTS = 8
"""Into how many files size and age are divided: the oldest goes whole."""
QUEUE_MOMENTS = 600
FLUSH_NS = 2 * NS
FLUSH_STEPS = 500
STEP_FIELDS = (
    "time_ns",
    "duration_ns",
    "steps_total",
    "prefill_tokens_total",
    "decode_tokens_total",
    "drafted_tokens_total",
    "accepted_tokens_total",
    "draft_rounds_total",
    "rejected_rounds_total",
    "decode_sequences_total",
    "context_tokens_total",
    "chunk_positions_total",
    "running",
    "waiting",
    "waiting_prompt_tokens",
    "kv_blocks_free",
    "kv_blocks_cached",
    "preemptions_total",
    "recomputed_tokens_total",
    "finished_total",
    "rejected_total",
    "cancelled_total",
    "failed_total",
    "oom_total",
    "prefix_tokens_queried_total",
    "prefix_tokens_hit_total",
)
"""What is kept of a step record, beside the knobs in force, as far as the engine has it."""
VALVE_COLUMNS = (
    "at_ns",
    "level",
    "tenant",
    "offered",
    "admitted",
    "offered_tokens",
    "admitted_tokens",
)
"""Cumulative, at each change; `at_ns` 0 is what had been counted before the file begins."""

_Counts = dict[tuple[int, str], tuple[int, ...]]
"""What valves have counted, by level and tenant: the columns from `offered` on."""

_log = logging.getLogger(__name__)
_STOP = object()


class Moment(NamedTuple):
    """What one tick hands over."""

    tick: Tick
    requests: Sequence[EndedRequest]
    """Those that the engine has told of since the last one."""
    valve: Sequence[ValveRow]


class Kept(NamedTuple):
    """How much is kept, at most."""

    size_bytes: int
    age_s: float


class Rolling:
    """Files of one directory, written by one thread. `about` begins every file."""

    def __init__(self, directory: Path, about: Mapping[str, Any], kept: Kept) -> None:
        self.directory = directory
        self._about = about
        self._kept = kept
        self._file: BinaryIO | None = None
        self._number = 0
        self._written = 0
        self._began_ns = 0
        self._engine: dict[str, Any] | None = None
        self._nonce: int | None = None
        self._steps: list[Sequence[float]] = []
        self._columns: tuple[str, ...] = ()
        self._requests: list[EndedRequest] = []
        self._rows: _Counts = {}
        self._base: _Counts | None = None
        """What valves had counted before anything that is in this file."""
        self._counted: list[tuple[int, int, str, tuple[int, ...]]] = []
        self._leases: list[dict[str, Any]] = []
        self._held: object = None
        self._standing: dict[str, Any] | None = None
        """The newest leases that were written."""
        self._seen_ns = 0
        self._flushed_ns = 0

    def add(self, moment: Moment) -> bool:
        """One tick's; whether it was time to write. Raises OSError."""
        tick, sight = moment.tick, moment.tick.sight
        if sight.manifest is None:
            return False
        if sight.nonce != self._nonce:
            self._meet(tick)
        self._flushed_ns = self._flushed_ns or tick.at_ns
        take = self._columns
        self._steps += [[record[name] for name in take] for record in sight.records]
        self._requests += moment.requests
        if sight.records:
            self._seen_ns = tick.at_ns
        self._count(tick.at_ns, moment.valve)
        self._hold(tick)
        due = tick.at_ns - self._flushed_ns >= FLUSH_NS or len(self._steps) >= FLUSH_STEPS
        if due:
            self.flush(tick.at_ns)
        return due

    def _meet(self, tick: Tick) -> None:
        """A start of the engine: what was kept of the last one is written first."""
        self.flush(tick.at_ns)
        sight, manifest = tick.sight, tick.sight.manifest
        assert manifest is not None
        self._nonce, self._rows, self._held, self._standing = sight.nonce, {}, None, None
        told = {each.name for each in manifest.fields}
        echoes = [each.name for each in manifest.fields if each.name.startswith(KNOB_PREFIX)]
        self._columns = (*(name for name in STEP_FIELDS if name in told), *echoes)
        about = {"nonce": sight.nonce, "wall_ns": tick.wall_ns}
        self._engine = {**about, "manifest": manifest.to_json().decode()}
        if self._file is not None:
            self._append(self._engine_chunk(tick.at_ns))

    def _count(self, at_ns: int, rows: Sequence[ValveRow]) -> None:
        sums: _Counts = {}
        for row in rows:
            counts: tuple[int, ...] = (row.offered, row.admitted, row.offered_tokens, row.admitted_tokens)
            before = sums.get((row.level, row.tenant), (0, 0, 0, 0))
            sums[row.level, row.tenant] = tuple(a + b for a, b in zip(before, counts, strict=True))
        if self._base is None:
            # The first look at valves that may be older than this pilot.
            self._base, self._rows = sums, dict(sums)
            self._counted += [(0, *key, counts) for key, counts in sums.items()]
            return
        for key, counts in sums.items():
            if self._rows.get(key) != counts:
                self._rows[key] = counts
                self._counted.append((at_ns, *key, counts))

    def _hold(self, tick: Tick) -> None:
        if tick.leases == self._held:
            return
        self._held = tick.leases
        leases = [
            [each.knob, each.scope.kind, each.scope.argument, each.value, each.policy, each.rule]
            for each in tick.leases
        ]
        self._leases.append({"at_ns": tick.at_ns, "leases": leases})

    def flush(self, at_ns: int) -> None:
        """Write what is kept in memory. Raises OSError."""
        since_ns, self._flushed_ns = self._flushed_ns or at_ns, at_ns
        chunks = self._chunks()
        standing = self._leases[-1] if self._leases else self._standing
        self._steps, self._requests, self._counted, self._leases = [], [], [], []
        if not chunks:
            return
        if self._file is None or self._is_full(at_ns):
            self._turn(since_ns)
        for chunk in chunks:
            self._append(chunk)
        self._base, self._standing = dict(self._rows), standing
        if self._file is not None:
            self._file.flush()

    def _chunks(self) -> list[Chunk]:
        nonce: dict[str, Any] = {"nonce": self._nonce}
        found = list[Chunk]()
        if self._steps:
            floats = frozenset(name for name in self._columns if name.startswith(KNOB_PREFIX))
            head = {**nonce, "seen_ns": self._seen_ns}
            found.append(Chunk("steps", head, self._columns, floats, self._steps))
        if self._requests:
            tenants = sorted({one.tenant for one in self._requests})
            place = {name: index for index, name in enumerate(tenants)}
            rows = [(place[one.tenant], *one.values) for one in self._requests]
            head = {**nonce, "tenants": tenants}
            found.append(Chunk("requests", head, ("tenant", *REQUEST_COLUMNS), rows=rows))
        if self._counted:
            found.append(self._valve_chunk(self._counted))
        if self._leases:
            found.append(Chunk("leases", {**nonce, "changes": self._leases}))
        return found

    def _valve_chunk(self, counted: Sequence[tuple[int, int, str, tuple[int, ...]]]) -> Chunk:
        tenants = sorted({tenant for _, _, tenant, _ in counted})
        place = {name: index for index, name in enumerate(tenants)}
        rows = [(at_ns, level, place[tenant], *counts) for at_ns, level, tenant, counts in counted]
        return Chunk("valve", {"nonce": self._nonce, "tenants": tenants}, VALVE_COLUMNS, rows=rows)

    def _append(self, chunk: Chunk) -> None:
        assert self._file is not None
        self._written += self._file.write(chunk.pack())

    def _is_full(self, at_ns: int) -> bool:
        too_old = at_ns - self._began_ns > self._kept.age_s * NS / SEGMENTS
        return too_old or self._written > self._kept.size_bytes // SEGMENTS

    def _engine_chunk(self, at_ns: int) -> Chunk:
        """Whose records follow, from `at_ns` on."""
        return Chunk("engine", {**(self._engine or {}), "at_ns": at_ns})

    def _turn(self, at_ns: int) -> None:
        """On to the next file; what makes the directory too large or too old goes."""
        self.close_file()
        self.directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        files = segments_in(self.directory)
        self._number = max([self._number, *(int(path.stem) for path in files)]) + 1
        self._file = (self.directory / f"{self._number:08d}{SUFFIX}").open("xb")
        self._began_ns = at_ns
        self._written = begin(self._file, self._about)
        self._append(self._engine_chunk(at_ns))
        if self._base:
            self._append(self._valve_chunk([(0, *key, counts) for key, counts in self._base.items()]))
        if self._standing is not None:
            self._append(Chunk("leases", {"nonce": self._nonce, "changes": [self._standing]}))
        newest_s = (self.directory / f"{self._number:08d}{SUFFIX}").stat().st_mtime
        room = self._kept.size_bytes * (SEGMENTS - 1) // SEGMENTS
        for path in reversed(files):
            status = path.stat()
            room -= status.st_size
            if room < 0 or newest_s - status.st_mtime > self._kept.age_s:
                path.unlink(missing_ok=True)

    def close_file(self) -> None:
        """The next flush begins another."""
        if self._file is not None:
            self._file.close()
            self._file = None


def segments_in(directory: Path) -> list[Path]:
    """Files of a recording, oldest first."""
    return sorted(path for path in directory.glob(f"*{SUFFIX}") if path.stem.isdigit())


class Recorder:
    """A `Rolling` behind a queue and a thread of its own."""

    def __init__(self, rolling: Rolling) -> None:
        self.lost = 0
        """Ticks that were not recorded."""
        self._rolling = rolling
        self._queue: queue.Queue[Any] = queue.Queue(QUEUE_MOMENTS)
        self._failing = False
        self._last_ns = 0
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        """Begin writing."""
        self._thread.start()

    def take(self, moment: Moment) -> None:
        """Hand over one tick's; never waits."""
        try:
            self._queue.put_nowait(moment)
        except queue.Full:
            self.lost += 1

    def close(self, within_s: float) -> None:
        """Write what is queued; after `within_s` the rest is given up."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(_STOP, timeout=within_s)
            self._thread.join(within_s)

    def _run(self) -> None:
        while (moment := self._queue.get()) is not _STOP:
            self._last_ns = moment.tick.at_ns
            self._attempt(moment)
        with contextlib.suppress(Exception):
            self._rolling.flush(self._last_ns)
            self._rolling.close_file()

    def _attempt(self, moment: Moment) -> None:
        try:
            if self._rolling.add(moment):
                self._failing = False
        except Exception as error:  # Whatever it is: the thread must live for what follows.
            self.lost += 1
            if not self._failing:
                self._failing = True
                _log.warning("recording %s: %s; the flight goes on", self._rolling.directory, error)
            with contextlib.suppress(Exception):
                self._rolling.close_file()
