"""`kvpilot check` and `kvpilot test`: the page's example, the shipped policies, what a failure looks like."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpilot.commands import app
from kvpilot.policy.load import load_with_tests
from kvpilot.policy.testing import check, run_case, run_tests

SHIPPED = Path(__file__).parents[3] / "policies"

PAGE = """\
# yaml-language-server: $schema=policy.schema.json
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata:
  name: itl-guard
  annotations:
    summary: Trade prefill throughput for decode latency when inter-token latency rises
    runbook_url: https://...
spec:
  mode: enforce                 # off | shadow | enforce
  priority: 100                 # higher wins a knob; equal: the more protective value; then name
  inputs:                       # typed windows over the signal catalogue, computed once a tick
    itl_p95: {signal: itl_seconds, agg: p95, window: 5s, minSamples: 20, maxAge: 2s}
  onMissing: release
  limits: {maxChanges: 12, per: 60s}
  rules:
    - name: back-off-prefill
      when:  itl_p95 > slo.itl
      until: itl_p95 < 0.75 * slo.itl
      for: 1s
      keepFor: 3s
      cooldown: 2s
      do:
        - {knob: prefill_chunk_tokens, multiply: 0.5, min: 256, step: 64}
      recover:
        - {knob: prefill_chunk_tokens, add: 256, every: 1s}
      verify: {input: itl_p95, falls: 10%, within: 2s}
      notify: {receiver: oncall, severity: warning}
tests:
  - name: halves twice, then recovers additively
    tick: 250ms
    slo: {itl: 0.040}
    knobs: {prefill_chunk_tokens: 2048}
    series: {itl_p95: "0.02x7 0.06x19 0.02x100"}
    expect:
      - {at: 1500ms, rule: back-off-prefill, state: inactive, knobs: {prefill_chunk_tokens: 2048}}
      - {at: 3250ms, rule: back-off-prefill, state: active, knobs: {prefill_chunk_tokens: 1024}}
"""


def test_the_example_of_the_policy_page_passes_its_own_test(tmp_path: Path) -> None:
    (tmp_path / "itl-guard.yaml").write_text(PAGE)
    report = run_tests([tmp_path])
    assert report.passed
    assert report.lines() == ["ok   itl-guard: halves twice, then recovers additively", "1 passed, 0 failed"]


def test_a_difference_says_where_what_and_with_which_inputs(tmp_path: Path) -> None:
    path = tmp_path / "itl-guard.yaml"
    path.write_text(
        PAGE.replace("chunk_tokens: 1024", "chunk_tokens: 1000").replace("state: inactive", "state: leaving")
    )
    report = run_tests([path])
    assert not report.passed
    assert report.lines() == [
        "FAIL itl-guard: halves twice, then recovers additively",
        f"     {path}:36: at 1500ms: back-off-prefill state: expected leaving, got inactive",
        "       with itl_p95=0.02; rules: back-off-prefill inactive",
        f"     {path}:37: at 3250ms: prefill_chunk_tokens: expected 1000, got 1024",
        "       with itl_p95=0.06; rules: back-off-prefill active",
        "0 passed, 1 failed",
    ]


def test_tests_beside_the_file(tmp_path: Path) -> None:
    body, tests = PAGE.split("tests:\n")
    (tmp_path / "guard.yaml").write_text(body)
    assert run_tests([tmp_path]).lines() == ["none itl-guard: has no tests", "0 passed, 0 failed"]
    (tmp_path / "guard.test.yaml").write_text(f"tests:\n{tests}")
    assert len(run_tests([tmp_path]).results) == 1


def test_files_that_are_wrong_are_errors_and_no_test_runs(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(PAGE.replace("multiply", "multply"))
    report = run_tests([tmp_path])
    assert not report.passed
    assert report.results == ()
    assert [line.split(": ", 1)[1] for line in report.lines()] == [
        "unknown key 'multply' (did you mean 'multiply'?)"
    ]
    assert check([tmp_path]) == list(report.errors)


def test_a_test_speaks_of_what_the_policy_does_when_it_is_enforced(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(PAGE.replace("mode: enforce", "mode: shadow"))
    assert run_tests([tmp_path]).passed


@pytest.mark.parametrize("loaded", load_with_tests([SHIPPED]), ids=lambda one: one.policy.name)
def test_shipped_policies_pass_their_tests(loaded) -> None:
    assert loaded.cases
    for case in loaded.cases:
        assert run_case(loaded.policy, case).diff == ()


def test_the_check_command_says_how_much_it_has_checked_and_exits_1_for_a_mistake(tmp_path: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["check", str(SHIPPED)])
    assert (good.exit_code, good.output) == (0, "4 files, no mistakes\n")
    one = tmp_path / "one.yaml"
    one.write_text(PAGE)
    assert runner.invoke(app, ["check", str(one)]).output == "1 file, no mistakes\n"
    one.write_text(PAGE.replace("itl_p95 > slo.itl", "itl_p96 > slo.itl"))
    bad = runner.invoke(app, ["check", str(one)])
    assert bad.exit_code == 1
    assert "no mistakes" not in bad.output
