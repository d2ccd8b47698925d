"""Recording and alerting rules: promtool's check and tests; every alert has both tests and a runbook."""

import re
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml
from test_boards import METRIC, known_metrics

ROOT = Path(__file__).resolve().parents[3]
RULES = ROOT / "dashboards" / "prometheus"
FILES = ("recording.yml", "alerts.yml")


def rules() -> list[dict[str, str]]:
    groups = [group for name in FILES for group in yaml.safe_load((RULES / name).read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=RULES, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.needs_program("promtool")
def test_promtool_takes_the_rules_and_the_configuration() -> None:
    promtool("check", "rules", *FILES)
    promtool("check", "config", "prometheus.yml")


@pytest.mark.needs_program("promtool")
def test_each_alert_fires_and_does_not_where_it_should() -> None:
    promtool("test", "rules", "tests.yml")


@pytest.mark.needs_program("promtool")
def test_promtools_tests_can_fail(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_text((RULES / name).read_text().replace('state="dead"', 'state="idle"'))
    (tmp_path / "tests.yml").write_text((RULES / "tests.yml").read_text())
    done = subprocess.run(
        ["promtool", "test", "rules", "tests.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "KvpilotEngineDead" in done.stdout + done.stderr


def test_every_alert_has_a_test_of_each_kind_and_a_runbook() -> None:
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    tests = yaml.safe_load((RULES / "tests.yml").read_text())["tests"]
    expected = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in expected if case["exp_alerts"]} == alerts.keys()
    assert {case["alertname"] for case in expected if not case["exp_alerts"]} == alerts.keys()
    runbook = (ROOT / "docs/alerts.md").read_text()
    assert re.findall(r"^## (\w+)$", runbook, re.M) == list(alerts)
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook_url"] == f"docs/alerts.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert " ".join(rule["expr"].split()) in runbook, f"{name}: docs/alerts.md has another condition"


def test_rules_name_metrics_that_are_written_down() -> None:
    known = known_metrics()
    for rule in rules():
        promql_parser.parse(rule["expr"])
        raw = {name for name in METRIC.findall(rule["expr"]) if f"{name}:" not in rule["expr"]}
        assert raw <= known, rule["expr"]
