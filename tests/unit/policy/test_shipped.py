"""Shipped policies as files: each has its purpose, its runbook and tests that fail when a rule is broken."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.context import Context, Forecasts
from kvpilot.policy.evaluate import evaluate
from kvpilot.policy.load import Loaded, load_text, load_with_tests
from kvpilot.policy.rules import Policy, Rule
from kvpilot.policy.state import State
from kvpilot.policy.testing import run_case
from kvpilot.signals import Missing

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "policies").glob("*.yaml"))
PAGE = (ROOT / "docs" / "policies.md").read_text()
MS = 1_000_000
HOUR_NS = 3600 * 1000 * MS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_says_what_it_is_for_and_what_to_do_when_it_acts(path: Path) -> None:
    policy = load_text(path.read_text())
    assert policy.name == path.stem
    summary = policy.annotations["summary"]
    assert policy.annotations["runbook_url"] == f"docs/policies.md#{policy.name}"
    title, _, rest = PAGE.partition(f"\n## {policy.name}\n\n{summary}\n\n")
    assert title != PAGE, "docs/policies.md has no section with this name and summary"
    assert len(rest.partition("\n## ")[0]) > 200, "a runbook paragraph"
    for rule in policy.rules:
        for action in rule.actions:
            row = next(line for line in PAGE.splitlines() if line.startswith(f"| [{policy.name}]"))
            assert f"`{action.knob}`" in row
            assert f" {policy.priority}" in row


def broken(policy: Policy) -> Iterator[tuple[str, Policy]]:
    """The policy with one thing wrong in it, for each that a test has to notice."""
    for number, rule in enumerate(policy.rules):
        for what, worse in _broken_rule(rule):
            rules = (*policy.rules[:number], worse, *policy.rules[number + 1 :])
            yield f"{rule.name} {what}", replace(policy, rules=rules)
    yield "never lets go while blind", replace(policy, hold_for_ns=HOUR_NS)
    yield "does not hold while blind", replace(policy, on_missing="release")


def _broken_rule(rule: Rule) -> Iterator[tuple[str, Rule]]:
    if rule.choose is not None:
        yield "never changes", replace(rule, choose=replace(rule.choose, hysteresis=0.999))
        yield "changes for nothing", replace(rule, choose=replace(rule.choose, hysteresis=0.0))
        return
    yield "never enters", replace(rule, for_ns=HOUR_NS)
    if not rule.protective:
        yield "never leaves", replace(rule, keep_for_ns=HOUR_NS)
    if rule.recover:
        yield "drops instead of recovering", replace(rule, recover=())
    if rule.notify is not None and not rule.actions:
        yield "tells nobody", replace(rule, notify=None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_own_tests_pass_and_notice_what_is_broken(path: Path) -> None:
    (loaded,) = load_with_tests([path])

    def fails(policy: Policy, one: Loaded = loaded) -> bool:
        return any(not run_case(policy, case).passed for case in one.cases)

    assert not fails(loaded.policy)
    unnoticed = [what for what, policy in broken(loaded.policy) if not fails(policy)]
    assert unnoticed == []


KNOBS = {"prefill_chunk_tokens": ManifestKnob("prefill_chunk_tokens", "tokens", 16, 4096, 2048, 1, "")}


def claimed(chunk: float | Missing, seconds: float) -> tuple[float, str]:
    """Chunk and policy in force when the pace has been broken for so long and the model says `chunk`."""
    policies = [
        load_text((ROOT / "policies" / f"{name}.yaml").read_text())
        for name in ("itl-guard", "itl-guard-blind")
    ]
    inputs = {
        (policy.name, name): value
        for policy in policies
        for name, value in (("itl_p95", 0.09), ("late", 0.0))
    }
    state, values = State(), {}
    for tick in range(round(seconds * 10)):
        forecasts = Forecasts(chunk_for=lambda target_s: chunk)
        context = Context(tick * 100 * MS, KNOBS, values, {"itl": 0.05, "ttft": 1.0}, forecasts=forecasts)
        outcome = evaluate(policies, state, inputs, context)
        state = outcome.state
        values = {(lease.knob, lease.scope): lease.value for lease in outcome.leases}
    held = {lease.knob: lease for lease in outcome.leases}["prefill_chunk_tokens"]
    assert held.scope == Scope("all")
    return held.value, held.policy


def test_the_pace_is_kept_by_the_model_and_felt_for_only_where_there_is_none() -> None:
    assert claimed(700.0, 10.0) == (700.0, "itl-guard")
    value, policy = claimed(Missing("too_few_samples"), 10.0)
    assert policy == "itl-guard-blind"
    assert value < 700.0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_engine_without_the_knobs_is_told_of_and_nothing_else(path: Path) -> None:
    (loaded,) = load_with_tests([path])
    for case in loaded.cases:
        state = State()
        for tick in range(case.ticks):
            inputs = {(loaded.policy.name, name): case.sample(name, tick) for name in case.series}
            context = Context(
                tick * case.tick_ns, {}, {}, case.slo, forecasts=case.surroundings.forecasts(tick)
            )
            outcome = evaluate([loaded.policy], state, inputs, context)
            state = outcome.state
            assert outcome.leases == ()
            assert {decision.verdict for decision in outcome.decisions} <= {"unsupported", "missing_input"}
