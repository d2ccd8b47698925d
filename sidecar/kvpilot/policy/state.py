"""What evaluation remembers between ticks: each rule's phase and claims. Immutable, comparable, plain.

Invariant: an inactive rule holds only claims that walk home, or that stand in while it is blind or probes; a
rule without claims is at baseline.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kvpilot.link.controls import Scope
from kvpilot.policy.lease import LeaseWish, Target
from kvpilot.policy.notice import Notice
from kvpilot.policy.trail import Told
from kvpilot.signals import Missing

RuleKey = tuple[str, str]
"""(policy name, rule name)."""


class Phase(StrEnum):
    """Where a rule is: `inactive -> pending -> active -> leaving -> inactive`."""

    INACTIVE = "inactive"
    PENDING = "pending"
    ACTIVE = "active"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Claim:
    """A rule's wish for one (knob, scope). `overruled_by` names who held the knob at the last arbitration."""

    knob: str
    scope: Scope
    value: float
    overruled_by: str | None = None
    recover_at_ns: int | None = None
    """When the next step home is due; None while the claim stays where it is."""


@dataclass(frozen=True, slots=True)
class Check:
    """A change whose effect is still to be measured (see `Verify`)."""

    before: float
    """The input at the decision."""
    at_ns: int
    offered: float | Missing
    """Requests a second that arrived when it was decided."""
    changed: tuple[tuple[Target, float], ...]
    others: Mapping[Target, float]
    """Every other value in force when it was decided."""
    in_force_ns: int | None = None
    confounded: str | None = None
    """What else happened meanwhile, so that nobody can say whose the effect was."""


@dataclass(frozen=True, slots=True)
class Choosing:
    """How far a choosing rule is with its probes."""

    due_ns: int | None = None
    """When the next one begins; None where none is needed."""
    fruitless: int = 0
    """Probes in a row that changed nothing."""
    until_ns: int | None = None
    """When the one under way ends."""
    back: float | None = None
    """The claim's value before it; None where there was no claim."""
    choice: float | None = None
    """What the probe interrupts, whoever held it."""


@dataclass(frozen=True, slots=True)
class RuleState:
    """One rule between ticks. `since_ns` is when the present phase began."""

    identity: str
    phase: Phase = Phase.INACTIVE
    since_ns: int = 0
    shadow: bool = False
    claims: tuple[Claim, ...] = ()
    changed_ns: int | None = None
    """The rule's last step, across episodes: where `cooldown` counts from."""
    apart_ns: int | None = None
    """The same on the other side: of real knobs while the rule is shadowed, of virtual ones while it acts."""
    steps: int = 0
    """How often it acted in this episode: a shadowed rule's later steps are open loop."""
    blocked: str | None = None
    """The refusal last journalled, so that it is journalled once."""
    missing_since_ns: int | None = None
    notified: Notice | None = None
    """The notice of its state that is firing."""
    disappointed: Notice | None = None
    """The notice of an effect that did not come that is firing."""
    check: Check | None = None
    undos: int = 0
    """Undone in a row: each suspends for longer."""
    suspended_ns: int | None = None
    """Until when it may not act, because its effect did not come."""
    choosing: Choosing = Choosing()


@dataclass(frozen=True, slots=True)
class State:
    """All rules, what held at the last tick, each policy's recent steps (shadowed ones apart)."""

    rules: Mapping[RuleKey, RuleState] = field(default_factory=dict)
    leases: Mapping[Target, LeaseWish] = field(default_factory=dict)
    told: Mapping[Target, Told] = field(default_factory=dict)
    """What the journal last said of each lease that a rule holds."""
    shadow: Mapping[Target, LeaseWish] = field(default_factory=dict)
    steps_ns: Mapping[tuple[str, bool], tuple[int, ...]] = field(default_factory=dict)
