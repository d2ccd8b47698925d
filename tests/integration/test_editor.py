"""Editors complete and correct policies: the real yaml-language-server, from the modeline alone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from language_server import LanguageServer, installed

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "policies"
EVERY_CLAUSE = ROOT / "tests/unit/policy/every_clause.yaml"
MODELINE = "# yaml-language-server: $schema=policy.schema.json\n"

pytestmark = [pytest.mark.needs_program("node"), pytest.mark.needs_program("npm")]

POLICY = (
    MODELINE
    + """\
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: guard}
spec:
  inputs:
    itl: {signal: itl_seconds, agg: p95, window: 5s}
    kv:
      signal: kv_occupancy
  rules:
    - name: back-off
      when: itl > slo.itl
      do:
        - knob: prefill_chunk_tokens
          multiply: 0.5
"""
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanguageServer]:
    folder = tmp_path_factory.mktemp("editor")
    for name in ("policy.schema.json", "policy-tests.schema.json"):
        shutil.copyfile(SHIPPED / name, folder / name)
    running = LanguageServer(installed(), folder)
    yield running
    running.close()


def said(diagnostics: list[dict[str, Any]]) -> list[str]:
    """line:column: message, 1-based."""
    places = [(each["range"]["start"], each["message"]) for each in diagnostics]
    return [f"{at['line'] + 1}:{at['character'] + 1}: {message}" for at, message in places]


def place(text: str, word: str) -> tuple[int, int]:
    """Where `word` begins, 1-based."""
    before = text[: text.index(word)]
    return before.count("\n") + 1, len(before) - before.rfind("\n")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_policy_brings_its_modeline_and_has_no_mistakes(server: LanguageServer, path: Path) -> None:
    text = path.read_text()
    assert text.startswith(MODELINE)
    assert said(server.open(path.name, text)) == []
    wrong = said(server.open(f"wrong-{path.name}", text.replace("\n  rules:", "\n  rulse:", 1)))
    assert any("Property rulse is not allowed." in mistake for mistake in wrong)


def test_what_kvpilot_takes_the_editor_takes(server: LanguageServer) -> None:
    assert said(server.open(EVERY_CLAUSE.name, MODELINE + EVERY_CLAUSE.read_text())) == []


@pytest.mark.parametrize("mode", ["off", "shadow", "enforce"])
def test_off_is_a_word(server: LanguageServer, mode: str) -> None:
    """As YAML 1.2 has it, and not false."""
    text = POLICY.replace("spec:\n", f"spec:\n  mode: {mode}\n")
    assert said(server.open(f"mode-{mode}.yaml", text)) == []


def test_a_series_of_one_number_needs_no_quotes(server: LanguageServer) -> None:
    case = "tests:\n  - {name: t, series: {kv: 0.1}, knobs: {max_running: 8}, expect: [{at: 1s}]}\n"
    assert said(server.open("number.yaml", POLICY + case)) == []
    wrong = POLICY + case.replace("max_running", "max_runing")
    (mistake,) = said(server.open("knob.yaml", wrong))
    assert mistake.startswith("{}:{}: Value is not accepted.".format(*place(wrong, "max_runing")))


def test_a_file_of_tests_has_its_own_schema(server: LanguageServer) -> None:
    tests = EVERY_CLAUSE.read_text().partition("tests:\n")[2]
    modeline = "# yaml-language-server: $schema=policy-tests.schema.json\n"
    assert said(server.open("a.test.yaml", f"{modeline}tests:\n{tests}")) == []
    wrong = f"{modeline}tests:\n{tests.replace('state: active', 'state: activ', 1)}"
    (mistake,) = said(server.open("b.test.yaml", wrong))
    assert mistake.startswith("{}:{}: Value is not accepted.".format(*place(wrong, "activ,")))


@pytest.mark.parametrize(
    ("old", "new", "at", "says"),
    [
        ("when: itl", "wen: itl", "wen", "Property wen is not allowed."),
        ("kv_occupancy", "kv_ocupancy", "kv_ocupancy", "Value is not accepted. Valid values:"),
        ("agg: p95", "agg: last", "last", 'Value is not accepted. Valid values: "p50", "p90"'),
        ("window: 5s", "window: 5", "5}", 'Incorrect type. Expected "string".'),
        ("window: 5s", "window: 5sec", "5sec", "String does not match the pattern"),
        ("multiply: 0.5", "multiply: half", "half", "Incorrect type. Expected"),
        ("  inputs", "  priority: high\n  inputs", "high", 'Incorrect type. Expected "integer".'),
        ("kind: Policy\n", "", "apiVersion", 'Missing property "kind".'),
    ],
)
def test_mistakes_are_marked_where_they_are(
    server: LanguageServer, old: str, new: str, at: str, says: str
) -> None:
    text = POLICY.replace(old, new, 1)
    name = f"mistake-{at.strip('}')}-{len(new)}.yaml"
    found = said(server.open(name, text))
    line, column = place(text, at)
    assert any(each.startswith(f"{line}:{column}: {says}") for each in found), found


def test_it_offers_signals_knobs_aggregations_and_keys_and_says_what_they_mean(
    server: LanguageServer,
) -> None:
    text = POLICY.replace("kv_occupancy", "").replace("prefill_chunk_tokens", "").replace("agg: p95", "agg: ")
    server.open("complete.yaml", text)
    line, _ = place(text, "signal: \n")
    signals = server.completions("complete.yaml", line, len("      signal: ") + 1)
    assert {"kv_occupancy", "itl_seconds", "forecast.kv_exhaustion_seconds"} <= set(signals)
    meaning = signals["kv_occupancy"]["documentation"]
    assert "Referenced KV blocks over all KV blocks. A gauge in ratio: use last, mean" in str(meaning)
    line, _ = place(text, "knob: \n")
    knobs = server.completions("complete.yaml", line, len("        - knob: ") + 1)
    assert {"prefill_chunk_tokens", "shed_fraction"} <= set(knobs)
    assert "1 to 1048576 tokens; lower is safer" in str(knobs["prefill_chunk_tokens"]["documentation"])


def test_it_offers_the_keys_of_a_rule_with_what_they_do(server: LanguageServer) -> None:
    text = POLICY.replace("      do:\n", "      \n      do:\n")
    server.open("keys.yaml", text)
    keys = server.completions("keys.yaml", place(text, "      \n")[0], 7)
    assert {"until", "for", "keepFor", "cooldown", "lease", "recover", "verify", "notify"} <= set(keys)
    assert "when" not in keys, "it is there already"
    assert keys["lease"]["insertText"] == "lease: "
    assert "How long the engine keeps a value unrenewed." in str(keys["lease"]["documentation"])


def test_it_explains_what_the_pointer_is_over(server: LanguageServer) -> None:
    server.open("hover.yaml", POLICY)
    line, column = place(POLICY, "multiply")
    assert "Step the rule's claim by this factor." in server.hover("hover.yaml", line, column + 1)
