"""A loaded policy: what `load` makes of a file and `evaluate` runs. Immutable; times are nanoseconds.

Everything here has been checked: names exist in the catalogues, expressions are typed, bounds are ordered.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from kvpilot.link.controls import Scope
from kvpilot.policy.expr import Expression

Mode = Literal["off", "shadow", "enforce"]
OnMissing = Literal["release", "hold", "fallback"]
ActionKind = Literal["set", "add", "multiply", "solve", "choose"]

TOP_TENANT = Scope("tenant", None)
"""An action's scope: whichever tenant holds most KV memory when the rule acts."""

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
class Solve:
    """A value that a model gives: the chunk for a step time, or the credits for a class's TTFT."""

    target: float | Expression
    """Seconds."""
    klass: str | None
    """None: the largest chunk whose step takes `target` at most; else the credits of this class."""


@dataclass(frozen=True, slots=True)
class Action:
    """What a rule does to one knob and scope while active. `amount` is an expression only under `set`."""

    knob: str
    scope: Scope
    kind: ActionKind
    amount: float | Expression | Solve
    minimum: float
    maximum: float
    step: float | None

    @property
    def tracks(self) -> bool:
        """Whether the claim follows an expression or a model every tick, instead of moving in steps."""
        return not isinstance(self.amount, float | int)

    def acts_on(self, knob: str, scope: Scope) -> bool:
        """Whether a claim on (knob, scope) can be this action's."""
        if knob != self.knob:
            return False
        return scope == self.scope or (self.scope == TOP_TENANT and scope.kind == "tenant")


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
    undo: bool = False
    """Where the effect did not come, drop the claims and suspend the rule for a while; else tell people."""
    window_ns: int = 0
    """The input's window: all of it must lie after the change was in force."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One candidate for `for_ns`, every so often: keeps alive a signal that the choice below it silences."""

    candidate: float
    for_ns: int
    every_ns: int
    jitter: float
    """Share of the wait by which it is lengthened or shortened."""
    backoff: float
    """The wait grows by this factor with each probe that changed nothing."""


@dataclass(frozen=True, slots=True)
class Choose:
    """Take the candidate with the lowest forecast, if it is better by the share `hysteresis`."""

    knob: str
    candidates: tuple[float, ...]
    minimise: str
    hysteresis: float
    unless: Expression | None
    """While true, no probe."""
    probe: Probe | None


@dataclass(frozen=True, slots=True)
class Notify:
    """Whom to tell when the rule becomes active, and again when it is over."""

    receiver: str
    severity: str
    summary: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `identity` is the hash of its text and the inputs it names: unchanged keeps its state.

    It has either `when`, or `choose` with one action that says what knob it moves and in which bounds.
    """

    name: str
    identity: str
    when: Expression | None
    until: Expression | None
    """None: not `when`."""
    for_ns: int
    keep_for_ns: int
    cooldown_ns: int
    """Of a choosing rule: its `dwell`."""
    lease_ns: int
    protective: bool
    """`protective: always`: armed at once, exempt from limits, and a limit on what other rules may claim."""
    actions: tuple[Action, ...]
    recover: tuple[Recover, ...]
    verify: Verify | None
    notify: Notify | None
    choose: Choose | None = None

    def action_on(self, knob: str, scope: Scope) -> Action | None:
        """The action whose claim on (knob, scope) that would be: one that names the scope comes first."""
        found = None
        for action in self.actions:
            if action.knob == knob and action.scope == scope:
                return action
            if found is None and action.acts_on(knob, scope):
                found = action
        return found

    def recover_of(self, knob: str, scope: Scope) -> Recover | None:
        """How a claim on (knob, scope) walks home."""
        for recover in self.recover:
            if recover.knob == knob and (
                recover.scope in (None, scope) or (recover.scope == TOP_TENANT and scope.kind == "tenant")
            ):
                return recover
        return None


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
    """The longest that `hold` and `fallback` last."""
    limits: Limits | None
    rules: tuple[Rule, ...]
    fallback: Mapping[str, float] = field(default_factory=dict)
    """By knob: what a rule that acts on it claims while it is missing, under `fallback`."""


@dataclass(frozen=True, slots=True)
class PolicySet:
    """Policies that were loaded, and are replaced, as one. Ordered by name, which is unique."""

    policies: tuple[Policy, ...]
