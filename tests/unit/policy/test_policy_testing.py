"""`kvpilot check` and `kvpilot test`: the page's example, the shipped policies, what a failure looks like."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from kvpilot.clock import NS, VirtualClock
from kvpilot.commands import app
from kvpilot.policy.checking import check
from kvpilot.policy.junit import junit_xml
from kvpilot.policy.load import load_with_tests
from kvpilot.policy.testing import run_case, run_tests

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
    report = run_tests([tmp_path], VirtualClock())
    assert report.passed
    assert list(report.lines()) == [
        "ok   itl-guard: halves twice, then recovers additively",
        "1 passed, 0 failed",
    ]


def test_a_difference_says_where_what_and_with_which_inputs(tmp_path: Path) -> None:
    path = tmp_path / "itl-guard.yaml"
    path.write_text(
        PAGE.replace("chunk_tokens: 1024", "chunk_tokens: 1000").replace("state: inactive", "state: leaving")
    )
    report = run_tests([path], VirtualClock())
    assert not report.passed
    assert list(report.lines()) == [
        "FAIL itl-guard: halves twice, then recovers additively",
        f"  {path}:36: at 1500ms",
        "    state of back-off-prefill  expected leaving  got inactive, since 0s",
        "    with itl_p95=0.02; rules: back-off-prefill inactive",
        f"  {path}:37: at 3250ms",
        "    prefill_chunk_tokens  expected 1000  got 1024, by back-off-prefill",
        "    with itl_p95=0.06; rules: back-off-prefill active",
        "    3s: back-off-prefill: prefill_chunk_tokens 2048 -> 1024, applied (when: itl_p95 > slo.itl)",
        "    3s: notice of back-off-prefill to oncall fires",
        "0 passed, 1 failed",
    ]


def test_a_knob_that_nobody_claims_and_a_notice_that_nobody_got(tmp_path: Path) -> None:
    path = tmp_path / "itl-guard.yaml"
    path.write_text(
        PAGE.replace(
            "state: inactive, knobs: {prefill_chunk_tokens: 2048}",
            "knobs: {prefill_chunk_tokens: 1}, notified: [oncall]",
        )
    )
    (result,) = run_tests([path], VirtualClock()).results
    assert result.diff[:3] == (
        f"{path}:36: at 1500ms",
        "  prefill_chunk_tokens  expected 1       got 2048, baseline",
        "  notified              expected oncall  got nobody",
    )


def test_the_trace_has_a_line_where_something_changed_and_none_where_not(tmp_path: Path) -> None:
    path = tmp_path / "itl-guard.yaml"
    path.write_text(PAGE.replace("0.02x100", "0.02x20 _x3 0.02x80").replace("at: 3250ms", "at: 20s"))
    (result,) = run_tests([path], VirtualClock(), trace=True).results
    times = [line.split()[0] for line in result.timeline if line[8] != " "]
    expected = "0s 1500ms 2s 3s 5s 7s 10s 10250ms 11s 12s 12250ms 13s 20s"
    assert times == expected.split()
    text = "\n".join(result.timeline)
    assert "       3s  back-off-prefill pending -> active\n" in text
    assert "prefill_chunk_tokens 2048 -> 1024, applied (when: itl_p95 > slo.itl)" in text
    assert "back-off-prefill: effect came: itl_p95 falls 10% within 2s, was 0.06, is 0.02 (measured)" in text
    assert "notice of back-off-prefill to oncall fires" in text
    assert "with itl_p95=missing (no_samples)" in text
    assert "   1500ms  as expected" in text
    assert "NOT as expected" in result.timeline[-1]
    assert run_tests([path], VirtualClock()).results[0].timeline == ()


class SlowClock(VirtualClock):
    """Every look at it takes a second."""

    def monotonic_ns(self) -> int:
        self._now_ns += NS
        return self._now_ns


def test_junit(tmp_path: Path) -> None:
    good = PAGE.replace("name: halves twice, then recovers additively", 'name: "a <b> & \\x07 bell"')
    (tmp_path / "good.yaml").write_text(good)
    (tmp_path / "bad.yaml").write_text(
        PAGE.replace("name: itl-guard", "name: bad").replace("state: active", "state: leaving")
    )
    suites = ElementTree.fromstring(junit_xml(run_tests([tmp_path], SlowClock())))
    assert [(each.get("name"), each.get("tests"), each.get("failures")) for each in suites] == [
        ("bad", "1", "1"),
        ("itl-guard", "1", "0"),
    ]
    bad, fine = suites.iter("testcase")
    assert fine.attrib == {
        "classname": "itl-guard",
        "name": r"a <b> & \x07 bell",
        "file": str(tmp_path / "good.yaml"),
        "line": "30",
        "time": "1.000000",
    }
    (failure,) = bad
    assert failure.tag == "failure"
    assert "expected leaving  got active, since 3s" in (failure.text or "")


def test_junit_of_files_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(PAGE.replace("multiply", "multply"))
    (suite,) = ElementTree.fromstring(junit_xml(run_tests([tmp_path], VirtualClock())))
    assert (suite.get("name"), suite.get("errors")) == ("kvpilot check", "1")
    (case,) = suite
    assert case.get("name") == f"{tmp_path}/a.yaml:24:40"
    assert case[0].get("message") == "unknown key 'multply' (did you mean 'multiply'?)"


def test_tests_beside_the_file(tmp_path: Path) -> None:
    body, tests = PAGE.split("tests:\n")
    (tmp_path / "guard.yaml").write_text(body)
    assert list(run_tests([tmp_path], VirtualClock()).lines()) == [
        "none itl-guard: has no tests",
        "0 passed, 0 failed",
    ]
    (tmp_path / "guard.test.yaml").write_text(f"tests:\n{tests}")
    assert len(run_tests([tmp_path], VirtualClock()).results) == 1


def test_files_that_are_wrong_are_errors_and_no_test_runs(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(PAGE.replace("multiply", "multply"))
    report = run_tests([tmp_path], VirtualClock())
    assert not report.passed
    assert report.results == ()
    assert [line.split(": ", 1)[1] for line in report.lines()] == [
        "unknown key 'multply' (did you mean 'multiply'?)"
    ]
    assert check([tmp_path]).problems == tuple(map(str, report.errors))


def test_a_test_speaks_of_what_the_policy_does_when_it_is_enforced(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(PAGE.replace("mode: enforce", "mode: shadow"))
    assert run_tests([tmp_path], VirtualClock()).passed


@pytest.mark.parametrize("loaded", load_with_tests([SHIPPED]), ids=lambda one: one.policy.name)
def test_shipped_policies_pass_their_tests(loaded) -> None:
    assert loaded.cases
    for case in loaded.cases:
        assert run_case(loaded.policy, case).diff == ()


def test_the_check_command_says_how_much_it_has_checked_and_exits_1_for_a_mistake(tmp_path: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["check", str(SHIPPED)])
    assert (good.exit_code, good.output) == (0, f"{len(list(SHIPPED.glob('*.yaml')))} files, no mistakes\n")
    one = tmp_path / "one.yaml"
    one.write_text(PAGE)
    assert runner.invoke(app, ["check", str(one)]).output == "1 file, no mistakes\n"
    one.write_text(PAGE.replace("itl_p95 > slo.itl", "itl_p96 > slo.itl"))
    bad = runner.invoke(app, ["check", str(one)])
    assert bad.exit_code == 1
    assert "no mistakes" not in bad.output


def test_the_test_command_writes_junit_and_exits_1_for_a_difference(tmp_path: Path) -> None:
    runner, out = CliRunner(), tmp_path / "out.xml"
    good = runner.invoke(app, ["test", str(SHIPPED), "--junit", str(out)])
    assert good.exit_code == 0
    cases = list(ElementTree.parse(out).iter("testcase"))
    assert f"{len(cases)} passed, 0 failed" in good.output
    one = tmp_path / "one.yaml"
    one.write_text(PAGE.replace("chunk_tokens: 1024", "chunk_tokens: 1000"))
    bad = runner.invoke(app, ["test", str(one), "--trace", "--junit", str(out)])
    assert bad.exit_code == 1
    assert "3s  back-off-prefill pending -> active" in bad.output
    assert len(list(ElementTree.parse(out).iter("failure"))) == 1
    nowhere = runner.invoke(app, ["test", str(one), "--junit", str(tmp_path / "no/where.xml")])
    assert nowhere.exit_code == 1
    assert "where.xml: No such file or directory" in nowhere.output
