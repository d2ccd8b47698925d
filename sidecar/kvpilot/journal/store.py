"""The journal's file: one SQLite database in WAL mode, written by one pilot, readable by anybody meanwhile.

Bounded: `prune` keeps the newest rows of each table. A batch is one transaction: it is in whole or not at
all. Not thread-safe; the pilot's writer thread is its only user once the pilot flies.
"""

import json
import math
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvpilot.journal.records import (
    DecisionRecord,
    EffectRecord,
    EventRecord,
    OverrideRecord,
    Record,
    RuleRecord,
    SwitchRecord,
    VerdictRecord,
)

KEEP_ROWS = 200_000
"""Per table. A decision is about 300 bytes: the file stays under some 100 MB."""

FORMAT = 2
OLDEST_FORMAT = 1
"""Read as it is, and brought to FORMAT when a pilot opens it."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS decisions (
    number INTEGER PRIMARY KEY, at_wall_ns INTEGER, engine_nonce TEXT, policy TEXT, rule TEXT, knob TEXT,
    scope TEXT, before REAL, after REAL, verdict TEXT, reason TEXT, inputs TEXT, confirmed_after_s REAL,
    ages TEXT, phase TEXT, phase_s REAL, claims TEXT, text TEXT);
CREATE TABLE IF NOT EXISTS rules (
    key TEXT PRIMARY KEY, at_wall_ns INTEGER, policy TEXT, rule TEXT, described TEXT);
CREATE TABLE IF NOT EXISTS effects (
    id INTEGER PRIMARY KEY, at_wall_ns INTEGER, policy TEXT, rule TEXT, input TEXT, expected TEXT, before
    REAL, after REAL, met INTEGER, reason TEXT, number INTEGER);
CREATE TABLE IF NOT EXISTS overrides (
    id INTEGER PRIMARY KEY, at_wall_ns INTEGER, knob TEXT, scope TEXT, value REAL, until_wall_ns INTEGER, why
    TEXT, who TEXT);
CREATE TABLE IF NOT EXISTS switches (id INTEGER PRIMARY KEY, at_wall_ns INTEGER, off INTEGER, why TEXT, who
TEXT); CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, at_wall_ns INTEGER, kind TEXT, detail TEXT);
"""
_MIGRATE = """
ALTER TABLE decisions ADD COLUMN ages TEXT; ALTER TABLE decisions ADD COLUMN phase TEXT;
ALTER TABLE decisions ADD COLUMN phase_s REAL; ALTER TABLE decisions ADD COLUMN claims TEXT;
ALTER TABLE decisions ADD COLUMN text TEXT; ALTER TABLE effects ADD COLUMN number INTEGER;
"""
"""From format 1."""

_FIRST = "number, at_wall_ns, engine_nonce, policy, rule, knob, scope, before, after, verdict, reason, inputs"
_SINCE_2 = "ages, phase, phase_s, claims, text"
_TABLES = {
    "decisions": "number", "effects": "id", "overrides": "id", "switches": "id", "events": "id",
    "rules": "rowid",
}  # fmt: skip


class JournalError(Exception):
    """The journal cannot be used; the message is one line."""


class JournalStore:
    """An open journal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=5.0)
            self._database.execute("PRAGMA journal_mode=WAL")
            # WAL with NORMAL never corrupts; a power cut may lose the last second of rows.
            self._database.execute("PRAGMA synchronous=NORMAL")
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version and not OLDEST_FORMAT <= version <= FORMAT:
                raise JournalError(
                    f"journal {path}: format {version}, this kvpilot knows {FORMAT}: move the file away"
                )
            migrate = _MIGRATE if version == OLDEST_FORMAT else ""
            # In one transaction: a pilot that is killed here leaves the old format or the new.
            self._database.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} {migrate} PRAGMA user_version={FORMAT}; COMMIT;"
            )
        except OSError as error:
            raise JournalError(
                f"journal {path}: {error.strerror}: write `journal: FILE` in kvpilot.yaml"
            ) from error
        except sqlite3.Error as error:
            raise JournalError(
                f"journal {path}: {error}: move the file away, or name another as `journal`"
            ) from error

    def write(self, records: Iterable[Record]) -> None:
        """Add a batch. Raises sqlite3.Error, and then none of it is in."""
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        try:
            for record in records:
                database.execute(*_statement(record))
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise

    def prune(self, keep_rows: int = KEEP_ROWS) -> None:
        """Drop all but the newest rows of each table; orders in force are newer than what this drops."""
        for table, key in _TABLES.items():
            self._database.execute(
                f"DELETE FROM {table} WHERE {key} <= (SELECT max({key}) FROM {table}) - ?", (keep_rows,)
            )

    def last_number(self) -> int:
        """The number of the newest decision; 0 before the first."""
        return int(self._database.execute("SELECT coalesce(max(number), 0) FROM decisions").fetchone()[0])

    def decisions(self, last: int) -> list[DecisionRecord]:
        """The newest decisions, newest first."""
        rows = self._database.execute(f"{decisions_query()} ORDER BY number DESC LIMIT ?", (last,))
        return [decision_of(row) for row in rows]

    def decision(self, number: int) -> DecisionRecord | None:
        """The decision of that number, if the journal still has it."""
        row = self._database.execute(f"{decisions_query()} WHERE number = ?", (number,)).fetchone()
        return None if row is None else decision_of(row)

    def rule(self, key: str) -> RuleRecord | None:
        """The rule's text of that key, if the journal still has it."""
        return rule_of(self._database, key)

    def effects(self, last: int) -> list[EffectRecord]:
        """The newest effects, newest first."""
        rows = self._database.execute(f"{effects_query()} ORDER BY id DESC LIMIT ?", (last,))
        return [EffectRecord(*row) for row in rows]

    def overrides_in_force(self, now_wall_ns: int) -> list[OverrideRecord]:
        """For each knob and scope its newest order, if that has not ended."""
        rows = self._database.execute(
            "SELECT at_wall_ns, knob, scope, value, until_wall_ns, why, who FROM overrides"
            " WHERE id IN (SELECT max(id) FROM overrides GROUP BY knob, scope)"
            " AND value IS NOT NULL AND until_wall_ns > ? ORDER BY id",
            (now_wall_ns,),
        )
        return [OverrideRecord(*row) for row in rows]

    def switch(self) -> SwitchRecord | None:
        """The newest off or on."""
        row = self._database.execute(
            "SELECT at_wall_ns, off, why, who FROM switches ORDER BY id DESC LIMIT 1"
        ).fetchone()
        return None if row is None else SwitchRecord(row[0], bool(row[1]), row[2], row[3])

    def close(self) -> None:
        """Close the file; the WAL is folded in."""
        self._database.close()


def decisions_query(version: int = FORMAT) -> str:
    """Begins a query whose rows `decision_of` understands, over a journal of this format."""
    later = _SINCE_2 if version >= 2 else ", ".join("NULL" for _ in _SINCE_2.split(","))
    return f"SELECT {_FIRST}, {later}, confirmed_after_s FROM decisions"


def effects_query(version: int = FORMAT) -> str:
    """Begins a query whose rows are an EffectRecord's fields."""
    number = "number" if version >= 2 else "NULL"
    return (
        f"SELECT at_wall_ns, policy, rule, input, expected, before, after, met, reason, {number} FROM effects"
    )


def decision_of(row: tuple[Any, ...]) -> DecisionRecord:
    """The decision of a row of `decisions_query`."""
    head, ages, claims = (*row[:2], int(row[2], 16), *row[3:11]), row[12] or "{}", row[15] or "[]"
    loaded = (json.loads(row[11]), json.loads(ages), *row[13:15], tuple(json.loads(claims)), *row[16:])
    return DecisionRecord(*(*head, *loaded))


def rule_of(database: sqlite3.Connection, key: str) -> RuleRecord | None:
    """The rule's text of that key, from a journal of format 2 or later."""
    query = "SELECT key, at_wall_ns, policy, rule, described FROM rules WHERE key = ?"
    row = database.execute(query, (key,)).fetchone()
    return None if row is None else RuleRecord(row[0], row[1], row[2], row[3], json.loads(row[4]))


def _statement(record: Record) -> tuple[str, tuple[object, ...]]:
    match record:
        case DecisionRecord():
            return (
                "INSERT OR REPLACE INTO decisions VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    record.number,
                    record.at_wall_ns,
                    f"{record.engine_nonce:016x}",  # SQLite's integers are signed: too small.
                    record.policy,
                    record.rule,
                    record.knob,
                    record.scope,
                    record.before,
                    record.after,
                    record.verdict,
                    record.reason,
                    json.dumps({name: _plain(value) for name, value in record.inputs.items()}),
                    record.confirmed_after_s,
                    json.dumps(record.ages),
                    record.phase,
                    record.phase_s,
                    json.dumps(record.claims),
                    record.text,
                ),
            )
        case RuleRecord():
            return "INSERT OR IGNORE INTO rules VALUES (?,?,?,?,?)", (
                record.key,
                record.at_wall_ns,
                record.policy,
                record.rule,
                json.dumps(record.described),
            )
        case VerdictRecord():
            return (
                # What evaluation clamped stays so; the engine can only say whether that arrived.
                "UPDATE decisions SET confirmed_after_s = ?2, verdict = CASE"
                " WHEN verdict = 'clamped' AND ?1 = 'applied' THEN verdict ELSE ?1 END WHERE number = ?3"
            ), (
                record.verdict,
                record.after_s,
                record.number,
            )
        case EffectRecord():
            return "INSERT INTO effects VALUES (NULL,?,?,?,?,?,?,?,?,?,?)", (
                record.at_wall_ns,
                record.policy,
                record.rule,
                record.input,
                record.expected,
                record.before,
                record.after,
                record.met,
                record.reason,
                record.number,
            )
        case OverrideRecord():
            return "INSERT INTO overrides VALUES (NULL,?,?,?,?,?,?,?)", (
                record.at_wall_ns,
                record.knob,
                record.scope,
                record.value,
                record.until_wall_ns,
                record.why,
                record.who,
            )
        case SwitchRecord():
            return "INSERT INTO switches VALUES (NULL,?,?,?,?)", (
                record.at_wall_ns,
                record.off,
                record.why,
                record.who,
            )
        case EventRecord():
            return "INSERT INTO events VALUES (NULL,?,?,?)", (record.at_wall_ns, record.kind, record.detail)


def _plain(value: float | str) -> float | str:
    """JSON has no infinity."""
    return value if isinstance(value, str) or math.isfinite(value) else str(value)
