"""What one tick of evaluation decided: leases to hold, changes to journal, people to tell, effects to record.

`leases` is the whole truth after the tick: what is not in it is withdrawn. `decisions` are changes only.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvpilot.link.controls import Scope
from kvpilot.policy.lease import LeaseWish
from kvpilot.policy.notice import Notice
from kvpilot.policy.state import State
from kvpilot.signals import Missing

VERDICTS = {
    "applied": "The change was made; from the pilot: the engine or every valve echoes it.",
    "unconfirmed": "Written, and no echo of it has come yet.",
    "shadowed": "Decided and not made: the rule is in shadow. `open_loop`: not its first action there.",
    "clamped": "Made as far as the engine's own limits let it.",
    "overruled": "Claimed, while another claim or a person's order holds the knob.",
    "rate_limited": "Not made: the policy's `limits` are used up.",
    "cooling_down": "Not made yet: the rule's last step is more recent than its `cooldown`.",
    "missing_input": "An input or a model is missing: claims are held or released.",
    "unsupported": "This engine has no such knob.",
    "rejected_by_engine": "The engine has read it and has another value in force.",
    "lease_expired": "The lease ran out before it was renewed: the engine was back at baseline.",
    "undone": "The effect that `verify` expects did not come: claims dropped, the rule suspended.",
    "inconclusive": "Nobody can say whose the effect was, so nothing was undone.",
    "suspended": "Not made: an earlier change of this rule was undone, and it has to wait.",
}
"""Every verdict of the journal with its meaning."""
FROM_ECHOES = ("unconfirmed", "rejected_by_engine", "lease_expired")
"""Those that only the pilot can give, from what engine and valves say; evaluation gives the others."""


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
class Effect:
    """What a change was expected to do, beside what it did. `met` is None when it could not be judged."""

    policy: str
    rule: str
    input: str
    expected: str
    """For people, such as `falls 10% within 2s`."""
    ratio: float
    """The same as a share of `before`: -0.1."""
    before: float
    after: float | None
    met: bool | None
    reason: str
    decided_ns: int
    """When the change was decided: its decisions have the same policy, rule and `at_ns`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """See the module docstring. `shadow` is what shadowed rules would hold; it never reaches an engine."""

    state: State
    leases: tuple[LeaseWish, ...]
    shadow: tuple[LeaseWish, ...]
    decisions: tuple[Decision, ...]
    notices: tuple[Notice, ...]
    effects: tuple[Effect, ...]
