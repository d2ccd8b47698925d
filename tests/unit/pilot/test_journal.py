"""The journal: rows survive, orders survive a restart, and no disk can hold up or stop the pilot."""

import logging
import sqlite3
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from kvpilot.journal.past import read_past
from kvpilot.journal.records import (
    DecisionRecord,
    EffectRecord,
    EventRecord,
    OverrideRecord,
    RuleRecord,
    SwitchRecord,
    VerdictRecord,
    format_scope,
    parse_scope,
)
from kvpilot.journal.store import JournalError, JournalStore
from kvpilot.journal.writer import JournalWriter

NONCE = 2**64 - 1


def decision(number: int, verdict: str = "unconfirmed") -> DecisionRecord:
    inputs = {"x": 1.5, "y": "missing: too_old", "tte": float("inf")}
    return DecisionRecord(
        number, 10**18, NONCE, "p", "r", "max_running", "all", 8.0, None, verdict, "why", inputs
    )


def override(value: float | None, until_wall_ns: int, scope: str = "all") -> OverrideRecord:
    return OverrideRecord(0, "shed_fraction", scope, value, until_wall_ns, "load test", "kim")


@pytest.fixture
def store(tmp_path: Path) -> JournalStore:
    return JournalStore(tmp_path / "journal.sqlite")


def test_a_decision_comes_back_as_it_was_written_infinity_as_text(store: JournalStore) -> None:
    store.write([decision(7)])
    (row,) = store.decisions(last=5)
    assert row.inputs == {"x": 1.5, "y": "missing: too_old", "tte": "inf"}
    assert (row.number, row.engine_nonce, row.after) == (7, NONCE, None)
    assert store.decision(7) == row
    assert store.decision(8) is None
    assert store.last_number() == 7


def test_the_engines_answer_updates_the_decision(store: JournalStore) -> None:
    store.write([decision(1), decision(2, "clamped"), decision(3, "clamped")])
    store.write([VerdictRecord(1, "applied", 0.1), VerdictRecord(2, "applied", 0.1)])
    store.write([VerdictRecord(3, "rejected_by_engine", 1.0)])
    assert [row.verdict for row in store.decisions(5)] == ["rejected_by_engine", "clamped", "applied"]


def test_orders_in_force_are_the_newest_for_each_knob_and_scope(store: JournalStore) -> None:
    store.write([override(0.2, 100), override(0.3, 200), override(0.5, 50, "classAtMost=0")])
    store.write([override(0.9, 300, "tenant=a"), override(None, 0, "tenant=a")])
    assert [row.value for row in store.overrides_in_force(now_wall_ns=40)] == [0.3, 0.5]
    assert [row.value for row in store.overrides_in_force(now_wall_ns=60)] == [0.3]
    assert store.overrides_in_force(now_wall_ns=200) == []


def test_the_newest_switch_counts(store: JournalStore) -> None:
    assert store.switch() is None
    store.write([SwitchRecord(1, True, "a", "kim"), SwitchRecord(2, False, "b", "lee")])
    assert store.switch() == SwitchRecord(2, False, "b", "lee")


def test_a_batch_is_in_whole_or_not_at_all(store: JournalStore) -> None:
    with pytest.raises(OverflowError):
        store.write([decision(1), DecisionRecord(2, 2**70, 0, "", "", "", "", None, None, "", "", {})])
    assert store.last_number() == 0
    store.write([decision(1)])
    assert store.last_number() == 1


def test_retention_keeps_the_newest(store: JournalStore) -> None:
    store.write([*(decision(n) for n in range(1, 101)), *(EventRecord(n, "k", "d") for n in range(100))])
    store.prune(keep_rows=10)
    assert [row.number for row in store.decisions(1000)] == list(range(100, 90, -1))


def test_it_can_be_read_by_others_while_it_is_open(store: JournalStore) -> None:
    store.write([EffectRecord(1, "p", "r", "x", "falls 10%", 2.0, 1.0, True, "measured")])
    other = sqlite3.connect(f"file:{store.path}?mode=ro", uri=True)
    assert other.execute("SELECT before, after, met FROM effects").fetchall() == [(2.0, 1.0, 1)]
    assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()
    assert store.effects(1) == [EffectRecord(1, "p", "r", "x", "falls 10%", 2.0, 1.0, 1, "measured")]


@pytest.mark.parametrize("content", [b"not a database" * 100, None], ids=["not a database", "a directory"])
def test_a_file_that_is_no_journal_is_one_clear_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "journal.sqlite"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(JournalError) as caught:
        JournalStore(path)
    assert str(caught.value).startswith(f"journal {path}: ")
    assert "\n" not in str(caught.value)


FIRST_FORMAT = """
CREATE TABLE decisions (
    number INTEGER PRIMARY KEY, at_wall_ns INTEGER, engine_nonce TEXT, policy TEXT, rule TEXT, knob TEXT,
    scope TEXT, before REAL, after REAL, verdict TEXT, reason TEXT, inputs TEXT, confirmed_after_s REAL);
CREATE TABLE effects (
    id INTEGER PRIMARY KEY, at_wall_ns INTEGER, policy TEXT, rule TEXT, input TEXT, expected TEXT, before
    REAL, after REAL, met INTEGER, reason TEXT);
CREATE TABLE overrides (
    id INTEGER PRIMARY KEY, at_wall_ns INTEGER, knob TEXT, scope TEXT, value REAL, until_wall_ns INTEGER, why
    TEXT, who TEXT);
CREATE TABLE switches (id INTEGER PRIMARY KEY, at_wall_ns INTEGER, off INTEGER, why TEXT, who TEXT);
CREATE TABLE events (id INTEGER PRIMARY KEY, at_wall_ns INTEGER, kind TEXT, detail TEXT);
INSERT INTO decisions VALUES (7, 1, '00000000000000ff', 'p', 'r', 'max_running', 'all', 8.0, 4.0, 'applied',
    'why', '{"x": 1.5}', 0.25);
INSERT INTO effects VALUES (NULL, 1, 'p', 'r', 'x', 'falls 10%', 2.0, 1.0, 1, 'measured');
PRAGMA user_version=1;
"""


def test_a_journal_of_the_first_format_is_read_and_brought_to_this_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    old = sqlite3.connect(path)
    old.executescript(FIRST_FORMAT)
    old.close()
    assert read_past(path, 255, 0, 1).decisions[0].reason == "why", "as it is, by whoever only reads"
    store = JournalStore(path)
    (row,) = store.decisions(5)
    assert (row.number, row.inputs, row.ages, row.phase, row.claims) == (7, {"x": 1.5}, {}, None, ())
    assert row.confirmed_after_s == 0.25
    assert store.effects(1)[0].number is None
    claims = ({"rule": "p/r", "scope": "all", "value": 4.0, "by": None},)
    store.write([replace(decision(8), ages={"x": 0.1}, phase="active", phase_s=2.0, claims=claims, text="k")])
    store.close()
    again = JournalStore(path)
    assert again.decision(8) == replace(
        decision(8),
        inputs={"x": 1.5, "y": "missing: too_old", "tte": "inf"},
        ages={"x": 0.1}, phase="active", phase_s=2.0, claims=claims, text="k",
    )  # fmt: skip
    assert read_past(path, 255, 0, 1).decisions == (row,)


def test_a_rules_text_is_kept_once(store: JournalStore) -> None:
    first = RuleRecord("k", 1, "p", "r", {"when": "x > 1"})
    store.write([first, RuleRecord("k", 2, "p", "r", {"when": "x > 1"}), RuleRecord("l", 3, "p", "r", {})])
    assert store.rule("k") == first
    assert store.rule("m") is None


def test_another_format_is_refused(store: JournalStore) -> None:
    store.close()
    other = sqlite3.connect(store.path)
    other.execute("PRAGMA user_version=99")
    other.close()
    with pytest.raises(JournalError, match="format 99, this kvpilot knows 2"):
        JournalStore(store.path)


@pytest.mark.parametrize("text", ["all", "classAtMost=3", "tenant=acme"])
def test_scopes_are_written_as_people_write_them(text: str) -> None:
    assert format_scope(parse_scope(text)) == text


@pytest.mark.parametrize("text", ["", "all=1", "classAtMost=", "classAtMost=-1", "tenant=", "everyone"])
def test_other_scopes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a scope"):
        parse_scope(text)


def test_the_writer_writes_what_was_added_before_it_closes(store: JournalStore) -> None:
    writer = JournalWriter(store)
    writer.start()
    for number in range(1, 2001):
        writer.add(decision(number))
    writer.close()
    assert JournalStore(store.path).last_number() == 2000
    assert writer.lost == 0


def test_a_full_disk_costs_rows_and_one_warning_and_writing_goes_on_when_there_is_room(
    store: JournalStore, caplog: pytest.LogCaptureFixture
) -> None:
    pages = store._database.execute("PRAGMA page_count").fetchone()[0]
    store._database.execute(f"PRAGMA max_page_count={pages + 1}")
    writer = JournalWriter(store)
    written = threading.Event()
    for number in range(1, 1201):
        writer._attempt(partial(store.write, [decision(number)]), 1)
    assert 0 < store.last_number() == 1200 - writer.lost < 200
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "is full" in caplog.text
    store._database.execute("PRAGMA max_page_count=1000000")
    writer.start()
    writer.add(decision(5000))
    writer._queue.put(written.set)
    assert written.wait(10)
    assert store.last_number() == 5000
    assert "written again" in caplog.text
    writer.close()


def test_a_stuck_disk_never_holds_up_whoever_adds(store: JournalStore) -> None:
    writer = JournalWriter(store, queue_rows=10)
    release, stuck = threading.Event(), threading.Event()

    def stick() -> None:
        stuck.set()
        release.wait(10)

    writer._queue.put(stick)
    writer.start()
    assert stuck.wait(10)
    for number in range(1, 101):
        writer.add(decision(number))
    assert writer.lost == 90
    release.set()
    writer.close()
    assert JournalStore(store.path).last_number() == 10
