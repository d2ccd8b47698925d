"""`kvpilot test`: a policy's own tests, in virtual time, through the same `evaluate` as the live loop.

The engine of a test obeys at the next tick and has every knob that the policies name, with the baselines that
the test gives. A policy is tested as if its mode were `enforce`: what it would do is what its file promises.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvpilot.knobs import KNOBS
from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.cases import Case, Expected
from kvpilot.policy.context import Context
from kvpilot.policy.evaluate import evaluate
from kvpilot.policy.grid import protective_first
from kvpilot.policy.load import PolicyErrors, load_with_tests
from kvpilot.policy.outcome import Outcome
from kvpilot.policy.quantity import format_duration
from kvpilot.policy.rules import Policy
from kvpilot.policy.state import State
from kvpilot.signals import Missing

_GRANULARITY = {"ratio": 0.01}


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One test that was run; `diff` is empty when it passed."""

    policy: str
    case: str
    place: str
    diff: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.diff


@dataclass(frozen=True, slots=True)
class TestReport:
    """All tests of all files, or the errors that kept them from running."""

    __test__ = False

    errors: tuple[str, ...]
    results: tuple[CaseResult, ...]
    untested: tuple[str, ...] = ()
    """Policies that have no test."""

    @property
    def passed(self) -> bool:
        return not self.errors and all(result.passed for result in self.results)

    def lines(self) -> list[str]:
        """For people: a line a test, and under a failed one the differences."""
        lines = list(self.errors)
        for result in self.results:
            lines.append(f"{'ok  ' if result.passed else 'FAIL'} {result.policy}: {result.case}")
            lines += [f"     {line}" for line in result.diff]
        lines += [f"none {name}: has no tests" for name in self.untested]
        failed = sum(not result.passed for result in self.results)
        if not self.errors:
            lines.append(f"{len(self.results) - failed} passed, {failed} failed")
        return lines


def check(paths: Iterable[str | Path]) -> list[str]:
    """Every error in every file as `path:line:col: message`; empty when all is well."""
    try:
        load_with_tests(paths)
    except PolicyErrors as errors:
        return [str(problem) for problem in errors.problems]
    return []


def run_tests(paths: Iterable[str | Path]) -> TestReport:
    """Run every test of every policy file under `paths`."""
    try:
        loaded = load_with_tests(paths)
    except PolicyErrors as errors:
        return TestReport(tuple(str(problem) for problem in errors.problems), ())
    results = [run_case(one.policy, case) for one in loaded for case in one.cases]
    return TestReport((), tuple(results), tuple(one.policy.name for one in loaded if not one.cases))


def run_case(policy: Policy, case: Case) -> CaseResult:
    """Run one test; it goes on after a difference, so that all are seen at once."""
    policy = replace(policy, mode="enforce")
    knobs = _manifest(policy, case)
    state, diff = State(), list[str]()
    values: dict[tuple[str, Scope], float] = {}
    waiting = list(case.expected)
    for tick in range(case.ticks):
        now_ns = tick * case.tick_ns
        inputs = {(policy.name, name): case.sample(name, tick) for name in case.series}
        outcome = evaluate([policy], state, inputs, Context(now_ns, knobs, values, case.slo))
        state = outcome.state
        values = {(lease.knob, lease.scope): lease.value for lease in outcome.leases}
        while waiting and waiting[0].at_ns < now_ns + case.tick_ns:
            diff += _differences(waiting.pop(0), policy, outcome, knobs, inputs)
    return CaseResult(policy.name, case.name, case.place, tuple(diff))


def _manifest(policy: Policy, case: Case) -> dict[str, ManifestKnob]:
    named = {action.knob for rule in policy.rules for action in rule.actions}
    knobs = {}
    for name in sorted({*named, *case.baselines}):
        knob = KNOBS[name]
        low, high = knob.plausible
        default = low if knob.protective == "higher" else high
        baseline = case.baselines.get(name, default)
        granularity = _GRANULARITY.get(knob.unit, 1.0)
        knobs[name] = ManifestKnob(
            name, knob.unit, low, high, baseline, granularity, "at the next tick of a test"
        )
    return knobs


def _differences(
    expected: Expected,
    policy: Policy,
    outcome: Outcome,
    knobs: dict[str, ManifestKnob],
    inputs: dict[Any, Any],
) -> list[str]:
    found: list[tuple[str, object, object]] = []
    if expected.state is not None and expected.rule is not None:
        state = outcome.state.rules[policy.name, expected.rule].phase
        if state != expected.state:
            found.append((f"{expected.rule} state", expected.state, str(state)))
    for name, value in expected.knobs.items():
        actual = _value(name, outcome, knobs)
        if abs(actual - value) > 1e-9 * max(1.0, abs(value)):
            found.append((name, f"{value:g}", f"{actual:g}"))
    if expected.notified is not None:
        firing = {
            rule.notified.receiver for rule in outcome.state.rules.values() if rule.notified is not None
        }
        if firing != expected.notified:
            found.append(("notified", sorted(expected.notified), sorted(firing)))
    if not found:
        return []
    at = format_duration(expected.at_ns)
    lines = [f"{expected.place}: at {at}: {what}: expected {want}, got {got}" for what, want, got in found]
    seen = ", ".join(f"{name}={_shown(value)}" for (_, name), value in sorted(inputs.items()))
    return [*lines, f"  with {seen}; rules: {_phases(outcome)}"]


def _value(name: str, outcome: Outcome, knobs: dict[str, ManifestKnob]) -> float:
    """What the knob is at for the requests it is hardest on: the most protective of all scopes."""
    values = [lease.value for lease in outcome.leases if lease.knob == name]
    return min(values, key=lambda value: protective_first(name, value), default=knobs[name].baseline)


def _phases(outcome: Outcome) -> str:
    return ", ".join(f"{name} {state.phase}" for (_, name), state in sorted(outcome.state.rules.items()))


def _shown(value: float | Missing) -> str:
    return f"missing ({value.reason})" if isinstance(value, Missing) else f"{value:g}"
