"""What happened in a test, tick by tick, for people: a line where something changed and none where not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvpilot.link.controls import Scope
from kvpilot.policy.expr import Reading
from kvpilot.policy.outcome import Decision, Effect, Outcome
from kvpilot.policy.quantity import format_duration
from kvpilot.policy.state import Phase
from kvpilot.signals import Missing

_SCOPES = {"class_at_most": "classAtMost", "tenant": "tenant"}


@dataclass(slots=True)
class Timeline:
    """Fed one tick after the other; `lines` grows."""

    lines: list[str] = field(default_factory=list)
    _phases: dict[str, Phase] = field(default_factory=dict)
    _absent: frozenset[str] | None = None

    def take(self, at_ns: int, inputs: Mapping[str, Reading], outcome: Outcome) -> None:
        """One tick."""
        absent = frozenset(name for name, value in inputs.items() if isinstance(value, Missing))
        events = [*self._changes(outcome), *happened(outcome)]
        if events or self._absent is None or absent != self._absent:
            what = events or ["an input came or went"]
            self.lines.append(f"{_time(at_ns)}  {what[0]}")
            self.lines += [f"{'':>9}  {event}" for event in what[1:]]
            self.lines.append(f"{'':>9}  with {show_inputs(inputs)}")
        self._absent = absent

    def mark(self, at_ns: int, passed: bool) -> None:
        """A point at which something was expected."""
        self.lines.append(f"{_time(at_ns)}  {'as expected' if passed else 'NOT as expected'}")

    def _changes(self, outcome: Outcome) -> Iterator[str]:
        for (_, name), state in sorted(outcome.state.rules.items()):
            before = self._phases.get(name)
            if before is None:
                yield f"{name} {state.phase}"
            elif state.phase is not before:
                yield f"{name} {before} -> {state.phase}"
            self._phases[name] = state.phase


def happened(outcome: Outcome) -> Iterator[str]:
    """The decisions, effects and notices of a tick."""
    for decision in outcome.decisions:
        yield show_decision(decision)
    for effect in outcome.effects:
        yield show_effect(effect)
    for notice in outcome.notices:
        firing = "fires" if notice.firing else "is over"
        yield f"notice of {notice.rule} to {notice.receiver or 'everybody'} {firing}"


def show_decision(decision: Decision) -> str:
    """One change, or refusal of one."""
    change = f"{number(decision.before)} -> {number(decision.after)}"
    if decision.before == decision.after:
        change = f"stays {number(decision.after)}"
    where = show_scope(decision.scope)
    return f"{decision.rule}: {decision.knob}{where} {change}, {decision.verdict} ({decision.reason})"


def show_effect(effect: Effect) -> str:
    """Expected beside realised."""
    came = {True: "came", False: "DID NOT COME", None: "cannot be judged"}[effect.met]
    after = "" if effect.after is None else f", is {number(effect.after)}"
    expected = f"{effect.input} {effect.expected}, was {number(effect.before)}{after}"
    return f"{effect.rule}: effect {came}: {expected} ({effect.reason})"


def show_scope(scope: Scope) -> str:
    """Nothing for everybody."""
    return "" if scope.kind == "all" else f" {_SCOPES[scope.kind]}={scope.argument}"


def show_inputs(inputs: Mapping[str, Reading]) -> str:
    """Values, or why there are none."""
    return ", ".join(f"{name}={show_reading(value)}" for name, value in sorted(inputs.items())) or "no inputs"


def show_reading(value: Reading) -> str:
    """A value, or why there is none."""
    return f"missing ({value.reason})" if isinstance(value, Missing) else number(value)


def number(value: float | None) -> str:
    """As short as it can be told from others; a claim that is gone is `baseline`."""
    return "baseline" if value is None else f"{value:g}"


def _time(at_ns: int) -> str:
    return f"{format_duration(at_ns):>9}"
