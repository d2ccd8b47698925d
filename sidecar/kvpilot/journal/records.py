"""What the journal holds, as plain values. Times are wall nanoseconds: the journal is for people.

A scope is written `all`, `classAtMost=1` or `tenant=acme`; an input that was missing as `missing: reason`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvpilot.link.controls import Scope

_ARGUMENT = {"class_at_most": "classAtMost", "tenant": "tenant"}


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One decision; `number` is also the decision id of the lease that carries it."""

    number: int
    at_wall_ns: int
    engine_nonce: int
    policy: str
    rule: str
    knob: str
    scope: str
    before: float | None
    after: float | None
    verdict: str
    reason: str
    inputs: Mapping[str, float | str] = field(default_factory=dict)
    ages: Mapping[str, float] = field(default_factory=dict)
    """Seconds since the newest sample of each input; of one without any it is absent."""
    phase: str | None = None
    """Where the rule was after the tick; None for a person's order and a rule that is gone."""
    phase_s: float | None = None
    """For how long."""
    claims: tuple[Mapping[str, Any], ...] = ()
    """All claims on the knob after the tick, as `claim_row` writes them."""
    text: str | None = None
    """The key of the rule's text (`RuleRecord`)."""
    confirmed_after_s: float | None = None
    """From the decision to the step that echoed it."""


def claim_row(rule: str, scope: Scope, value: float, by: str | None) -> dict[str, Any]:
    """One claim: whose (`policy/rule`), and who overrules it, if anybody does."""
    return {"rule": rule, "scope": format_scope(scope), "value": value, "by": by}


@dataclass(frozen=True, slots=True)
class RuleRecord:
    """A rule's text as it was flown, once for each text. `described` is for JSON."""

    key: str
    at_wall_ns: int
    policy: str
    rule: str
    described: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class VerdictRecord:
    """What the engine's echo made of an earlier decision."""

    number: int
    verdict: str
    after_s: float
    """From the decision to the step that echoed it."""


@dataclass(frozen=True, slots=True)
class EffectRecord:
    """What a decision did to an input: expected beside realised."""

    at_wall_ns: int
    policy: str
    rule: str
    input: str
    expected: str
    before: float | None
    after: float | None
    met: bool | None
    reason: str
    number: int | None = None
    """Of the decision whose effect it is."""


@dataclass(frozen=True, slots=True)
class OverrideRecord:
    """A person's order for one knob and scope; `value` None ends the one in force."""

    at_wall_ns: int
    knob: str
    scope: str
    value: float | None
    until_wall_ns: int
    why: str
    who: str


@dataclass(frozen=True, slots=True)
class SwitchRecord:
    """A person turned the pilot off or on."""

    at_wall_ns: int
    off: bool
    why: str
    who: str


@dataclass(frozen=True, slots=True)
class EventRecord:
    """What explains other rows: an engine came, left or restarted; policies were loaded or refused."""

    at_wall_ns: int
    kind: str
    detail: str


Record = (
    DecisionRecord | RuleRecord | VerdictRecord | EffectRecord | OverrideRecord | SwitchRecord | EventRecord
)


def format_scope(scope: Scope) -> str:
    """A scope as people write it."""
    return "all" if scope.kind == "all" else f"{_ARGUMENT[scope.kind]}={scope.argument}"


def parse_scope(text: str) -> Scope:
    """Inverse of `format_scope`. Raises ValueError."""
    name, _, argument = text.partition("=")
    if name == "all" and not argument:
        return Scope("all")
    if name == "classAtMost" and argument.isdecimal():
        return Scope("class_at_most", int(argument))
    if name == "tenant" and argument:
        return Scope("tenant", argument)
    raise ValueError(f"{text!r} is not a scope: write all, classAtMost=0 or tenant=NAME")
