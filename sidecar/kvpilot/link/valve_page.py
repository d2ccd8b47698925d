"""The valve's page: what was offered, admitted and shed, by class and tenant, and whether answers flow.

    header | {"classes": [...]} | one summary frame | rows, one frame for each (class, tenant) seen

A row is rewritten whole for every request, so offered = admitted + shed in every reading of it. The summary
says how many rows are in use, when bytes last left, since when the oldest unanswered request waits, and the
share being shed of each class: that echo, not the pilot's write, is *applied*. Times are the writer's
monotonic clock, compared only with each other.

The table is bounded: tenants beyond it are counted together under OTHER. One writer; O(1) a request.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvpilot.link.page import HEADER_BYTES, Identity, LinkError, PageHeader
from kvpilot.link.records import Frame, FrameWriter

MAX_ROWS = 256
MAX_CLASSES = 8
OTHER = "(other)"
"""The tenant that stands for all tenants beyond the table."""

_TENANT_BYTES = 32
_WORD = 8
_ROW = Frame(f"6Q{_TENANT_BYTES}s")
_SUMMARY = Frame(f"8Q{MAX_CLASSES}d")
_BODY_BYTES = 1024
_SUMMARY_OFFSET = HEADER_BYTES + _BODY_BYTES
_ROWS_OFFSET = _SUMMARY_OFFSET + 256
assert _SUMMARY.size <= _ROWS_OFFSET - _SUMMARY_OFFSET

VALVE_PAGE_BYTES = _ROWS_OFFSET + MAX_ROWS * _ROW.size

_READ_TRIES = 4
"""Readings of one page before giving up: the writer is never in the middle of one row for long."""


@dataclass(slots=True)
class _Row:
    """Counters of one (class, tenant)."""

    level: int
    tenant: bytes
    sequence: int = 0
    offered: int = 0
    admitted: int = 0
    shed: int = 0
    in_flight: int = 0
    body_bytes: int = 0


class ValvePageWriter:
    """Counts over a writable buffer of VALVE_PAGE_BYTES: a mapped file, or a bytearray where there is
    none."""

    def __init__(
        self,
        buffer: "bytearray | memoryview | object",
        classes: Sequence[str],
        *,
        nonce: int,
        identity: Identity,
    ) -> None:
        if not 1 <= len(classes) <= MAX_CLASSES:
            raise LinkError(f"valve page: {len(classes)} classes; between 1 and {MAX_CLASSES} fit")
        body = json.dumps({"classes": list(classes)}).encode()
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        assert len(body) <= _BODY_BYTES, "a class name is bounded by the callers file"
        if len(view) != VALVE_PAGE_BYTES:
            raise LinkError(f"valve buffer of {len(view)} bytes: {VALVE_PAGE_BYTES} needed")
        header = PageHeader(
            "valve",
            len(view),
            nonce,
            identity,
            len(body),
            zlib.crc32(body),
            _ROW.size,
            MAX_ROWS,
            (_SUMMARY_OFFSET, _ROWS_OFFSET),
        )
        self._classes = len(classes)
        self._view = view
        self._words = view.cast("Q")
        self._rows: list[_Row] = []
        self._index: dict[tuple[int, str], int] = {}
        self._flights: dict[int, tuple[int, int]] = {}
        self._ticket = 0
        self._sequence = 0
        self.first_byte_ns = 0
        """When a response last began, 0 for never."""
        self.last_byte_ns = 0
        """When a response byte last left, 0 for never."""
        self.failures = 0
        """Times that the valve's own code failed and the request went through untouched."""
        self.controls_unreadable = 0
        """Times that the controls page could not be read."""
        self._row_writer = FrameWriter(_ROW, self._words)
        self._summary_writer = FrameWriter(_SUMMARY, self._words)
        self._written_ns = 0
        self._controls_sequence = 0
        self._fractions = (0.0,) * MAX_CLASSES
        self._write_summary()
        # The header last: whoever finds a magic word finds a page.
        view[HEADER_BYTES : HEADER_BYTES + len(body)] = body
        view[:HEADER_BYTES] = header.pack()

    @property
    def in_flight(self) -> int:
        """Admitted requests whose response has not ended."""
        return len(self._flights)

    def admitted(self, level: int, tenant: str, body_bytes: int, now_ns: int) -> int:
        """Count a request let in; returns the ticket to hand to `ended`."""
        number = self._find(level, tenant)
        row = self._rows[number]
        row.offered += 1
        row.admitted += 1
        row.in_flight += 1
        row.body_bytes += body_bytes
        self._write_row(number)
        self._ticket += 1
        self._flights[self._ticket] = (number, now_ns)
        return self._ticket

    def shed(self, level: int, tenant: str, body_bytes: int) -> None:
        """Count a request turned away."""
        number = self._find(level, tenant)
        row = self._rows[number]
        row.offered += 1
        row.shed += 1
        row.body_bytes += body_bytes
        self._write_row(number)

    def ended(self, ticket: int) -> None:
        """An admitted request's response ended, however. A ticket counts once; again is nothing."""
        flight = self._flights.pop(ticket, None)
        if flight is not None:
            self._rows[flight[0]].in_flight -= 1
            self._write_row(flight[0])

    def beat(self, now_ns: int, fractions: Sequence[float], controls_sequence: int) -> None:
        """Write the summary: called every few tens of milliseconds at most, not for every byte."""
        self._written_ns = now_ns
        self._fractions = (*fractions, *(0.0,) * (MAX_CLASSES - len(fractions)))
        self._controls_sequence = controls_sequence
        self._write_summary()

    def close(self) -> None:
        """Let go of the buffer, so that a mapped file can be closed. Nothing may be counted after."""
        self._words.release()
        self._view.release()

    def _write_summary(self) -> None:
        self._sequence += 1
        self._summary_writer.write(
            _SUMMARY_OFFSET // _WORD,
            self._sequence,
            len(self._rows),
            self._written_ns,
            self.first_byte_ns,
            self.last_byte_ns,
            next(iter(self._flights.values()))[1] if self._flights else 0,
            self.failures,
            self.controls_unreadable,
            self._controls_sequence,
            *self._fractions,
        )

    def _find(self, level: int, tenant: str) -> int:
        number = self._index.get((level, tenant))
        if number is not None:
            return number
        # The last rows are kept for the overflow of each class, so that no class is ever without one.
        if len(self._rows) >= MAX_ROWS - self._classes and tenant != OTHER:
            return self._find(level, OTHER)
        number = len(self._rows)
        self._rows.append(_Row(level, tenant.encode("utf-8", "replace")[:_TENANT_BYTES]))
        self._index[level, tenant] = number
        self._write_row(number)
        self._write_summary()
        return number

    def _write_row(self, number: int) -> None:
        row = self._rows[number]
        row.sequence += 1
        self._row_writer.write(
            (_ROWS_OFFSET + number * _ROW.size) // _WORD,
            row.sequence,
            row.level,
            row.offered,
            row.admitted,
            row.shed,
            row.in_flight,
            row.body_bytes,
            row.tenant,
        )


@dataclass(frozen=True, slots=True)
class ValveRow:
    """One class and tenant, cumulative since the valve started, save `in_flight`."""

    class_name: str
    level: int
    tenant: str
    offered: int
    admitted: int
    shed: int
    in_flight: int
    body_bytes: int


@dataclass(frozen=True, slots=True)
class ValveSnapshot:
    """One reading of one valve."""

    rows: tuple[ValveRow, ...]
    written_ns: int
    first_byte_ns: int
    last_byte_ns: int
    oldest_in_flight_ns: int
    failures: int
    controls_unreadable: int
    controls_sequence: int
    fractions: dict[str, float]
    """Share being shed of each class by leases on all or on classes, as of `written_ns`."""

    @property
    def in_flight(self) -> int:
        return sum(row.in_flight for row in self.rows)

    @property
    def seconds_since_byte(self) -> float | None:
        """At `written_ns`: since the last response byte, or since the oldest request in flight if that is
        later.

        None with nothing in flight.
        """
        if not self.oldest_in_flight_ns:
            return None
        return max(self.written_ns - max(self.last_byte_ns, self.oldest_in_flight_ns), 0) / 1e9


class ValvePageReader:
    """Reads one page through a pread-like `read_at(offset, size)`; raises LinkError for any other page."""

    def __init__(self, read_at: Callable[[int, int], bytes]) -> None:
        self._read_at = read_at
        header = PageHeader.unpack(read_at(0, HEADER_BYTES), "valve")
        body = read_at(HEADER_BYTES, min(header.body_bytes, _BODY_BYTES))
        try:
            if zlib.crc32(body) != header.body_crc:
                raise ValueError("checksum")
            self.classes = tuple(str(name) for name in json.loads(body)["classes"])
        except (ValueError, KeyError, TypeError) as error:
            raise LinkError(f"damaged body of a kvpilot valve page: {error}") from error
        if header.record_bytes != _ROW.size or header.sections[:2] != (_SUMMARY_OFFSET, _ROWS_OFFSET):
            raise LinkError("a valve page of another layout: install the same kvpilot release on both sides")
        self.nonce = header.nonce
        self.identity = header.identity

    def read(self) -> ValveSnapshot | None:
        """The page now, or None where no whole reading could be had (torn, cut short): unknown, not zero."""
        for _ in range(_READ_TRIES):
            snapshot = self._read_once()
            if snapshot is not None:
                return snapshot
        return None

    def _read_once(self) -> ValveSnapshot | None:
        summary = _SUMMARY.unpack(self._read_at(_SUMMARY_OFFSET, _SUMMARY.size))
        if summary is None or summary[1] > MAX_ROWS:
            return None
        _, used, written, first, last, oldest, failures, unreadable, controls, *shares = summary
        data = self._read_at(_ROWS_OFFSET, used * _ROW.size)
        rows = []
        for number in range(used):
            row = self._row(data, number)
            if row is None:
                return None
            rows.append(row)
        fractions = dict(zip(self.classes, shares, strict=False))
        return ValveSnapshot(
            tuple(rows), written, first, last, oldest, failures, unreadable, controls, fractions
        )

    def _row(self, data: bytes, number: int) -> ValveRow | None:
        record = _ROW.unpack(data, number * _ROW.size)
        if record is None or record[1] >= len(self.classes):
            return None
        _, level, offered, admitted, shed, in_flight, body_bytes, tenant = record
        name = tenant.rstrip(b"\0").decode("utf-8", "replace")
        return ValveRow(self.classes[level], level, name, offered, admitted, shed, in_flight, body_bytes)
