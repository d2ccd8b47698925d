"""What one tick of evaluation decided: leases to hold, changes to journal, people to tell, effects to record.

`leases` is the whole truth after the tick: what is not in it is withdrawn. `decisions` are changes only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpilot.link.controls import Scope
from kvpilot.signals import Missing

if TYPE_CHECKING:
    from kvpilot.policy.state import State

VERDICTS = (
    "applied",
    "shadowed",
    "clamped",
    "overruled",
    "rate_limited",
    "cooling_down",
    "missing_input",
    "unsupported",
)
"""Those that evaluation gives. The pilot adds what only the engine can say, such as `unconfirmed`."""

OVERRIDE = "override"
"""The policy name under which a person's order appears in leases and decisions; no file may use it."""


@dataclass(frozen=True, slots=True)
class LeaseWish:
    """A winner of this tick: the pilot writes it, and renews it as long as it stays in the outcome."""

    knob: str
    scope: Scope
    value: float
    ttl_ns: int
    policy: str
    rule: str


@dataclass(frozen=True, slots=True)
class Decision:
    """One change, or one refusal to change, with all the inputs that the rule's policy saw.

    `before` and `after` are the claim's values; `before` is the value in force for a first claim, `after` is
    None when the claim is gone. `reason` is a phrase for people, stable enough to search for.
    """

    at_ns: int
    policy: str
    rule: str
    knob: str
    scope: Scope
    before: float | None
    after: float | None
    verdict: str
    reason: str
    inputs: Mapping[str, float | Missing]


@dataclass(frozen=True, slots=True)
class Notice:
    """A rule with `notify` became active (`firing`), or is over."""

    policy: str
    rule: str
    receiver: str
    severity: str
    summary: str
    firing: bool


@dataclass(frozen=True, slots=True)
class Effect:
    """What a change was expected to do, beside what it did. `met` is None when it could not be judged."""

    policy: str
    rule: str
    input: str
    expected: str
    before: float
    after: float | None
    met: bool | None
    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """See the module docstring. `shadow` is what shadowed rules would hold; it never reaches an engine."""

    state: "State"
    leases: tuple[LeaseWish, ...]
    shadow: tuple[LeaseWish, ...]
    decisions: tuple[Decision, ...]
    notices: tuple[Notice, ...]
    effects: tuple[Effect, ...]
