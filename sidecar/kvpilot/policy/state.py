"""What evaluation remembers between ticks: each rule's phase and claims. Immutable, comparable, plain.

Invariant: an inactive rule holds only claims that are recovering; a rule without claims is at baseline.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kvpilot.link.controls import Scope
from kvpilot.policy.arbitrate import Target
from kvpilot.policy.outcome import LeaseWish, Notice
from kvpilot.policy.trail import Told

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
    """When the next step home is due; None while the rule is not inactive."""


@dataclass(frozen=True, slots=True)
class Check:
    """A change whose effect is still to be measured (see `Verify`)."""

    before: float
    due_ns: int


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
    steps: int = 0
    """Steps in this episode: a shadowed rule's later ones are open loop."""
    blocked: str | None = None
    """The refusal last journalled, so that it is journalled once."""
    missing_since_ns: int | None = None
    notified: Notice | None = None
    """The notice that is firing."""
    check: Check | None = None


@dataclass(frozen=True, slots=True)
class State:
    """All rules, what held at the last tick, each policy's recent steps (shadowed ones apart)."""

    rules: Mapping[RuleKey, RuleState] = field(default_factory=dict)
    leases: Mapping[Target, LeaseWish] = field(default_factory=dict)
    told: Mapping[Target, Told] = field(default_factory=dict)
    """What the journal last said of each lease that a rule holds."""
    shadow: Mapping[Target, LeaseWish] = field(default_factory=dict)
    steps_ns: Mapping[tuple[str, bool], tuple[int, ...]] = field(default_factory=dict)
