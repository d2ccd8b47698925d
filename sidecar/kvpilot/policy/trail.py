"""The trail: which values of a claim that follows an expression are worth a row in the journal.

Such a claim may move with every tick; a row for each would bury the decisions that people look for. The trail
has where a rule took the knob, every move of a fifth of the claim's range at once, and otherwise where the
claim has got to once a second. So the newest row is never more than a second, nor a fifth, behind the truth.
"""

from typing import NamedTuple

from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.rules import Action

TELL_AFTER_NS = 1_000_000_000
TELL_SHARE = 0.2


class Told(NamedTuple):
    """What the journal last said of a lease: who holds it, at which value, and when that was said."""

    policy: str
    rule: str
    value: float
    at_ns: int


def worth_telling(told: Told, value: float, now_ns: int, action: Action, knob: ManifestKnob) -> bool:
    """Whether a lease that its rule has moved to `value` since `told` belongs in the journal now."""
    if value == told.value:
        return False
    range_ = min(action.maximum, knob.maximum) - max(action.minimum, knob.minimum)
    return now_ns - told.at_ns >= TELL_AFTER_NS or abs(value - told.value) >= TELL_SHARE * range_
