"""The layout of a valve's page, as the page itself tells it.

    header | body (JSON) | summary, one frame | leases, a frame each | rows, a frame for each (class, tenant)

The body names the classes, the columns of each table, and how many leases fit; the header has the three
offsets, the size of a row and their number. Readers find columns by name and ignore those they do not know:
another column is no new format. Column types: `u64`, `f64`, and `text`, 32 bytes of UTF-8 filled with zeros.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpilot.link.controls import MAX_LEASES
from kvpilot.link.page import HEADER_BYTES, LinkError, PageHeader
from kvpilot.link.records import Frame

MAX_ROWS = 256
MAX_CLASSES = 8
TEXT_BYTES = 32
BODY_BYTES = 4096
_MAX_PAGE_BYTES = 1 << 20
_CODES = {"u64": "Q", "f64": "d", "text": f"{TEXT_BYTES}s"}

Columns = Sequence[tuple[str, str]]

SUMMARY: Columns = (
    ("rows", "u64"),
    ("leases", "u64"),
    ("lease_table", "u64"),
    ("written_ns", "u64"),
    ("first_byte_ns", "u64"),
    ("last_byte_ns", "u64"),
    ("oldest_in_flight_ns", "u64"),
    ("failures", "u64"),
    ("controls_unreadable", "u64"),
    ("controls_sequence", "u64"),
    ("taking", "u64"),
    ("bytes_per_token", "f64"),
    *((f"fraction.{level}", "f64") for level in range(MAX_CLASSES)),
    *((f"credits_left.{level}", "f64") for level in range(MAX_CLASSES)),
)
"""`lease_table` is the sequence of the lease frames that belong to this summary; `credits_left` is not a
number where no credits limit the class."""

LEASES: Columns = (
    ("knob", "text"),
    ("scope", "u64"),
    ("level", "u64"),
    ("tenant", "text"),
    ("order", "u64"),
    ("decision_id", "u64"),
    ("value", "f64"),
    ("opened", "f64"),
    ("left", "f64"),
    ("share", "f64"),
    ("rate", "f64"),
)

SHED = ("fraction", "credits", "draining")
"""Why a request is turned away."""

ROWS: Columns = (
    ("level", "u64"),
    ("tenant", "text"),
    ("offered", "u64"),
    ("admitted", "u64"),
    *((f"shed_{why}", "u64") for why in SHED),
    ("in_flight", "u64"),
    ("offered_bytes", "u64"),
    ("admitted_bytes", "u64"),
    ("offered_tokens", "u64"),
    ("admitted_tokens", "u64"),
)


class Table:
    """One table's columns and the frame that holds a row of them."""

    def __init__(self, columns: Columns) -> None:
        self.columns = tuple((name, type_) for name, type_ in columns)
        self.frame = Frame("".join(_CODES[type_] for _, type_ in self.columns))

    def unpack(self, data: bytes, offset: int = 0) -> tuple[int, dict[str, Any]] | None:
        """(sequence, values by name), or None where the record is short, torn or was never written."""
        record = self.frame.unpack(data, offset)
        if record is None:
            return None
        return record[0], {
            name: _text(value) if type_ == "text" else value
            for (name, type_), value in zip(self.columns, record[1:], strict=True)
        }


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "replace")


def text(value: str) -> bytes:
    """A text column's bytes, never with half a character at the end."""
    return value.encode("utf-8", "replace")[:TEXT_BYTES].decode("utf-8", "ignore").encode()


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in one page."""

    classes: tuple[str, ...]
    summary: Table
    leases: Table
    rows: Table
    summary_offset: int
    leases_offset: int
    rows_offset: int
    max_leases: int
    max_rows: int

    @property
    def page_bytes(self) -> int:
        """Size of the whole page."""
        return self.rows_offset + self.max_rows * self.rows.frame.size

    @classmethod
    def ours(cls, classes: Sequence[str]) -> "Layout":
        """The layout that this release writes. Raises LinkError for more classes than fit."""
        if not 1 <= len(classes) <= MAX_CLASSES:
            raise LinkError(f"valve page: {len(classes)} classes; between 1 and {MAX_CLASSES} fit")
        summary, leases, rows = Table(SUMMARY), Table(LEASES), Table(ROWS)
        first = HEADER_BYTES + BODY_BYTES
        second = first + summary.frame.size
        third = second + MAX_LEASES * leases.frame.size
        return cls(tuple(classes), summary, leases, rows, first, second, third, MAX_LEASES, MAX_ROWS)

    def body(self) -> bytes:
        """The JSON that describes it."""
        tables = {"summary": self.summary, "leases": self.leases, "rows": self.rows}
        described: dict[str, Any] = {"classes": list(self.classes), "max_leases": self.max_leases}
        described |= {name: [f"{n}:{t}" for n, t in table.columns] for name, table in tables.items()}
        return json.dumps(described, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, header: PageHeader, body: bytes) -> "Layout":
        """The layout of a page found. Raises LinkError where it makes no sense or lacks what we read."""
        try:
            described: Mapping[str, Any] = json.loads(body)
            tables = {name: _table(described[name]) for name in ("summary", "leases", "rows")}
            layout = cls(
                tuple(str(name) for name in described["classes"]),
                tables["summary"],
                tables["leases"],
                tables["rows"],
                header.sections[0],
                header.sections[1],
                header.sections[2],
                max_leases=int(described["max_leases"]),
                max_rows=header.record_count,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LinkError(f"damaged body of a kvpilot valve page: {error!r}") from error
        wanted = {"summary": SUMMARY, "leases": LEASES, "rows": ROWS}
        for name, columns in wanted.items():
            missing = set(columns) - set(tables[name].columns)
            if missing:
                raise LinkError(
                    f"a valve page without {name}.{min(missing)[0]}: "
                    "install the same kvpilot release beside the engine and in it"
                )
        if not layout._is_plausible(header.page_bytes):
            raise LinkError("a valve page whose size is not that of its tables")
        return layout

    def _is_plausible(self, page_bytes: int) -> bool:
        leases_end = self.leases_offset + self.max_leases * self.leases.frame.size
        return (
            1 <= len(self.classes) <= MAX_CLASSES
            and self.summary_offset >= HEADER_BYTES
            and self.summary_offset + self.summary.frame.size <= self.leases_offset
            and leases_end <= self.rows_offset
            and self.page_bytes == page_bytes <= _MAX_PAGE_BYTES
        )


def _table(columns: Sequence[str]) -> Table:
    pairs = [column.rsplit(":", 1) for column in columns]
    return Table([(name, type_) for name, type_ in pairs])


VALVE_PAGE_BYTES = Layout.ours(("any",)).page_bytes
