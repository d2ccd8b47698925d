"""A journal that somebody else may be writing, or that was copied off its machine: read, never touched."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvpilot.journal.records import DecisionRecord, EventRecord, OverrideRecord, SwitchRecord
from kvpilot.journal.store import FORMAT, OLDEST_FORMAT, JournalError, decision_of, decisions_query


@dataclass(frozen=True, slots=True)
class Past:
    """What the journal says of one engine start, each in the order of its time."""

    decisions: tuple[DecisionRecord, ...] = ()
    overrides: tuple[OverrideRecord, ...] = ()
    switches: tuple[SwitchRecord, ...] = ()
    events: tuple[EventRecord, ...] = ()
    """Those that name this start."""


def read_past(path: Path, nonce: int, from_wall_ns: int, to_wall_ns: int) -> Past:
    """Decisions about the engine start `nonce`; what people ordered from one wall time to another; events
    that name it, whenever. Raises JournalError.
    """
    span = (from_wall_ns, to_wall_ns)
    start = f"{nonce:016x}"
    try:
        with opened(path) as (database, version):
            query = f"{decisions_query(version)} WHERE engine_nonce = ? ORDER BY number"
            decisions = database.execute(query, (start,))
            overrides = database.execute(
                "SELECT at_wall_ns, knob, scope, value, until_wall_ns, why, who FROM overrides"
                " WHERE at_wall_ns BETWEEN ? AND ? ORDER BY id",
                span,
            )
            switches = database.execute(
                "SELECT at_wall_ns, off, why, who FROM switches WHERE at_wall_ns BETWEEN ? AND ? ORDER BY id",
                span,
            )
            events = database.execute(
                "SELECT at_wall_ns, kind, detail FROM events WHERE instr(detail, ?) ORDER BY id", (start,)
            )
            return Past(
                tuple(decision_of(row) for row in decisions),
                tuple(OverrideRecord(*row) for row in overrides),
                tuple(SwitchRecord(row[0], bool(row[1]), *row[2:]) for row in switches),
                tuple(EventRecord(*row) for row in events),
            )
    except (sqlite3.Error, json.JSONDecodeError, TypeError, ValueError) as error:
        raise JournalError(f"journal {path}: {error}") from error


@contextmanager
def opened(path: Path) -> Iterator[tuple[sqlite3.Connection, int]]:
    """Read-only, and its format. Where even the write-ahead log's index cannot be written (a read-only
    volume, another user's file), what is in the main file has to do.
    """
    if not path.is_file():
        raise JournalError(f"journal {path}: no such file")
    for mode in ("mode=ro", "immutable=1"):
        with closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=2.0)
        ) as database:
            try:
                version = database.execute("PRAGMA user_version").fetchone()[0]
            except sqlite3.OperationalError:
                if mode == "immutable=1":
                    raise
                continue
            if not OLDEST_FORMAT <= version <= FORMAT:
                raise JournalError(f"journal {path}: format {version}, this kvpilot knows {FORMAT}")
            yield database, version
            return
