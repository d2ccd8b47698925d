"""`kvpilot test`: a policy's own tests, in virtual time, through the same `evaluate` as the live loop.

The engine of a test obeys at the next tick and has every knob that the policies name, with the baselines that
the test gives. A policy is tested as if its mode were `enforce`: what it would do is what its file promises.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvpilot.clock import NS, Clock
from kvpilot.knobs import KNOBS
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.cases import Case, Expected
from kvpilot.policy.context import Context
from kvpilot.policy.evaluate import evaluate
from kvpilot.policy.expr import Reading
from kvpilot.policy.grid import protective_first
from kvpilot.policy.lease import LeaseWish
from kvpilot.policy.load import Loaded, PolicyErrors, load_with_tests
from kvpilot.policy.outcome import Outcome
from kvpilot.policy.quantity import format_duration
from kvpilot.policy.rules import Policy
from kvpilot.policy.source import Problem, printable
from kvpilot.policy.state import State
from kvpilot.policy.timeline import Timeline, happened, show_inputs, show_scope

_GRANULARITY = {"ratio": 0.01}
_LAST_SHOWN = 3
"""Of what happened before a point at which something else was expected."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One test that was run; `diff` is empty when it passed."""

    policy: str
    case: str
    place: str
    """`path:line` of the test."""
    diff: tuple[str, ...]
    timeline: tuple[str, ...] = ()
    took_s: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.diff


@dataclass(frozen=True, slots=True)
class TestReport:
    """All tests of all files, or the errors that kept them from running."""

    __test__ = False

    errors: tuple[Problem, ...]
    results: tuple[CaseResult, ...]
    untested: tuple[str, ...] = ()
    """Policies that have no test."""

    @property
    def passed(self) -> bool:
        return not self.errors and all(result.passed for result in self.results)

    def lines(self) -> Iterator[str]:
        """For people: a line a test, its timeline if there is one, and the differences of one that failed."""
        if self.errors:
            yield from map(str, self.errors)
            return
        for result in self.results:
            yield f"{'ok  ' if result.passed else 'FAIL'} {result.policy}: {printable(result.case)}"
            yield from (f"  {printable(line)}" for line in result.timeline)
            yield from (f"  {printable(line)}" for line in result.diff)
        yield from (f"none {name}: has no tests" for name in self.untested)
        failed = sum(not result.passed for result in self.results)
        yield f"{len(self.results) - failed} passed, {failed} failed"


def run_tests(paths: Iterable[str | Path], clock: Clock, trace: bool = False) -> TestReport:
    """Run every test of every policy file under `paths`. `clock` says how long that took."""
    try:
        loaded = load_with_tests(paths)
    except PolicyErrors as errors:
        return TestReport(errors.problems, ())
    results = tuple(_timed(one, case, clock, trace) for one in loaded for case in one.cases)
    return TestReport((), results, tuple(one.policy.name for one in loaded if not one.cases))


def _timed(one: Loaded, case: Case, clock: Clock, trace: bool) -> CaseResult:
    began_ns = clock.monotonic_ns()
    result = run_case(one.policy, case, trace)
    return replace(result, took_s=(clock.monotonic_ns() - began_ns) / NS)


def run_case(policy: Policy, case: Case, trace: bool = False) -> CaseResult:
    """Run one test; it goes on after a difference, so that all are seen at once."""
    policy = replace(policy, mode="enforce")
    flight = _Flight(policy, case, _manifest(policy, case))
    timeline = Timeline()
    waiting, diff = deque(case.expected), list[str]()
    for tick in range(case.ticks):
        now_ns = tick * case.tick_ns
        flight.tick(tick, now_ns)
        if trace:
            timeline.take(now_ns, flight.inputs, flight.outcome)
        while waiting and waiting[0].at_ns < now_ns + case.tick_ns:
            expected = waiting.popleft()
            found = flight.differences(expected)
            timeline.mark(expected.at_ns, not found)
            diff += found
    return CaseResult(policy.name, case.name, case.place, tuple(diff), tuple(timeline.lines if trace else ()))


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


@dataclass(slots=True)
class _Flight:
    """A policy in the virtual time of a test, and what has happened to it so far."""

    policy: Policy
    case: Case
    knobs: Mapping[str, ManifestKnob]
    inputs: dict[str, Reading] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=lambda: Outcome(State(), (), (), (), (), ()))
    _last: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_SHOWN))

    def tick(self, tick: int, now_ns: int) -> None:
        """One `evaluate`; the engine has obeyed what the one before it wrote."""
        case, around = self.case, self.case.surroundings
        self.inputs = {name: case.sample(name, tick) for name in case.series}
        context = Context(
            now_ns,
            self.knobs,
            {(lease.knob, lease.scope): lease.value for lease in self.outcome.leases},
            case.slo,
            forecasts=around.forecasts(tick),
            top_tenant=around.top(now_ns),
            offered=around.load(tick),
        )
        inputs = {(self.policy.name, name): value for name, value in self.inputs.items()}
        self.outcome = evaluate([self.policy], self.outcome.state, inputs, context)
        self._last.extend(f"{format_duration(now_ns)}: {event}" for event in happened(self.outcome))

    def differences(self, expected: Expected) -> list[str]:
        """What is not as expected, with what explains it; nothing where all is."""
        found: list[tuple[str, str, str]] = []
        rules = {name: state for (_, name), state in self.outcome.state.rules.items()}
        if expected.state is not None and expected.rule is not None:
            state = rules[expected.rule]
            if state.phase != expected.state:
                since = f"{state.phase}, since {format_duration(state.since_ns)}"
                found.append((f"state of {expected.rule}", expected.state, since))
        for name, value in expected.knobs.items():
            lease = self._hardest(name)
            actual = self.knobs[name].baseline if lease is None else lease.value
            if abs(actual - value) > 1e-9 * max(1.0, abs(value)):
                whose = "baseline" if lease is None else f"by {lease.rule}{show_scope(lease.scope)}"
                found.append((name, f"{value:g}", f"{actual:g}, {whose}"))
        if expected.notified is not None:
            firing = {rule.notified.receiver for rule in rules.values() if rule.notified is not None}
            if firing != expected.notified:
                found.append(("notified", _names(expected.notified), _names(firing)))
        return self._explained(expected, found) if found else []

    def _explained(self, expected: Expected, found: list[tuple[str, str, str]]) -> list[str]:
        what_width, want_width = (max(len(row[i]) for row in found) for i in (0, 1))
        lines = [f"{expected.place}: at {format_duration(expected.at_ns)}"]
        lines += [
            f"  {what:<{what_width}}  expected {want:<{want_width}}  got {got}" for what, want, got in found
        ]
        phases = ", ".join(
            f"{name} {state.phase}" for (_, name), state in sorted(self.outcome.state.rules.items())
        )
        lines.append(f"  with {show_inputs(self.inputs)}; rules: {phases}")
        return [*lines, *(f"  {event}" for event in self._last)]

    def _hardest(self, knob: str) -> LeaseWish | None:
        """What holds for the requests that it is hardest on: the most protective of all scopes."""
        leases = [lease for lease in self.outcome.leases if lease.knob == knob]
        return min(leases, key=lambda lease: protective_first(knob, lease.value), default=None)


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nobody"
