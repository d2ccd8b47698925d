"""Which start is shown, what the journal adds, and what people read: `kvpilot incident` without processes."""

import csv
import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from link_pages import IDENTITY
from recorded import GIB, Flown
from typer.testing import CliRunner

from kvpilot.clock import NS
from kvpilot.commands import app
from kvpilot.incident.case import open_kept
from kvpilot.incident.kept import kept_pages
from kvpilot.journal.past import read_past
from kvpilot.journal.records import DecisionRecord, EventRecord, OverrideRecord, SwitchRecord
from kvpilot.journal.store import JournalError, JournalStore
from kvpilot.link import locks
from kvpilot.link.place import LinkPlace

FIRST, SECOND = 0xAAAA_0000_0000_0001, 0xBBBB_0000_0000_0002


@pytest.fixture
def telemetry(tmp_path: Path) -> Path:
    (tmp_path / "t").mkdir(mode=0o750)
    return tmp_path / "t"


@pytest.fixture
def flown(telemetry: Path) -> Flown:
    """One start that vanished after forty seconds, with a knob that moved."""
    flown = Flown(nonce=FIRST).step(10, count=4000, decode_tokens_total=4).step(10, knob_max_running=8)
    flown.save(telemetry)
    return flown


def decision(number: int, at_wall_ns: int, nonce: int = FIRST, **change: object) -> DecisionRecord:
    values: dict[str, object] = {
        "policy": "itl-guard",
        "rule": "admit-fewer",
        "knob": "max_running",
        "scope": "all",
        "before": 32.0,
        "after": 8.0,
        "verdict": "applied",
        "reason": "when: itl_p95 > 40ms",
        "inputs": {"itl_p95": 0.05, "odd": float("inf"), "gone": "missing: too_old"},
    }
    return DecisionRecord(number, at_wall_ns, nonce, **(values | change))  # type: ignore[arg-type]


@pytest.fixture
def journal(tmp_path: Path, flown: Flown) -> Iterator[Path]:
    """Of the pilot that flew it, still open."""
    end_ns = flown.wall_ns()
    store = JournalStore(tmp_path / "journal.sqlite")
    store.write(
        [
            EventRecord(IDENTITY.start_wall_ns, "engine", f"{FIRST:016x} test 1, tiny, 0 leases adopted"),
            EventRecord(IDENTITY.start_wall_ns, "policies", "itl-guard (enforce)"),
            decision(1, end_ns - 3 * NS),
            decision(2, end_ns - 2 * NS, before=8.0, after=4.0),
            decision(3, end_ns - 2 * NS, nonce=SECOND, reason="of another start"),
            OverrideRecord(end_ns - NS, "max_running", "all", 6.0, end_ns + NS, "incident 42", "ada"),
            OverrideRecord(end_ns - 3600 * NS, "max_running", "all", 6.0, end_ns, "an hour before", "ada"),
            SwitchRecord(end_ns + NS, True, "calm down", "ada"),
            decision(4, end_ns + NS // 10, after=None, reason="the engine is gone"),
            decision(5, end_ns + NS // 10, after=None, knob="x", reason="the engine is gone"),
            EventRecord(end_ns + NS // 10, "engine", f"engine {FIRST:016x} is dead: it vanished"),
        ]
    )
    yield store.path
    store.close()


class Done(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def run(*arguments: object, environ: dict[str, str] | None = None) -> Done:
    """As a shell sees it: `sys.exit` with words is 1 and the words on stderr (which the runner mixes up)."""
    # The environment of whoever runs the tests says nothing about this engine.
    clean: dict[str, str | None] = {"KVPILOT_TELEMETRY": None, "KVPILOT_ENGINE": None, "COLUMNS": "100"}
    words = [str(word) for word in arguments]
    done = CliRunner().invoke(app, ["incident", *words], env=clean | (environ or {}))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    said = str(done.exception.code) if done.exit_code == 1 and done.exception else done.stderr
    return Done(done.exit_code, done.stdout, said)


def at(telemetry: Path) -> list[object]:
    return ["--telemetry", telemetry, "--engine", "tiny"]


def test_what_is_read_at_three_in_the_morning(telemetry: Path, journal: Path) -> None:
    """The verdict first, its reason under it; then the last minute with who moved what."""
    done = run("show", *at(telemetry), "--journal", journal)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "the engine vanished without a word; its last sign of life was at 22:14:00.010"
    assert lines[1].startswith("killed from outside (SIGKILL, the out-of-memory killer, loss of power)")
    text = " ".join(done.stdout.split())
    assert f"start {FIRST:016x} on engine-host (0123456789ab)" in text
    assert "lived 40.0 s until" in text
    assert "the pilot saw it gone at 22:14:00.110" in text
    assert "max_running 32 -> 8" in text
    assert "#1 itl-guard/admit-fewer: max_running 32 -> 8 applied: when: itl_p95 > 40ms" in text
    assert "ada orders max_running = 6: incident 42" in text
    assert "ada turns the pilot off: calm down" in text
    assert "2 decisions let go of an engine that is gone" in text
    assert "another start" not in text
    assert "an hour before" not in text
    assert max(map(len, lines)) <= 100


def test_decisions_stand_between_the_rows_of_their_time(telemetry: Path, journal: Path) -> None:
    """A line stands under the row in whose time it happened: what came of it is in the rows below."""
    lines = run("show", *at(telemetry), "--journal", journal).stdout.splitlines()
    order = (
        "   -3 s",
        "   -2 s",
        "#1 itl-guard",
        "#2 itl-guard",
        "   -1 s",
        "ada orders",
        "    end",
        "is dead",
    )
    places = [next(number for number, line in enumerate(lines) if word in line) for word in order]
    assert places == sorted(places)


def test_many_decisions_of_a_rule_in_a_row_are_one_line(
    telemetry: Path, flown: Flown, tmp_path: Path
) -> None:
    store = JournalStore(tmp_path / "other.sqlite")
    began_ns = flown.wall_ns() - 15 * NS
    store.write([decision(n, began_ns + n, before=float(n), after=n + 1.0) for n in range(1, 40)])
    store.close()
    text = " ".join(run("show", *at(telemetry), "--journal", tmp_path / "other.sqlite").stdout.split())
    assert "#1 to #39, 39 decisions itl-guard/admit-fewer: max_running 1 -> 40 applied" in text
    assert "#2 " not in text


def test_json_has_every_step_and_decision_with_units(telemetry: Path, journal: Path) -> None:
    done = run("show", *at(telemetry), "--journal", journal, "--json")
    told = json.loads(done.stdout)
    assert (told["how"], told["start"], told["alive"]) == ("vanished", f"{FIRST:016x}", False)
    names = [field["name"] for field in told["fields"]]
    assert {"name": "duration_ns", "unit": "ns", "meaning": "How long the step took."} in told["fields"]
    assert len(told["steps"]) == 4001
    last = dict(zip(names, told["steps"][-1], strict=True))
    assert (last["sequence"], last["steps_total"], last["knob.max_running"]) == (4001, 4001, 8)
    assert [row["number"] for row in told["decisions"]] == [1, 2, 4, 5]
    assert told["decisions"][0]["inputs"] == {"itl_p95": 0.05, "odd": "inf", "gone": "missing: too_old"}
    assert told["timeline"][-1]["steps"] > 0
    wall_ns = told["clock"]["start_wall_ns"] + last["time_ns"] - told["clock"]["start_monotonic_ns"]
    assert wall_ns == told["clock"]["start_wall_ns"] + 40_010 * NS // 1000


def test_csv_has_every_step(telemetry: Path, journal: Path, tmp_path: Path) -> None:
    assert run("show", *at(telemetry), "--csv", tmp_path / "steps.csv").exit_code == 0
    rows = list(csv.DictReader((tmp_path / "steps.csv").read_text().splitlines()))
    assert len(rows) == 4001
    assert rows[-1]["knob.max_running [requests]"] == "8.0"
    assert int(rows[-1]["wall_ns [ns]"]) == IDENTITY.start_wall_ns + 40_010 * NS // 1000


def test_a_copy_needs_no_directory_and_no_trust(flown: Flown, telemetry: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.kvp"
    shutil.copy(next(telemetry.glob("tiny-0/*")), copy)
    copy.chmod(0o666)
    done = run("show", copy)
    assert done.exit_code == 0
    assert "left no word in this page" in done.stdout
    assert "a copy cannot tell" in done.stdout
    assert "no journal: decisions are not shown" in " ".join(done.stdout.split())


def test_a_journal_that_cannot_be_used_is_a_note_and_no_failure(
    telemetry: Path, flown: Flown, tmp_path: Path
) -> None:
    (tmp_path / "bad.sqlite").write_bytes(b"not a database" * 100)
    for path, why in ((tmp_path / "bad.sqlite", "not a database"), (tmp_path / "none", "no such file")):
        done = run("show", *at(telemetry), "--journal", path)
        assert done.exit_code == 0
        text = " ".join(done.stdout.split())
        assert why in text
        assert "decisions are not shown" in text
    assert not (tmp_path / "none").exists(), "who looks makes no files"


def test_the_newest_that_ended_is_shown_and_any_other_by_its_number(telemetry: Path, flown: Flown) -> None:
    newer = Flown(nonce=SECOND).step(10, count=5)
    newer.end().save(telemetry)
    shift(telemetry, newer, 100 * NS)
    assert "closed in order" in run("show", *at(telemetry)).stdout.splitlines()[0]
    done = run("show", *at(telemetry), "--start", "aaaa")
    assert "vanished" in done.stdout.splitlines()[0]
    assert "the next start of this rank began at 2023-11-14 22:15:00" in " ".join(done.stdout.split())
    for start in ("cccc", ""):
        done = run("show", *at(telemetry), "--start", start)
        assert done.exit_code == 1
        assert "`kvpilot incident list` has them" in done.stderr


def shift(telemetry: Path, flown: Flown, by_ns: int) -> None:
    """The start began `by_ns` later by the clock on the wall."""
    from dataclasses import replace

    from kvpilot.link.page import HEADER_BYTES, PageHeader

    header = PageHeader.unpack(flown.buffer, "telemetry")
    identity = replace(header.identity, start_wall_ns=header.identity.start_wall_ns + by_ns)
    flown.buffer[:HEADER_BYTES] = replace(header, identity=identity).pack()
    flown.save(telemetry)


def test_an_engine_that_lives_is_shown_when_asked_for(
    telemetry: Path, flown: Flown, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = run("show", *at(telemetry), "--live")
    assert refused.exit_code == 1
    assert "no engine lives" in refused.stderr
    monkeypatch.setattr(locks, "is_locked", lambda _fd: True)
    refused = run("show", *at(telemetry))
    assert "no start has ended: --live shows the one that lives" in refused.stderr
    done = run("show", *at(telemetry), "--live")
    assert done.stdout.startswith("LIVE: the engine lives")
    assert "(gone)" not in done.stdout
    assert run("show", *at(telemetry), "--start", "aaaa").stdout.startswith("LIVE: ")


def test_the_list_has_every_page_kept_and_how_it_ended(telemetry: Path, flown: Flown) -> None:
    Flown(nonce=SECOND).step(10).end("exception", "torch.OutOfMemoryError\nw.py:run:7").save(telemetry)
    broken = Flown(nonce=3).save(telemetry)
    broken.write_bytes(b"kvpilot\0" + bytes(50))
    done = run("list", *at(telemetry))
    text = " ".join(done.stdout.split())
    assert f"{FIRST:016x} 2023-11-14 22:13:20 22:14:00.010 4001 test 1, tiny vanished without a word" in text
    assert "torch.OutOfMemoryError in run, w.py line 7" in text
    assert "0000000000000003" in text
    told = json.loads(run("list", *at(telemetry), "--json").stdout)
    endings = {page["nonce"]: page["ending"] and page["ending"]["what"] for page in told}
    assert endings == {
        f"{FIRST:016x}": None,
        f"{SECOND:016x}": ["torch.OutOfMemoryError", "w.py:run:7"],
        f"{3:016x}": None,
    }
    assert told[-1]["problem"].startswith("telemetry-0000000000000003.kvp: not a kvpilot telemetry page")


def test_pages_that_are_not_trusted_are_not_read(telemetry: Path, flown: Flown) -> None:
    path = next(telemetry.glob("tiny-0/*"))
    path.chmod(0o666)
    done = run("show", *at(telemetry))
    assert done.exit_code == 1
    assert "writable by others" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    place = LinkPlace(telemetry, telemetry, "tiny", frozenset({12345}))
    (telemetry / "tiny-0").chmod(0o750)
    with pytest.raises(Exception, match="which is not trusted"):
        open_kept(place, 0, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show"], "which engine?"),
        (["show", "--engine", "tiny"], "give both"),
        (["show", "--telemetry", "/nowhere", "--engine", "tiny"], "no engine has written here"),
        (["show", "--telemetry", "/nowhere", "--engine", "../tiny"], "engine name"),
        (["show", "-c", "/nowhere.yaml"], "No such file"),
        (["show", "/nowhere.kvp"], "No such file"),
        (["list"], "which engine?"),
        (["list", "--telemetry", "/nowhere", "--engine", "tiny"], "no engine has written here"),
    ],
)
def test_nothing_to_show_is_one_line_and_exit_1(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_environment_and_the_default_configuration_name_the_engine(
    telemetry: Path, flown: Flown, journal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"KVPILOT_TELEMETRY": str(telemetry), "KVPILOT_ENGINE": "tiny"}
    assert "vanished" in run("show", environ=environ).stdout
    config = {
        "engine": {"name": "tiny", "telemetry": "t", "controls": "c"},
        "classes": [{"name": "default", "ttft": 1, "itl": 1}],
        "journal": "journal.sqlite",
    }
    Path("kvpilot.yaml").write_text(json.dumps(config))
    assert "ada orders" in run("show").stdout, "the configuration knows the journal too"
    assert "no engine has written here" in run("show", "--rank", "1").stderr


def test_an_open_journal_is_read_without_touching_it(journal: Path) -> None:
    """Its writer is in the middle of a batch: what is committed is seen, nothing waits."""
    writer = sqlite3.connect(journal, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("DELETE FROM decisions")
    past = read_past(journal, FIRST, 0, 2**62)
    assert [row.number for row in past.decisions] == [1, 2, 4, 5]
    assert len(past.events) == 2
    writer.execute("ROLLBACK")
    writer.close()


def test_a_journal_of_another_format_is_refused(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "new.sqlite")
    database.execute("PRAGMA user_version=9")
    database.close()
    with pytest.raises(JournalError, match="format 9"):
        read_past(tmp_path / "new.sqlite", FIRST, 0, 1)


def test_a_kept_page_knows_its_device_memory(telemetry: Path, flown: Flown) -> None:
    (page,) = kept_pages(telemetry / "tiny-0", frozenset({0, telemetry.stat().st_uid}))
    assert (page.steps, page.alive, page.ending) == (4001, False, None)
    assert flown.values["device_free_bytes"] == 2 * GIB
