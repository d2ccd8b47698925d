"""The valve's page as its readers see it: what was offered, admitted and shed, by class and tenant, whether
answers flow, and which leases this valve obeys: that echo, not the pilot's write, is *applied*.

The summary says when bytes of an answer last left, since when the oldest unanswered request waits, how many
wait for their own client to take what it was given, and what limits each class. Times are the writer's
monotonic clock, compared only with each other. (`valve_layout` has the bytes, `valve_writer` the other side.)
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvpilot.link.controls import SCOPE_KINDS, Scope
from kvpilot.link.page import HEADER_BYTES, LinkError, PageHeader
from kvpilot.link.valve_layout import BODY_BYTES, SHED, Layout

OTHER = "(other)"
"""The tenant that stands for all tenants beyond the table."""

_READ_TRIES = 4
"""Readings of one page before giving up: the writer is never in the middle of one row for long."""


class LeaseEcho(NamedTuple):
    """One lease as a valve has it."""

    knob: str
    scope: Scope
    value: float
    opened: float = 0.0
    """0 while in force; from the moment of lapse the share of the opening that is over."""
    left: float = math.nan
    """Credits: prompt tokens that this process may still accept; below 0, what it owes."""
    share: float = math.nan
    """Credits: this process's share of them, as it claims it before its siblings."""
    rate: float = math.nan
    """Credits: prompt tokens a second that this process is being offered in this scope."""
    order: bool = False
    decision_id: int = 0


@dataclass(frozen=True, slots=True)
class ValveRow:
    """One class and tenant, cumulative since the valve started, save `in_flight`. Bytes and tokens of a
    prompt are what the valve took it for: a body of unknown length counts as the median."""

    class_name: str
    level: int
    tenant: str
    offered: int
    admitted: int
    shed_by: dict[str, int]
    """Requests turned away, by why: see SHED."""
    in_flight: int
    offered_bytes: int
    admitted_bytes: int
    offered_tokens: int
    admitted_tokens: int

    @property
    def shed(self) -> int:
        """Requests turned away."""
        return sum(self.shed_by.values())


@dataclass(frozen=True, slots=True)
class ValveSnapshot:
    """One reading of one valve."""

    rows: tuple[ValveRow, ...]
    leases: tuple[LeaseEcho, ...]
    written_ns: int
    first_byte_ns: int
    last_byte_ns: int
    oldest_in_flight_ns: int
    failures: int
    controls_unreadable: int
    controls_sequence: int
    taking: int
    """Requests in flight that wait for their own client, as of `written_ns`."""
    bytes_per_token: float | None
    """By which bodies are charged."""
    fractions: dict[str, float]
    """Share being shed of each class by leases on all or on classes, as of `written_ns`."""
    credits_left: dict[str, float]
    """Prompt tokens that may still be accepted of each class, as of `written_ns`; absent without a limit."""

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
        body = read_at(HEADER_BYTES, min(header.body_bytes, BODY_BYTES))
        if zlib.crc32(body) != header.body_crc:
            raise LinkError("damaged body of a kvpilot valve page: checksum")
        self._layout = Layout.parse(header, body)
        self.classes = self._layout.classes
        self.nonce = header.nonce
        self.identity = header.identity
        self._decoded: list[tuple[bytes, ValveRow]] = []
        """The rows as they were last read, and the bytes that said so: most stand still between two looks."""

    def read(self) -> ValveSnapshot | None:
        """The page now, or None where no whole reading could be had (torn, cut short): unknown, not zero."""
        for _ in range(_READ_TRIES):
            snapshot = self._read_once()
            if snapshot is not None:
                return snapshot
        return None

    def leases(self) -> tuple[LeaseEcho, ...] | None:
        """The leases alone, as `read` has them: a few short reads."""
        for _ in range(_READ_TRIES):
            summary = self._summary()
            leases = self._leases(summary) if summary is not None else None
            if leases is not None:
                return leases
        return None

    def _read_once(self) -> ValveSnapshot | None:
        summary = self._summary()
        leases = self._leases(summary) if summary is not None else None
        if summary is None or leases is None or summary["rows"] > self._layout.max_rows:
            return None
        table = self._layout.rows
        size, decoded = table.frame.size, self._decoded
        data = self._read_at(self._layout.rows_offset, summary["rows"] * size)
        rows = []
        for number in range(summary["rows"]):
            raw = data[number * size : (number + 1) * size]
            if number < len(decoded) and decoded[number][0] == raw:
                rows.append(decoded[number][1])
                continue
            record = table.unpack(raw)
            if record is None or record[1]["level"] >= len(self.classes):
                return None
            rows.append(self._row(record[1]))
            decoded[number : number + 1] = [(raw, rows[-1])]
        numbered = list(enumerate(self.classes))
        left = {name: summary[f"credits_left.{level}"] for level, name in numbered}
        bytes_per_token = summary["bytes_per_token"]
        return ValveSnapshot(
            tuple(rows),
            leases,
            summary["written_ns"],
            summary["first_byte_ns"],
            summary["last_byte_ns"],
            summary["oldest_in_flight_ns"],
            summary["failures"],
            summary["controls_unreadable"],
            summary["controls_sequence"],
            summary["taking"],
            None if math.isnan(bytes_per_token) else bytes_per_token,
            {name: summary[f"fraction.{level}"] for level, name in numbered},
            {name: tokens for name, tokens in left.items() if not math.isnan(tokens)},
        )

    def _summary(self) -> dict[str, Any] | None:
        table = self._layout.summary
        record = table.unpack(self._read_at(self._layout.summary_offset, table.frame.size))
        return None if record is None else record[1]

    def _leases(self, summary: dict[str, Any]) -> tuple[LeaseEcho, ...] | None:
        """None unless every lease is of the table that the summary names."""
        table, count = self._layout.leases, summary["leases"]
        if count > self._layout.max_leases:
            return None
        data = self._read_at(self._layout.leases_offset, count * table.frame.size) if count else b""
        leases = []
        for number in range(count):
            record = table.unpack(data, number * table.frame.size)
            if record is None or record[0] != summary["lease_table"]:
                return None
            values = record[1]
            if not 1 <= values["scope"] <= len(SCOPE_KINDS):
                return None
            leases.append(_lease(values))
        return tuple(leases)

    def _row(self, values: dict[str, Any]) -> ValveRow:
        return ValveRow(
            self.classes[values["level"]],
            values["level"],
            values["tenant"],
            values["offered"],
            values["admitted"],
            {why: values[f"shed_{why}"] for why in SHED},
            values["in_flight"],
            values["offered_bytes"],
            values["admitted_bytes"],
            values["offered_tokens"],
            values["admitted_tokens"],
        )


def _lease(values: dict[str, Any]) -> LeaseEcho:
    kind = SCOPE_KINDS[values["scope"] - 1]
    argument = {"all": None, "class_at_most": values["level"], "tenant": values["tenant"]}[kind]
    return LeaseEcho(
        values["knob"],
        Scope(kind, argument),
        values["value"],
        values["opened"],
        values["left"],
        values["share"],
        values["rate"],
        bool(values["order"]),
        values["decision_id"],
    )
