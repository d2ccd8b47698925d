"""`kvpilot explain`: from the journal alone, whatever the policy files say by now."""

import json
import re
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from pilot_world import World, policy
from typer.testing import CliRunner

from kvpilot.clock import NS
from kvpilot.commands import app
from kvpilot.explain.inquiry import Explained, inquire, now
from kvpilot.explain.terminal import lines
from kvpilot.journal.records import DecisionRecord, EffectRecord, RuleRecord
from kvpilot.journal.store import JournalStore
from kvpilot.link.controls import Scope
from kvpilot.publish.status import status

GUARD = policy(
    when="x > 2000 * slo.itl",
    do="{knob: prefill_chunk_tokens, multiply: 0.5, min: 64}",
    rule="verify: {input: x, falls: 10%, within: 1s}\n      cooldown: 2s",
    spec="annotations: {}",
).replace("  annotations: {}\n", "")
GUARD = GUARD.replace(
    "metadata: {name: guard}", "metadata: {name: guard, annotations: {runbook_url: https://run.book}}"
)
RIVAL = policy("rival", when="x > 200", do="{knob: prefill_chunk_tokens, set: 256}", spec="priority: 200")


@pytest.fixture
def world() -> World:
    return World(GUARD, RIVAL)


def journal(world: World, folder: Path) -> Path:
    """The world's rows as a pilot would have left them."""
    store = JournalStore(folder / "journal.sqlite")
    store.write(world.rows)
    store.close()
    return store.path


def explain(path: Path, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["explain", "--journal", str(path), *arguments])
    return done.exit_code, done.output


def text(found: Explained, world: World) -> str:
    return "\n".join(lines(found, world.clock.wall_ns()))


def test_a_change_with_its_grounds_and_its_effect(world: World, tmp_path: Path) -> None:
    world.start_engine()
    world.ticks(0.5, waiting=0)
    world.ticks(0.3, waiting=150)
    world.ticks(1.5, waiting=101)
    path = journal(world, tmp_path)
    (found,) = inquire(path, 1, 1)
    assert text(found, world).splitlines() == [
        "#1  2023-11-14 22:30:00.500 UTC, 1.8 s ago  guard/act",
        "  prefill_chunk_tokens 512 -> 256: applied, in force 0.1 s later",
        "  because   when: x > 2000 * slo.itl",
        "            150 > 2000 * 0.05",
        "  rule      active for 0 s; enforce, priority 100; policy.yaml",
        "            do prefill_chunk_tokens multiply 0.5, at least 64; cooldown 2s, lease 15s",
        "  inputs    x = 150, 0 s old: last of requests_waiting, 2s old at most",
        "            slo.itl = 0.05",
        "  claims    guard/act 256 holds",
        "  expected  x falls 10% within 1s: 150 -> 101, came (measured)",
        "  runbook   https://run.book",
    ]


def test_a_step_of_two_knobs_has_one_effect_that_both_decisions_show(world: World, tmp_path: Path) -> None:
    world.use(GUARD.replace("min: 64}", "min: 64}, {knob: speculative_tokens, set: 2}"))
    world.start_engine()
    world.ticks(0.5, waiting=0)
    world.ticks(0.3, waiting=150)
    world.ticks(1.5, waiting=101)
    path = journal(world, tmp_path)
    for number, knob in ((1, "prefill_chunk_tokens"), (2, "speculative_tokens")):
        (found,) = inquire(path, number, 1)
        assert found.decision.knob == knob
        assert [(effect.before, effect.after) for effect in found.effects] == [(150, 101)]
    assert len(world.of(EffectRecord)) == 1


def test_a_class_in_quotes_is_shown_with_its_value(world: World, tmp_path: Path) -> None:
    decision = DecisionRecord(
        1, 0, 1, "p", "r", "k", "all", 1.0, 2.0, "applied", 'when: x > slo["a-b"].itl', {"x": 3.0}
    )
    store = JournalStore(tmp_path / "journal.sqlite")
    store.write(
        [RuleRecord("key", 0, "p", "r", {"slo": {"slo.a-b.itl": 0.5}}), replace(decision, text="key")]
    )
    store.close()
    (found,) = inquire(store.path, 1, 1)
    assert found.with_values == "3 > 0.5"


def test_who_was_overruled_by_whom(world: World, tmp_path: Path) -> None:
    world.use(GUARD, RIVAL.replace("set: 256", "set: 384"))
    world.start_engine()
    world.ticks(0.2, waiting=201)
    shown = text(inquire(journal(world, tmp_path), 1, 1)[0], world)
    assert "prefill_chunk_tokens 512 -> 256: overruled: another claim holds the knob" in shown
    assert "when: x > 2000 * slo.itl; by rival/act" in shown
    assert "  claims    guard/act 256 overruled by rival/act\n            rival/act 384 holds" in shown


def test_a_missing_input_says_since_when_nobody_saw_it(world: World, tmp_path: Path) -> None:
    world.start_engine()
    world.ticks(0.3, waiting=150)
    for _ in range(40):
        world.only_tick()
    newest = inquire(journal(world, tmp_path), None, 1)[0]
    shown = text(newest, world)
    assert "-> baseline: missing input: it cannot see" in shown
    assert re.search(r"inputs    x missing: too_old, 2\.\d s old", shown)


def test_an_order_names_who_gave_it_and_why(world: World, tmp_path: Path) -> None:
    world.start_engine()
    world.tick()
    world.pilot.orders.override("prefill_chunk_tokens", Scope("all"), 1024, 60.0, "incident 42", "kim", None)
    world.ticks(0.2)
    shown = text(inquire(journal(world, tmp_path), None, 1)[0], world)
    assert "override/kim" in shown
    assert "because   kim ordered it: incident 42" in shown
    assert "claims    override/kim 1024 holds" in shown


def test_an_order_is_no_rule_that_could_be_gone(world: World) -> None:
    world.start_engine()
    world.pilot.orders.override("prefill_chunk_tokens", Scope("all"), 256, 60.0, "incident 42", "kim", None)
    world.ticks(0.2)
    decided = world.pilot.ledger.recent[0]
    flight = type("Flight", (), {"pilot": world.pilot, "engine_name": "lab", "rank": 0})()
    found = Explained(decided, now=now(Explained(decided), status(flight)))
    assert "  now       prefill_chunk_tokens held at 256 by override/kim" in text(found, world).splitlines()


def test_a_later_step_in_shadow_shows_its_condition_alone(world: World, tmp_path: Path) -> None:
    world.use(GUARD.replace("spec:", "spec:\n  mode: shadow"))
    world.start_engine()
    world.ticks(3.0, waiting=150)
    (found,) = inquire(journal(world, tmp_path), None, 1)
    assert found.decision.reason == "when: x > 2000 * slo.itl (open_loop)"
    assert found.with_values == "150 > 2000 * 0.05"


def test_the_text_of_then_whatever_the_policy_says_now(world: World, tmp_path: Path) -> None:
    world.start_engine()
    world.ticks(0.2, waiting=150)
    world.use(GUARD.replace("2000", "3000"))
    world.ticks(0.2, waiting=0)
    first = inquire(journal(world, tmp_path), 1, 1)[0]
    assert first.rule is not None
    assert first.rule["when"] == "x > 2000 * slo.itl"


def test_what_it_is_now(world: World) -> None:
    world.start_engine()
    world.ticks(0.3, waiting=150)
    decided = world.pilot.ledger.recent[0]
    flight = type("Flight", (), {"pilot": world.pilot, "engine_name": "lab", "rank": 0})()
    found = now(Explained(decided), status(flight))
    assert (found.state, found.holder, found.value) == ("active", "guard/act", 256)
    world.use()
    world.ticks(0.2)
    gone = now(Explained(decided), status(flight))
    assert (gone.state, gone.holder) == (None, None)
    shown = "\n".join(lines(Explained(decided, now=gone), world.clock.wall_ns()))
    assert "now       the rule is gone; prefill_chunk_tokens at baseline" in shown


def test_the_command(world: World, tmp_path: Path) -> None:
    world.start_engine()
    for _ in range(12):
        world.ticks(0.2, waiting=150)
        world.ticks(0.2, waiting=0)
    path = journal(world, tmp_path)
    code, output = explain(path, "--last", "3")
    assert code == 0
    assert output.startswith("No pilot answers: this is what the journal says.\n")
    assert len(re.findall(r"^#\d+ ", output, re.MULTILINE)) == 3
    code, output = explain(path, "#2")
    assert (code, re.findall(r"^#(\d+) ", output, re.MULTILINE)) == (0, ["2"])
    told = json.loads(explain(path, "2", "--json")[1])
    assert told["pilot"] is False
    (one,) = told["decisions"]
    assert (one["number"], one["rule"]["priority"], one["claims"]) == (2, 100, [])
    for wrong, says in (
        ("9999", f"journal {path}: no decision 9999; it has 1 to "),
        ("x", "'x': a decision is a number, such as 412"),
    ):
        code, output = explain(path, wrong)
        assert code == 1
        assert says in output
    code, output = explain(path, "2", "--last", "3")
    assert (code, output) == (1, "kvpilot: give the number of a decision or --last, not both\n")
    code, output = explain(tmp_path / "none.sqlite")
    assert (code, output) == (1, f"kvpilot: journal {tmp_path / 'none.sqlite'}: no such file\n")


def test_an_empty_journal_says_so(tmp_path: Path) -> None:
    JournalStore(tmp_path / "journal.sqlite").close()
    code, output = explain(tmp_path / "journal.sqlite")
    assert (code, output.splitlines()[-1]) == (0, "no decisions yet")


def test_without_a_configuration_it_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVPILOT_TELEMETRY", raising=False)
    done = CliRunner().invoke(app, ["explain"])
    says = "kvpilot: there is no kvpilot.yaml here: name it with --config, or a journal with --journal\n"
    assert (done.exit_code, done.output) == (1, says)


def test_a_journal_of_the_first_format_explains_what_it_can(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    old = sqlite3.connect(path)
    old.executescript(
        "CREATE TABLE decisions (number INTEGER PRIMARY KEY, at_wall_ns INTEGER, engine_nonce TEXT,"
        " policy TEXT, rule TEXT, knob TEXT, scope TEXT, before REAL, after REAL, verdict TEXT, reason TEXT,"
        " inputs TEXT, confirmed_after_s REAL);"
        f"INSERT INTO decisions VALUES (3, {NS}, '01', 'p', 'r', 'k', 'classAtMost=0', 8, 4, 'applied',"
        " 'when: x > 1e-3', '{\"x\": \"inf\"}', 0.25); PRAGMA user_version=1;"
    )
    old.close()
    code, output = explain(path)
    assert code == 0
    assert "k classAtMost=0 8 -> 4: applied, in force 0.25 s later\n  because   when: x > 1e-3\n" in output
    assert "(inf) > 1e-3" in output
