"""The telemetry page's writer and reader.

The writer works on any writable buffer of the right size, the reader on any pread-like callable, so that
tests and virtual time leave files out. The reader never maps the page: a mapped file that its owner
truncates kills whoever maps it. Writing a step is O(fields); a poll is O(new records), at most `limit`.
"""

import struct
import threading
import zlib
from collections.abc import Sequence
from typing import Any

from kvpilot.link.ending import ENDING_FRAME, Ending
from kvpilot.link.histogram import (
    HISTOGRAM_WORDS,
    ONE,
    PER_CLASS,
    HistogramSnapshot,
    HistogramWriter,
    read_histogram,
)
from kvpilot.link.manifest import MANIFEST_MAX_BYTES, Manifest
from kvpilot.link.page import HEADER_BYTES, Identity, LinkError, PageHeader
from kvpilot.link.records import Frame, FrameWriter, PackedStep, StepLayout, StepRecord
from kvpilot.link.requests import MOST_COLUMNS, EndedRequest, ended_request, request_frame, ring_bytes
from kvpilot.link.telemetry_page import (
    CLASS_FRAME,
    HEAD_BYTES,
    MAX_CLASSES,
    MAX_TENANTS,
    RING_RECORDS,
    TENANT_FRAME,
    TENANT_NAME_BYTES,
    WORD,
    ClassRow,
    ReadAt,
    TenantRow,
    counts_frame,
    histogram_index,
    plan_page,
)

__all__ = ["ClassRow", "Ending", "TelemetryReader", "TelemetryWriter", "TenantRow", "plan_page"]

POLL_RECORDS = 1_024

_U64 = struct.Struct("<Q")
_SECTIONS = 5
_PAGE_LIMIT = 1 << 40
"""Far above any page: what a damaged header says must not become an offset that `pread` refuses."""


class TelemetryWriter:
    """Writes one page, from one thread. `buffer` is writable, zeroed and `plan_page(manifest).page_bytes`
    long.
    """

    def __init__(
        self,
        buffer: "bytearray | memoryview | object",
        manifest: Manifest,
        *,
        nonce: int,
        identity: Identity,
        record_count: int = RING_RECORDS,
    ) -> None:
        plan = plan_page(manifest, record_count)
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        if len(view) != plan.page_bytes:
            raise LinkError(f"telemetry buffer of {len(view)} bytes: {plan.page_bytes} needed")
        self.nonce = nonce
        self._view = view
        self._words = view.cast("Q")
        self._plan = plan
        self._sequence = 0
        self._head = plan.ring // WORD
        self._first_record = (plan.ring + HEAD_BYTES) // WORD
        self._steps = FrameWriter(plan.layout.frame, self._words)
        self._record_words = plan.layout.frame.words
        self._record_count = record_count
        self._fields = manifest.fields
        self._classes = FrameWriter(CLASS_FRAME, self._words)
        self._class_sequences = [0] * MAX_CLASSES
        self._tenants = FrameWriter(TENANT_FRAME, self._words)
        self._tenant_rows: dict[str, int] = {}
        self._tenant_idle: dict[str, bool] = {}
        self._tenant_sequences = [0] * MAX_TENANTS
        counts = counts_frame(manifest.tenant_columns)
        self._counts, self._counts_words = FrameWriter(counts, self._words), counts.words
        self._requests = request_frame(manifest.request_columns)
        self._request_records = manifest.request_records
        self._request_writer = FrameWriter(self._requests, self._words)
        self._request_sequence = 0
        self._histograms = {
            (name, level): HistogramWriter(self._words, self._histogram_word(name, level))
            for name in PER_CLASS
            for level in range(MAX_CLASSES)
        }
        self._step_histogram = HistogramWriter(self._words, self._histogram_word(ONE, 0))
        self._ended = False
        self._thread = 0
        body = plan.manifest_json
        view[HEADER_BYTES : HEADER_BYTES + len(body)] = body
        sections = (plan.ring, plan.histograms, plan.classes, plan.tenants, plan.ending, plan.counts)
        header = PageHeader(
            "telemetry",
            plan.page_bytes,
            nonce,
            identity,
            len(body),
            zlib.crc32(body),
            plan.layout.size,
            record_count,
            sections,
        )
        view[:HEADER_BYTES] = header.pack()

    def _histogram_word(self, name: str, level: int) -> int:
        return self._plan.histograms // WORD + histogram_index(name, level) * HISTOGRAM_WORDS

    def histogram(self, name: str, class_index: int = 0) -> HistogramWriter:
        """The writer of one histogram. Raises KeyError for a name or class that does not exist."""
        return self._step_histogram if name == ONE else self._histograms[name, class_index]

    def write_step(self, values: Sequence[float], more: Sequence[float] = ()) -> int:
        """Write the next record: the manifest's fields in order, in one sequence or two. Returns its
        sequence, which starts at 1.
        """
        if self._thread != threading.get_ident():
            self._bind_thread()
        sequence = self._sequence + 1
        slot = self._sequence % self._record_count
        self._steps.write_parts(self._first_record + slot * self._record_words, sequence, values, more)
        # The head is a hint where to look; the record itself says whether it is there.
        self._words[self._head] = sequence
        self._sequence = sequence
        return sequence

    def packed_step(self) -> PackedStep:
        """A record for `write_packed`, all zero."""
        return PackedStep(self._fields)

    def write_packed(self, step: PackedStep) -> None:
        """`write_step` for a record that is kept in packed form."""
        if self._thread != threading.get_ident():
            self._bind_thread()
        slot = self._sequence % self._record_count
        sequence = self._sequence = self._sequence + 1
        step.set_sequence(sequence)
        self._steps.write_packed(self._first_record + slot * self._record_words, step.data)
        self._words[self._head] = sequence

    def mark_boundary(self, now_ns: int) -> None:
        """The engine is at a step boundary. If no record follows, that is how far it came."""
        self._words[self._head + 1] = now_ns

    def set_class(self, class_index: int, waiting: int, waiting_prompt_tokens: int) -> None:
        """Replace one class's row."""
        self._bind_thread()
        self._class_sequences[class_index] += 1
        word = self._plan.classes // WORD + class_index * CLASS_FRAME.words
        self._classes.write(word, self._class_sequences[class_index], waiting, waiting_prompt_tokens)

    def set_tenant(self, row: TenantRow) -> bool:
        """Replace one tenant's row. False where the table is full of tenants that are busy."""
        self._bind_thread()
        slot = self._tenant_slot(row.name)
        if slot is None:
            return False
        self._tenant_idle[row.name] = not (row.running or row.waiting or row.kv_blocks)
        self._tenant_sequences[slot] += 1
        word = self._plan.tenants // WORD + slot * TENANT_FRAME.words
        name = row.name.encode()[:TENANT_NAME_BYTES]
        self._tenants.write(word, self._tenant_sequences[slot], name, *row[1:])
        return True

    def set_tenant_counts(self, name: str, values: Sequence[int]) -> bool:
        """Replace a tenant's counts: the manifest's `tenant_columns`, in order. False where it has no row."""
        self._bind_thread()
        slot = self._tenant_rows.get(name)
        if slot is None or not self._plan.counts:
            return False
        word = self._plan.counts // WORD + slot * self._counts_words
        self._counts.write(word, self._tenant_sequences[slot], name.encode()[:TENANT_NAME_BYTES], *values)
        return True

    def add_request(self, request: EndedRequest) -> None:
        """One that has ended; nothing where the manifest has no columns for it."""
        if not self._request_records:
            return
        self._bind_thread()
        slot = self._request_sequence % self._request_records
        self._request_sequence += 1
        word = (self._plan.requests + HEAD_BYTES) // WORD + slot * self._requests.words
        tenant = request.tenant.encode()[:TENANT_NAME_BYTES]
        self._request_writer.write(word, self._request_sequence, tenant, *request.values)
        self._words[self._plan.requests // WORD] = self._request_sequence

    def _tenant_slot(self, name: str) -> int | None:
        """The tenant's row: its own, a free one, or that of one which holds nothing."""
        slot = self._tenant_rows.get(name)
        if slot is None and len(self._tenant_rows) < MAX_TENANTS:
            slot = len(self._tenant_rows)
        elif slot is None:
            idle = next((other for other, is_idle in self._tenant_idle.items() if is_idle), None)
            if idle is None:
                return None
            slot = self._tenant_rows.pop(idle)
            del self._tenant_idle[idle]
        self._tenant_rows[name] = slot
        return slot

    def write_ending(self, ending: Ending) -> None:
        """Say how this engine start ended. The first word stands; any thread may have it."""
        if self._ended:
            return
        self._ended = True
        FrameWriter(ENDING_FRAME, self._words).write(self._plan.ending // WORD, 1, *ending.pack())

    def close(self) -> None:
        """Let go of the buffer; nothing may be written afterwards."""
        self._words.release()
        self._view.release()

    def _bind_thread(self) -> None:
        """One writer thread: the first one to write; a second is a bug that would tear records."""
        me = threading.get_ident()
        if self._thread not in (0, me):
            raise RuntimeError(f"telemetry is written by thread {self._thread}, not by {me}")
        self._thread = me


class TelemetryReader:
    """Reads one page. Raises LinkError at once for a page of another kind or version, or a damaged one."""

    def __init__(self, read_at: ReadAt) -> None:
        self._read_at = read_at
        header = PageHeader.unpack(read_at(0, HEADER_BYTES), "telemetry")
        body = read_at(HEADER_BYTES, min(header.body_bytes, MANIFEST_MAX_BYTES))
        if zlib.crc32(body) != header.body_crc:
            raise LinkError("damaged manifest in a kvpilot telemetry page")
        try:
            self.manifest = Manifest.from_json(body)
            self._layout = StepLayout(self.manifest.fields)
        except ValueError as error:
            raise LinkError(f"telemetry page: {error}") from error
        if header.record_bytes != self._layout.size or not header.record_count:
            raise LinkError("damaged kvpilot telemetry page: the manifest's fields do not fit its records")
        ring_bytes = HEAD_BYTES + header.record_count * header.record_bytes
        ends = (header.sections[0] + ring_bytes, *header.sections[1:_SECTIONS])
        if (
            not HEADER_BYTES
            <= min(header.sections[:_SECTIONS])
            <= max(ends)
            <= header.page_bytes
            < _PAGE_LIMIT
        ):
            raise LinkError("damaged kvpilot telemetry page: its sections do not lie inside it")
        self._counts = header.sections[_SECTIONS] if self.manifest.tenant_columns else 0
        counts_bytes = MAX_TENANTS * counts_frame(self.manifest.tenant_columns).size
        if self._counts and not HEADER_BYTES <= self._counts <= header.page_bytes - counts_bytes:
            raise LinkError("damaged kvpilot telemetry page: its sections do not lie inside it")
        self._requests = self._request_ring(header)
        self._last_request = 0
        self.nonce = header.nonce
        self.identity = header.identity
        self.start_wall_ns = header.identity.start_wall_ns
        self.record_count = header.record_count
        """Records that the ring holds at most."""
        self._ring, self._histograms, self._classes, self._tenants, self._ending = header.sections[:_SECTIONS]
        self._last = 0
        self.skipped = 0
        """Records that were overwritten, torn or beyond `limit` before they could be read."""

    def _request_ring(self, header: PageHeader) -> int:
        """Where it begins; 0 without one."""
        columns, records = self.manifest.request_columns, self.manifest.request_records
        if not records or not columns or len(columns) > MOST_COLUMNS:
            return 0
        begin = header.page_bytes - ring_bytes(columns, records)
        if records < 0 or begin < max(header.sections):
            raise LinkError("damaged kvpilot telemetry page: its ring of requests does not lie inside it")
        return begin

    def requests(self, limit: int = POLL_RECORDS) -> list[EndedRequest]:
        """Requests that have ended since the last call, oldest first: the newest `limit` of them at most;
        empty where the engine tells of none.
        """
        if not self._requests:
            return []
        raw = self._read_at(self._requests, WORD)
        head = _U64.unpack(raw)[0] if len(raw) == WORD else 0
        columns, records = self.manifest.request_columns, self.manifest.request_records
        first = max(self._last_request + 1, head - min(limit, records) + 1)
        frame, found = request_frame(columns), []
        for sequence in range(first, head + 1):
            slot = (sequence - 1) % records
            row = frame.unpack(self._read_at(self._requests + HEAD_BYTES + slot * frame.size, frame.size))
            if row is not None and row[0] == sequence:
                found.append(ended_request(row[1], dict(zip(columns, row[2:], strict=True))))
        self._last_request = max(head, self._last_request)
        return found

    def poll(self, limit: int = POLL_RECORDS) -> list[StepRecord]:
        """Whole records newer than the last poll's, oldest first: the newest `limit` of them at most."""
        raw = self._read_at(self._ring, WORD)
        head = _U64.unpack(raw)[0] if len(raw) == WORD else 0
        if head <= self._last:
            return []
        first = max(self._last + 1, head - min(limit, self.record_count) + 1)
        records = self._read_records(first, head)
        if not records or records[-1].sequence != head:
            # Being written or lapped at that very moment; a second look settles it, else the next poll.
            records += self._read_records(head, head)
        if records:
            self.skipped += records[-1].sequence - self._last - len(records)
            self._last = records[-1].sequence
        return records

    def ring(self) -> list[StepRecord]:
        """Every whole record that the ring still holds, oldest first: for a page whose writer is gone, when
        even the newest record's number cannot be trusted. Reads all of it.
        """
        size = self._layout.size
        data = memoryview(self._read_at(self._ring + HEAD_BYTES, self.record_count * size))
        found = []
        for slot in range(len(data) // size):
            record = self._layout.unpack(data, slot * size)
            if record is not None and (record.sequence - 1) % self.record_count == slot:
                found.append(record)
        found.sort(key=lambda record: record.sequence)
        return [record for record in found if record.sequence > found[-1].sequence - self.record_count]

    def _read_records(self, first: int, last: int) -> list[StepRecord]:
        """Whole records of sequences first..last; the ring's end makes it two reads at most."""
        records = []
        size = self._layout.size
        while first <= last:
            slot = (first - 1) % self.record_count
            run = min(last - first + 1, self.record_count - slot)
            chunk = memoryview(self._read_at(self._ring + HEAD_BYTES + slot * size, run * size))
            for i in range(run):
                record = self._layout.unpack(chunk, i * size)
                if record is not None and record.sequence == first + i:
                    records.append(record)
            first += run
        return records

    def histogram(self, name: str, class_index: int | None = None) -> HistogramSnapshot | None:
        """Cumulative reading of `itl`, `ttft`, `queue_wait` or `step`; without a class: all classes
        together.
        """
        if name != ONE and name not in PER_CLASS:
            return None
        if name != ONE and class_index is None:
            total = self.histogram(name, 0)
            for level in range(1, len(self.manifest.classes)):
                snapshot = self.histogram(name, level)
                total = total.plus(snapshot) if total and snapshot else None
            return total
        if not 0 <= (class_index or 0) < MAX_CLASSES:
            return None
        index = histogram_index(name, class_index or 0)
        return read_histogram(self._read_at, self._histograms + index * HISTOGRAM_WORDS * WORD)

    def classes(self) -> tuple[ClassRow, ...]:
        """Rows that the engine fills, lowest class first."""
        rows = []
        for level, name in enumerate(self.manifest.classes[:MAX_CLASSES]):
            row = self._row(CLASS_FRAME, self._classes, level)
            if row is not None:
                rows.append(ClassRow(name, row[1], row[2]))
        return tuple(rows)

    def tenants(self) -> tuple[TenantRow, ...]:
        """Rows that the engine fills, in the order in which tenants were first seen."""
        rows, size = [], TENANT_FRAME.size
        data = self._read_at(self._tenants, MAX_TENANTS * size)
        for slot in range(MAX_TENANTS):
            if not any(data[slot * size : slot * size + WORD]):
                continue  # Never written: sequences start at 1.
            row = TENANT_FRAME.unpack(data, slot * size)
            if row is None:
                # Torn, not empty: written while it was read.
                row = self._row(TENANT_FRAME, self._tenants, slot)
            if row is not None:
                name = row[1].rstrip(b"\0").decode(errors="replace")
                rows.append(TenantRow(name, *row[2:]))
        return tuple(rows)

    def tenant_counts(self) -> dict[str, dict[str, int]]:
        """By tenant, what the manifest's `tenant_columns` count; empty where the engine has none."""
        counts: dict[str, dict[str, int]] = {}
        columns = self.manifest.tenant_columns
        frame = counts_frame(columns)
        for slot in range(MAX_TENANTS if self._counts else 0):
            row = self._row(frame, self._counts, slot)
            if row is not None:
                name = row[1].rstrip(b"\0").decode(errors="replace")
                counts[name] = dict(zip(columns, row[2:], strict=True))
        return counts

    def boundary_ns(self) -> int | None:
        """When the engine was last at a step boundary, by its clock; None before the first, or cut short."""
        raw = self._read_at(self._ring + WORD, WORD)
        return (_U64.unpack(raw)[0] if len(raw) == WORD else 0) or None

    def ending(self) -> Ending | None:
        """How this engine start ended, in its own words; None while it lives, or where it had no time."""
        row = self._row(ENDING_FRAME, self._ending, 0)
        return None if row is None else Ending.unpack(*row[1:])

    def _row(self, frame: Frame, section: int, index: int) -> tuple[Any, ...] | None:
        for _ in range(3):
            row = frame.unpack(self._read_at(section + index * frame.size, frame.size))
            if row is not None:
                return row
        return None
