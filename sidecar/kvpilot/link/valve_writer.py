"""The valve's half of its page: counts every request, echoes every lease.

A row is rewritten whole for every request, so offered = admitted + shed in every reading of it. The table is
bounded: tenants beyond it are counted together under OTHER. One writer; O(1) a request.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from kvpilot.link.controls import SCOPE_KINDS
from kvpilot.link.page import HEADER_BYTES, Identity, LinkError, PageHeader
from kvpilot.link.records import FrameWriter
from kvpilot.link.valve_layout import BODY_BYTES, MAX_CLASSES, MAX_ROWS, SHED, VALVE_PAGE_BYTES, Layout, text
from kvpilot.link.valve_page import OTHER, LeaseEcho

_WORD = 8


@dataclass(slots=True)
class _Row:
    """Counters of one (class, tenant)."""

    level: int
    tenant: bytes
    shed: list[int]
    sequence: int = 0
    offered: int = 0
    admitted: int = 0
    in_flight: int = 0
    offered_bytes: int = 0
    admitted_bytes: int = 0
    offered_tokens: int = 0
    admitted_tokens: int = 0


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
        layout = Layout.ours(classes)
        body = layout.body()
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        assert len(body) <= BODY_BYTES, "a class name is bounded by the callers file"
        if len(view) != VALVE_PAGE_BYTES:
            raise LinkError(f"valve buffer of {len(view)} bytes: {VALVE_PAGE_BYTES} needed")
        header = PageHeader(
            "valve",
            len(view),
            nonce,
            identity,
            len(body),
            zlib.crc32(body),
            layout.rows.frame.size,
            layout.max_rows,
            (layout.summary_offset, layout.leases_offset, layout.rows_offset),
        )
        self._layout = layout
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
        """When a byte of an answer last left, 0 for never; an error is no answer."""
        self.taking = 0
        """Requests whose client has yet to take bytes that the engine gave: nobody else is being awaited."""
        self.failures = 0
        """Times that the valve's own code failed and the request went through untouched."""
        self.controls_unreadable = 0
        """Times that the controls page could not be read."""
        self._row_writer = FrameWriter(layout.rows.frame, self._words)
        self._lease_writer = FrameWriter(layout.leases.frame, self._words)
        self._summary_writer = FrameWriter(layout.summary.frame, self._words)
        self._written_ns = 0
        self._controls_sequence = 0
        self._bytes_per_token = math.nan
        self._leases = 0
        self._lease_table = 0
        self._fractions = (0.0,) * MAX_CLASSES
        self._credits_left = (math.nan,) * MAX_CLASSES
        self._write_summary()
        # The header last: whoever finds a magic word finds a page.
        view[HEADER_BYTES : HEADER_BYTES + len(body)] = body
        view[:HEADER_BYTES] = header.pack()

    @property
    def in_flight(self) -> int:
        """Admitted requests whose response has not ended."""
        return len(self._flights)

    def admitted(self, level: int, tenant: str, body_bytes: int, now_ns: int, tokens: int = 0) -> int:
        """Count a request let in, and what it was charged; returns the ticket to hand to `ended`."""
        number = self._find(level, tenant)
        row = self._rows[number]
        row.offered += 1
        row.admitted += 1
        row.in_flight += 1
        row.offered_bytes += body_bytes
        row.admitted_bytes += body_bytes
        row.offered_tokens += tokens
        row.admitted_tokens += tokens
        self._write_row(number)
        self._ticket += 1
        self._flights[self._ticket] = (number, now_ns)
        return self._ticket

    def shed(self, level: int, tenant: str, body_bytes: int, why: str = "fraction", tokens: int = 0) -> None:
        """Count a request turned away; `why` is one of SHED."""
        number = self._find(level, tenant)
        row = self._rows[number]
        row.offered += 1
        row.shed[SHED.index(why)] += 1
        row.offered_bytes += body_bytes
        row.offered_tokens += tokens
        self._write_row(number)

    def ended(self, ticket: int) -> None:
        """An admitted request's response ended, however. A ticket counts once; again is nothing."""
        flight = self._flights.pop(ticket, None)
        if flight is not None:
            self._rows[flight[0]].in_flight -= 1
            self._write_row(flight[0])

    def beat(
        self,
        now_ns: int,
        fractions: Sequence[float],
        controls_sequence: int,
        credits_left: Sequence[float] = (),
        leases: Sequence[LeaseEcho] = (),
        bytes_per_token: float = math.nan,
    ) -> None:
        """Write leases and summary: every few tens of milliseconds at most, not for every byte.

        `fractions` and `credits_left` are by class level; not a number means no limit.
        """
        self._written_ns = now_ns
        self._fractions = (*fractions, *(0.0,) * (MAX_CLASSES - len(fractions)))
        self._credits_left = (*credits_left, *(math.nan,) * (MAX_CLASSES - len(credits_left)))
        self._controls_sequence = controls_sequence
        self._bytes_per_token = bytes_per_token
        if leases or self._leases:
            self._write_leases(leases[: self._layout.max_leases])
        self._write_summary()

    def close(self) -> None:
        """Let go of the buffer, so that a mapped file can be closed. Nothing may be counted after."""
        self._words.release()
        self._view.release()

    def _write_leases(self, leases: Sequence[LeaseEcho]) -> None:
        """All of them under a sequence of their own, so that no reader takes some of another table."""
        self._leases = len(leases)
        self._lease_table += 1
        word = self._layout.leases_offset // _WORD
        for lease in leases:
            kind, argument = lease.scope
            self._lease_writer.write(
                word,
                self._lease_table,
                text(lease.knob),
                SCOPE_KINDS.index(kind) + 1,
                argument if isinstance(argument, int) else 0,
                text(argument) if isinstance(argument, str) else b"",
                lease.order,
                lease.decision_id,
                lease.value,
                lease.opened,
                lease.left,
                lease.share,
                lease.rate,
            )
            word += self._layout.leases.frame.words

    def _write_summary(self) -> None:
        self._sequence += 1
        self._summary_writer.write(
            self._layout.summary_offset // _WORD,
            self._sequence,
            len(self._rows),
            self._leases,
            self._lease_table,
            self._written_ns,
            self.first_byte_ns,
            self.last_byte_ns,
            next(iter(self._flights.values()))[1] if self._flights else 0,
            self.failures,
            self.controls_unreadable,
            self._controls_sequence,
            self.taking,
            self._bytes_per_token,
            *self._fractions,
            *self._credits_left,
        )

    def _find(self, level: int, tenant: str) -> int:
        number = self._index.get((level, tenant))
        if number is not None:
            return number
        # The last rows are kept for the overflow of each class, so that no class is ever without one.
        if len(self._rows) >= MAX_ROWS - len(self._layout.classes) and tenant != OTHER:
            return self._find(level, OTHER)
        number = len(self._rows)
        self._rows.append(_Row(level, text(tenant), [0] * len(SHED)))
        self._index[level, tenant] = number
        self._write_row(number)
        self._write_summary()
        return number

    def _write_row(self, number: int) -> None:
        row = self._rows[number]
        row.sequence += 1
        self._row_writer.write(
            (self._layout.rows_offset + number * self._layout.rows.frame.size) // _WORD,
            row.sequence,
            row.level,
            row.tenant,
            row.offered,
            row.admitted,
            *row.shed,
            row.in_flight,
            row.offered_bytes,
            row.admitted_bytes,
            row.offered_tokens,
            row.admitted_tokens,
        )
