"""A loaded policy: what `load` makes of a file and `evaluate` runs. Immutable; times are nanoseconds.

Everything here has been checked: names exist in the catalogues, expressions are typed, bounds are ordered.
"""

from dataclasses import dataclass
from typing import Literal

from kvpilot.link.controls import Scope
from kvpilot.policy.expr import Expression

Mode = Literal["off", "shadow", "enforce"]
OnMissing = Literal["release", "hold"]
ActionKind = Literal["set", "add", "multiply"]

DEFAULT_LEASE_NS = 15_000_000_000
DEFAULT_COOLDOWN_NS = 1_000_000_000
"""For rules that step: without one they would compound every tick."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """A typed window over one signal. The pilot computes it once a tick: a value, or missing, and why."""

    name: str
    signal: str
    agg: str
    window_s: float | None
    """None for `last`: the newest sample."""
    min_samples: int
    max_age_s: float
    klass: str | None = None


@dataclass(frozen=True, slots=True)
class Action:
    """What a rule does to one knob and scope while active. `amount` is an expression only under `set`."""

    knob: str
    scope: Scope
    kind: ActionKind
    amount: float | Expression
    minimum: float
    maximum: float
    step: float | None

    @property
    def tracks(self) -> bool:
        """Whether the claim follows an expression every tick, instead of moving in steps."""
        return isinstance(self.amount, Expression)


@dataclass(frozen=True, slots=True)
class Recover:
    """How a claim walks home once its rule is inactive: `add` towards baseline, once per `every`."""

    knob: str
    scope: Scope | None
    """None: every claim of the rule on this knob."""
    add: float
    every_ns: int


@dataclass(frozen=True, slots=True)
class Verify:
    """What a change of value is expected to do to an input, and by when."""

    input: str
    direction: Literal["falls", "rises"]
    ratio: float
    within_ns: int


@dataclass(frozen=True, slots=True)
class Notify:
    """Whom to tell when the rule becomes active, and again when it is over."""

    receiver: str
    severity: str
    summary: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `identity` is the hash of its text and the inputs it names: unchanged keeps its state."""

    name: str
    identity: str
    when: Expression
    until: Expression | None
    """None: not `when`."""
    for_ns: int
    keep_for_ns: int
    cooldown_ns: int
    lease_ns: int
    protective: bool
    """`protective: always`: armed at once, exempt from limits, and a limit on what other rules may claim."""
    actions: tuple[Action, ...]
    recover: tuple[Recover, ...]
    verify: Verify | None
    notify: Notify | None


@dataclass(frozen=True, slots=True)
class Limits:
    """At most `max_changes` steps by the policy's rules in any `per_ns`."""

    max_changes: int
    per_ns: int


@dataclass(frozen=True, slots=True)
class Policy:
    """One file. Higher `priority` wins a knob."""

    name: str
    path: str
    mode: Mode
    priority: int
    annotations: dict[str, str]
    labels: dict[str, str]
    inputs: dict[str, InputSpec]
    on_missing: OnMissing
    hold_for_ns: int
    limits: Limits | None
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class PolicySet:
    """Policies that were loaded, and are replaced, as one. Ordered by name, which is unique."""

    policies: tuple[Policy, ...]
