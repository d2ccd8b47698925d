"""The tests of a policy file, checked and ready to run: series as samples, expectations in order of time."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from kvpilot.knobs import KNOBS
from kvpilot.policy.context import Slo
from kvpilot.policy.expr import Reading
from kvpilot.policy.findings import did_you_mean
from kvpilot.policy.schema import Expectation, TestModel
from kvpilot.policy.series import STALE, Series, SeriesError, parse_series
from kvpilot.policy.source import Path, Source
from kvpilot.policy.surroundings import Surroundings, build_surroundings

MAX_TICKS = 1_000_000


@dataclass(frozen=True, slots=True)
class Expected:
    """What must hold after the last tick at or before `at_ns`; None is not asked."""

    at_ns: int
    place: str
    rule: str | None
    state: str | None
    knobs: Mapping[str, float]
    notified: frozenset[str] | None


@dataclass(frozen=True, slots=True)
class Case:
    """One test. `series` are samples a tick; after a series' end its input is stale."""

    name: str
    place: str
    tick_ns: int
    slo: Slo
    baselines: Mapping[str, float]
    series: Mapping[str, Series]
    expected: tuple[Expected, ...]
    surroundings: Surroundings = field(default_factory=Surroundings)

    @property
    def ticks(self) -> int:
        """How many ticks reach the last expectation."""
        return self.expected[-1].at_ns // self.tick_ns + 1

    def sample(self, name: str, tick: int) -> Reading:
        """The input's reading at a tick."""
        samples = self.series[name]
        return samples[tick] if tick < len(samples) else STALE


def build_cases(
    source: Source, tests: Sequence[TestModel], inputs: Sequence[str], rules: AbstractSet[str]
) -> list[Case]:
    """The cases of `tests`; problems go to `source.problems`. `rules` are the file's rule names."""
    return [_case(source, ("tests", i), test, inputs, rules) for i, test in enumerate(tests)]


def _case(
    source: Source, path: Path, test: TestModel, inputs: Sequence[str], rules: AbstractSet[str]
) -> Case:
    series: dict[str, Series] = {}
    for name, text in test.series.items():
        if name not in inputs:
            hint = did_you_mean(name, inputs)
            source.problems.append(
                source.at((*path, "series", name), f"'{name}' is no input of this policy{hint}", True)
            )
        try:
            series[name] = parse_series(text)
        except SeriesError as error:
            source.problems.append(
                source.inside((*path, "series", name), error.offset, f"series {name}: {error}")
            )
    _check_knobs(source, (*path, "knobs"), test.knobs)
    expected = [_expected(source, (*path, "expect", i), one, rules) for i, one in enumerate(test.expect)]
    expected.sort(key=lambda one: one.at_ns)
    if test.tick <= 0:
        source.problems.append(source.at((*path, "tick"), "tick: must be above 0s"))
    elif expected[-1].at_ns // test.tick > MAX_TICKS:
        source.problems.append(source.at((*path, "expect"), f"more than {MAX_TICKS} ticks", True))
    return Case(
        name=test.name,
        place=_place(source, (*path, "name")),
        tick_ns=test.tick,
        slo=test.slo,
        baselines=test.knobs,
        series=series,
        expected=tuple(expected),
        surroundings=build_surroundings(source, path, test),
    )


def _expected(source: Source, path: Path, given: Expectation, rules: AbstractSet[str]) -> Expected:
    if given.rule is not None and given.rule not in rules:
        hint = did_you_mean(given.rule, rules)
        source.problems.append(source.at((*path, "rule"), f"unknown rule '{given.rule}'{hint}"))
    if given.state is not None and given.rule is None and len(rules) != 1:
        source.problems.append(source.at((*path, "state"), "state: say of which `rule`", True))
    _check_knobs(source, (*path, "knobs"), given.knobs)
    only = next(iter(rules)) if len(rules) == 1 else None
    return Expected(
        at_ns=given.at,
        place=_place(source, path),
        rule=given.rule or only,
        state=given.state,
        knobs=given.knobs,
        notified=None if given.notified is None else frozenset(given.notified),
    )


def _check_knobs(source: Source, path: Path, knobs: Mapping[str, float]) -> None:
    for name, value in knobs.items():
        knob = KNOBS.get(name)
        if knob is None:
            source.problems.append(
                source.at((*path, name), f"unknown knob '{name}'{did_you_mean(name, KNOBS)}", True)
            )
        elif not knob.plausible[0] <= value <= knob.plausible[1]:
            low, high = knob.plausible
            source.problems.append(
                source.at((*path, name), f"{value:g} is outside {low:g} to {high:g} {knob.unit}")
            )


def _place(source: Source, path: Path) -> str:
    problem = source.at(path, "")
    return f"{problem.path}:{problem.line}"
