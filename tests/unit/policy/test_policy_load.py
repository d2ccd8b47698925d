# ruff: noqa: E501 - tables of one error a line
"""Loading: every error of every file at once, each at its place, and never a traceback."""

from pathlib import Path

import pytest

from kvpilot.link.controls import Scope
from kvpilot.policy.checking import check
from kvpilot.policy.load import PolicyErrors, load_policies, load_text
from kvpilot.policy.rules import Policy
from kvpilot.policy.schema import json_schema

SHIPPED = Path(__file__).parents[3] / "policies"

GOOD = """\
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: guard}
spec:
  inputs:
    itl: {signal: itl_seconds, agg: p95, window: 5s}
    kv: {signal: kv_occupancy}
  rules:
    - name: back-off
      when: itl > slo.itl
      until: itl < 0.75 * slo.itl
      do:
        - {knob: prefill_chunk_tokens, multiply: 50%, min: 64}
      recover:
        - {knob: prefill_chunk_tokens, add: 64, every: 1s}
    - name: shed
      when: kv > 0.9
      do:
        - {knob: shed_fraction, set: 0.5, scope: {classAtMost: 0}}
tests:
  - name: nothing happens
    series: {itl: "0.01x9", kv: 0.1}
    slo: {itl: 0.05}
    expect:
      - {at: 500ms, rule: shed, state: inactive}
"""


def errors(text: str, classes: list[str] | None = None) -> list[str]:
    with pytest.raises(PolicyErrors) as caught:
        load_text(text, "p.yaml", classes)
    return [str(problem) for problem in caught.value.problems]


def problems(paths: list[Path]) -> list[str]:
    return list(check(paths).problems)


def changed(old: str, new: str) -> list[str]:
    assert old in GOOD
    return errors(GOOD.replace(old, new, 1))


def test_a_policy() -> None:
    policy = load_text(GOOD)
    assert isinstance(policy, Policy)
    back_off, shed = policy.rules
    assert policy.inputs["itl"].window_s == 5
    assert (policy.mode, policy.priority, policy.on_missing) == ("enforce", 100, "release")
    assert back_off.actions[0].amount == 0.5
    assert back_off.cooldown_ns == 1_000_000_000, "a rule that steps never compounds every tick"
    assert (shed.cooldown_ns, shed.lease_ns) == (0, 15_000_000_000)
    assert shed.actions[0].scope == Scope("class_at_most", 0)


def test_identity_is_the_text_and_the_inputs_it_names() -> None:
    rule = load_text(GOOD).rules[0]
    assert load_text(GOOD.replace("kv > 0.9", "kv > 0.8")).rules[0].identity == rule.identity
    assert load_text(GOOD.replace("  # x", "")).rules[0].identity == rule.identity
    assert load_text(GOOD.replace("min: 64", "min: 128")).rules[0].identity != rule.identity
    assert load_text(GOOD.replace("window: 5s", "window: 6s")).rules[0].identity != rule.identity


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("itl > slo.itl", "itl_p96 > slo.itl", "p.yaml:10:13: when: undeclared reference to 'itl_p96' (did you mean 'itl'?)"),
        ("itl > slo.itl", "itk > slo.itl", "p.yaml:10:13: when: undeclared reference to 'itk' (did you mean 'itl'?)"),
        ("kv > 0.9", "kv > 80", "p.yaml:17:18: when: threshold 80 is outside the plausible range of kv_occupancy (0 to 1 ratio); write 0.8 for 80 percent"),
        ("itl_seconds", "itl_second", "p.yaml:6:19: signal: unknown signal 'itl_second' (did you mean 'itl_seconds'?)"),
        ("agg: p95", "agg: last", "p.yaml:6:37: agg 'last' does not fit itl_seconds, a distribution: use p50, p90, p95, p99, mean"),
        (", window: 5s", "", "p.yaml:6:5: agg p95 needs a window, such as `window: 5s`"),
        ("{signal: kv_occupancy}", "{signal: kv_occupancy, window: 5s}", "p.yaml:7:32: agg last is the newest sample: it takes no window"),
        ("{signal: kv_occupancy}", "{signal: kv_occupancy, class: chat}", "p.yaml:7:39: class: kv_occupancy is not measured per class"),
        ("window: 5s", "window: 5", "p.yaml:6:50: spec.inputs.itl.window: 5 is not a duration: write 250ms, 5s or 2m"),
        ("when: kv", "wen: kv", "p.yaml:17:7: unknown key 'wen' (did you mean 'when'?)"),
        ("when: kv > 0.9", "choose: {}", "p.yaml:17:7: 'candidates' is missing"),
        ("when: kv > 0.9", "until: kv < 0.5", "p.yaml:16:7: rule 'shed' needs `when`, or `choose`"),
        ("multiply: 50%", "solve: {}", "p.yaml:13:40: solve: prefill_chunk_tokens is solved for stepTime; has neither"),
        ("multiply: 50%", "solve: {ttft: 2s, class: lowest}", "p.yaml:13:40: solve: prefill_chunk_tokens is solved for stepTime; has ttft"),
        ("multiply: 50%", "solve: {stepTime: 40ms, class: lowest}", "p.yaml:13:64: class: only with `ttft`: a step is no class's"),
        ("multiply: 50%", "solve: {stepTime: 0.8 * slo.ilt}", "p.yaml:13:64: stepTime: undeclared reference to 'slo.ilt' (did you mean 'slo.itl'?)"),
        ("multiply: 50%", "solve: {stepTime: 0}", "p.yaml:13:58: stepTime: must be above 0"),
        ("set: 0.5", "solve: {ttft: 2s, class: lowest}", "p.yaml:19:33: solve: no model gives shed_fraction: only prefill_chunk_tokens and admission_credits"),
        ("knob: shed_fraction, set: 0.5", "knob: admission_credits, solve: {ttft: 2s}", "p.yaml:19:37: solve: ttft needs a `class`, such as `class: lowest`"),
        ("{classAtMost: 0}", "{classAtMost: 0, tenant: top}", "p.yaml:19:43: scope: needs exactly one of classAtMost, tenant"),
        ("{classAtMost: 0}", "{}", "p.yaml:19:43: scope: needs exactly one of classAtMost, tenant"),
        ("set: 0.5,", "set: 0.5, lease: 5s,", "p.yaml:19:43: unknown key 'lease': it belongs to a rule"),
        ("min: 64", "min: 9, max: 8", "p.yaml:13:60: min 9 is above max 8"),
        ("multiply: 50%", "multiply: 50%, add: 3", "p.yaml:13:11: needs exactly one of set, add, multiply, solve; has add and multiply"),
        ("multiply: 50%", "multiply: 1", "p.yaml:13:50: multiply: must be above 0 and not 1, not 1"),
        ("knob: prefill_chunk_tokens, m", "knob: prefill_chunk, m", "p.yaml:13:18: knob: unknown knob 'prefill_chunk' (did you mean 'prefill_chunk_tokens'?)"),
        ("min: 64}", "scope: {classAtMost: 0}}", "p.yaml:13:55: scope: prefill_chunk_tokens takes no scope: it holds for all requests"),
        ("set: 0.5", "set: 5", "p.yaml:19:38: set: 5 is outside what shed_fraction can be (0 to 1 ratio)"),
        ("set: 0.5", "set: 0.5 * kvv", "p.yaml:19:44: set: undeclared reference to 'kvv' (did you mean 'kv'?)"),
        ("set: 0.5", "set: kv > 0.5", "p.yaml:19:38: set: must be a number, but is bool"),
        ("add: 64", "add: -64", "p.yaml:15:45: add: moves the same way as `do`: recover walks the claim back to baseline"),
        ("{knob: prefill_chunk_tokens, add", "{knob: max_running, add", "p.yaml:15:18: knob: recovers max_running, which this rule's `do` does not move"),
        ("name: shed\n", "name: shed\n      lease: 1s\n", "p.yaml:17:14: lease: must be between 2s and 60s"),
        ("name: shed\n", "name: shed\n      protective: always\n", "p.yaml:17:19: protective: needs spec.priority of 1000 or more, not 100"),
        ("name: shed\n", "name: back-off\n", "p.yaml:16:13: name: a second rule named 'back-off'"),
        ("name: guard", "name: override", "p.yaml:3:18: name: 'override' is reserved for people's orders"),
        ("name: guard", "name: Guard!", "p.yaml:3:18: metadata.name: must be a name: lower-case letters, digits and dashes"),
        ("  rules:", "  holdFor: 3s\n  rules:", "p.yaml:8:3: holdFor: has no effect without `onMissing: hold` or a fallback"),
        ("  rules:", "  onMissing: keep\n  rules:", "p.yaml:8:14: spec.onMissing: must be release, hold or {fallback: {set: VALUE}}"),
        ("  rules:", "  onMissing: {fall: 1}\n  rules:", "p.yaml:8:15: unknown key 'fall' (did you mean 'falls'?)"),
        ("  rules:", "  onMissing: {fallback: {set: 3}}\n  rules:", "p.yaml:8:31: set: the rules move prefill_chunk_tokens, shed_fraction: say which is set, as in {set: {KNOB: VALUE}}"),
        ("  rules:", "  onMissing: {fallback: {set: {max_running: 3}}}\n  rules:", "p.yaml:8:32: max_running: no rule of this policy moves max_running"),
        ("  rules:", "  onMissing: {fallback: {set: {shed_fraction: 3}}}\n  rules:", "p.yaml:8:47: shed_fraction: 3 is outside what shed_fraction can be (0 to 1 ratio)"),
        ("  rules:", "  priority: high\n  rules:", "p.yaml:8:13: spec.priority: should be a whole number"),
        ("  rules:", "  mode: no\n  rules:", "p.yaml:8:9: spec.mode: should be 'off', 'shadow' or 'enforce'"),
        ("kind: Policy\n", "", "p.yaml:1:1: 'kind' is missing"),
        ("itl: {signal", "slo: {signal", "p.yaml:6:5: slo: 'slo' is a reserved word"),
        ('"0.01x9"', '"0.01x9 0.2y3"', "p.yaml:22:27: series itl: '0.2y3' is not a series item such as 0.02x7, 1+0.5x3, _ or stale"),
        ('{itl: "0.01x9"', '{itk: "0.01x9"', "p.yaml:22:14: 'itk' is no input of this policy (did you mean 'itl'?)"),
        ("rule: shed, s", "rule: shet, s", "p.yaml:25:27: unknown rule 'shet' (did you mean 'shed'?)"),
        ("state: inactive", "state: asleep", "p.yaml:25:40: tests.0.expect.0.state: should be 'inactive', 'pending', 'active' or 'leaving'"),
        ("rule: shed, s", "s", "p.yaml:25:21: state: say of which `rule`"),
        ("{at: 500ms", "{at: 24h, knobs: {speed: 1}", "p.yaml:25:27: unknown knob 'speed'"),
        ("{at: 500ms", "{at: 24h, knobs: {max_running: 0}", "p.yaml:25:40: 0 is outside 1 to 65536 requests"),
    ],
)  # fmt: skip
def test_mistakes(old: str, new: str, error: str) -> None:
    assert changed(old, new)[0] == error


def test_verify() -> None:
    def verify(text: str) -> list[str]:
        return changed("name: back-off\n", f"name: back-off\n      verify: {text}\n")

    assert load_text(
        GOOD.replace(
            "name: back-off\n", "name: back-off\n      verify: {input: itl, falls: 10%, within: 2s}\n"
        )
    )
    assert verify("{input: ilt, falls: 10%, within: 2s}") == [
        "p.yaml:10:23: input: undeclared input 'ilt' (did you mean 'itl'?)"
    ]
    assert verify("{input: itl, within: 2s}") == ["p.yaml:10:7: verify: needs exactly one of falls, rises"]
    assert verify("{input: itl, falls: 10%, within: 2s, else: retry}") == [
        "p.yaml:10:58: spec.rules.0.verify.else: should be 'alert' or 'undo'"
    ]


def test_an_undo_must_be_attributable_and_safe() -> None:
    def undo(text: str, rule: str = "back-off", verify: str = "kv", within: str = "2s") -> list[str]:
        name = f"name: {rule}\n"
        assert name in text
        expected = f"      verify: {{input: {verify}, falls: 10%, within: {within}, else: undo}}\n"
        try:
            load_text(text.replace(name, name + expected), "p.yaml")
        except PolicyErrors as error:
            return [problem.message for problem in error.problems]
        return []

    slow = GOOD.replace("      until: itl", "      cooldown: 5s\n      until: itl")
    assert undo(slow) == []
    assert undo(GOOD) == ["else: undo needs a cooldown of at least `within`, 2s: else the next step blurs it"]
    assert undo(slow, verify="itl") == [
        "else: undo cannot be attributed: itl looks back 5s, but is judged after 2s"
    ]
    assert undo(slow, verify="itl", within="5s") == []
    model = slow.replace("multiply: 50%", "solve: {stepTime: slo.itl}").replace("add: 64", "add: 32")
    assert undo(model) == [
        "else: undo cannot be attributed: prefill_chunk_tokens follows a model and moves every tick"
    ]
    shed = GOOD.replace("when: kv > 0.9", "when: kv > 0.9\n      cooldown: 5s")
    assert undo(shed, "shed") == ["else: undo is not for shed_fraction: it sheds, admits or guards KV memory"]


CHOOSE = """\
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: drafts}
spec:
  inputs:
    kv: {signal: kv_occupancy}
  rules:
    - name: how-many
      choose:
        knob: speculative_tokens
        candidates: [0, 1, 2, 4]
        minimise: forecast.seconds_per_token
        hysteresis: 5%
        dwell: 3s
        unless: kv > 0.9
        probe: {candidate: 1, for: 100ms, every: 2s, jitter: 20%, backoff: 2}
"""


def test_a_choosing_rule() -> None:
    (rule,) = load_text(CHOOSE).rules
    assert rule.choose is not None
    assert rule.when is None
    assert (rule.choose.candidates, rule.choose.hysteresis, rule.cooldown_ns) == (
        (0, 1, 2, 4),
        0.05,
        3 * 10**9,
    )
    assert rule.choose.probe is not None
    assert (rule.choose.probe.for_ns, rule.choose.probe.jitter) == (10**8, 0.2)
    assert [(action.knob, action.minimum, action.maximum) for action in rule.actions] == [
        ("speculative_tokens", 0, 4)
    ]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("- name: how-many", "- name: how-many\n      when: kv > 0.5", "p.yaml:9:7: when: means nothing beside `choose`"),
        ("- name: how-many", "- name: how-many\n      cooldown: 5s", "p.yaml:9:7: cooldown: means nothing beside `choose`"),
        ("knob: speculative_tokens", "knob: max_running", "p.yaml:10:15: knob: forecast.seconds_per_token compares speculative_tokens only"),
        ("seconds_per_token", "seconds_per_tokens", "p.yaml:12:19: spec.rules.0.choose.minimise: should be 'forecast.seconds_per_token'"),
        ("1, 2, 4]", "1, 2, 2]", "p.yaml:11:31: 2 is there twice"),
        ("1, 2, 4]", "1, 2.5, 4]", "p.yaml:11:28: 2.5 is no whole number"),
        ("1, 2, 4]", "1, 2, 400]", "p.yaml:11:31: 400 is outside what speculative_tokens can be (0 to 64 tokens)"),
        ("unless: kv", "unless: vk", "p.yaml:15:17: unless: undeclared reference to 'vk' (did you mean 'kv'?)"),
        ("{candidate: 1", "{candidate: 3", "p.yaml:16:28: candidate: 3 is none of the candidates"),
        ("{candidate: 1", "{candidate: 0", "p.yaml:16:28: candidate: the lowest candidate: no choice below it silences a signal"),
        ("every: 2s", "every: 50ms", "p.yaml:16:50: every: must be longer than `for`"),
        ("jitter: 20%", "jitter: 2", "p.yaml:16:62: spec.rules.0.choose.probe.jitter: should be less than or equal to 0.9"),
    ],
)  # fmt: skip
def test_mistakes_in_choosing(old: str, new: str, error: str) -> None:
    assert old in CHOOSE
    assert errors(CHOOSE.replace(old, new, 1))[0] == error


def test_all_errors_of_a_file_at_once_and_no_echoes() -> None:
    """A wrong key, a wrong signal and a wrong expression are three errors; names that a wrong input declares still count."""
    text = (
        GOOD.replace("name: guard}", "name: guard, nmae: x}")
        .replace("itl_seconds", "itl_sec")
        .replace("kv > 0.9", "kw > 0.9")
    )
    assert errors(text.replace("signal: kv_occupancy", "signl: kv_occupancy")) == [
        "p.yaml:3:25: unknown key 'nmae' (did you mean 'name'?)",
        "p.yaml:6:19: signal: unknown signal 'itl_sec' (did you mean 'itl_seconds'?)",
        "p.yaml:7:10: unknown key 'signl' (did you mean 'signal'?)",
        "p.yaml:17:13: when: undeclared reference to 'kw' (did you mean 'kv'?)",
    ]


def test_what_a_mistake_takes_with_it_is_not_reported_again() -> None:
    assert len(changed("when: kv", "wen: kv")) == 1
    assert len(changed("multiply: 50%", "mul: 50%")) == 1
    assert len(changed("name: shed\n", "name: shed\n      for: 5\n")) == 1


def test_all_errors_of_all_files_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD.replace("kv > 0.9", "kw > 0.9"))
    (tmp_path / "b.yaml").write_text("a: [")
    (tmp_path / "c.yaml").write_text(GOOD)
    (tmp_path / "c.test.yaml").write_text("tests: 3")
    (tmp_path / "off").write_text("not a policy")
    missing = tmp_path / "missing.yaml"
    found = [error.removeprefix(f"{tmp_path}/") for error in problems([tmp_path, missing])]
    assert [error.split(": ")[0] for error in found] == [
        "a.yaml:17:13",
        "b.yaml:1:5",
        "c.test.yaml:1:8",
        "c.yaml:3:18",
        "missing.yaml:1:1",
    ]
    assert "a second policy named 'guard'" in found[3]


def test_an_empty_directory_and_a_directory_as_a_file(tmp_path: Path) -> None:
    assert problems([tmp_path]) == [f"{tmp_path}:1:1: no policy file (*.yaml) in this directory"]
    (tmp_path / "x.yaml").mkdir()
    assert problems([tmp_path / "x.yaml"]) == [
        f"{tmp_path / 'x.yaml'}:1:1: no policy file (*.yaml) in this directory"
    ]


def test_equal_priorities_that_push_one_knob_both_ways(tmp_path: Path) -> None:
    other = (
        GOOD.replace("name: guard", "name: boost")
        .replace("multiply: 50%, min: 64", "add: 64")
        .replace("add: 64, every", "add: -64, every")
    )
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yaml").write_text(other)
    assert problems([tmp_path]) == [
        f"{tmp_path / 'b.yaml'}:9:13: rule 'back-off' pushes prefill_chunk_tokens against guard/back-off "
        "at the same priority 100: give one policy the higher priority"
    ]
    (tmp_path / "b.yaml").write_text(other.replace("spec:\n", "spec:\n  priority: 90\n"))
    assert problems([tmp_path]) == []


def test_classes_of_the_configuration() -> None:
    text = GOOD.replace("itl > slo.itl", "itl > slo.chat.itl").replace(
        "{signal: itl_seconds,", "{signal: itl_seconds, class: chat,"
    )
    load_text(text)
    load_text(text, classes=["batch", "chat"])
    assert errors(text, ["batch"])[0] == "p.yaml:6:39: class: unknown class 'chat'"


def test_shipped_policies_have_no_errors() -> None:
    assert problems([SHIPPED]) == []
    names = [policy.name for policy in load_policies([SHIPPED]).policies]
    assert names == sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def test_the_json_schema_knows_every_key_and_forbids_others() -> None:
    schema = json_schema()
    rule = schema["$defs"]["RuleModel"]
    assert rule["additionalProperties"] is False
    assert {"when", "until", "for", "keepFor", "cooldown", "do", "recover", "lease"} <= set(
        rule["properties"]
    )
    assert "prefill_chunk_tokens" in schema["$defs"]["Do"]["properties"]["knob"]["enum"]
