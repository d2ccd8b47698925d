"""Where a wished-for value may lie: on the rule's step, in its bounds, on the engine's grid, in its limits.

The engine snaps whatever it is given, so a value it would move is never claimed: the result is always a fixed
point of `ManifestKnob.snap`. The engine's limits win over the rule's bounds where the two do not meet.
"""

import math
from typing import NamedTuple

from kvpilot.knobs import KNOBS
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.rules import Action, Recover

# Multiples of a decimal step are off by a few ulps: 3 * 0.05 / 0.05 must count as 3, not be ceiled to 4.
_TOLERANCE = 1e-9


class Placed(NamedTuple):
    """A value that can be claimed; `clamped` when the engine's limits kept it from the wish."""

    value: float
    clamped: bool


def protective_first(knob: str, value: float) -> float:
    """A sort key: the more protective the value, the smaller the key."""
    return value if KNOBS[knob].protective == "lower" else -value


def place(wish: float, action: Action, knob: ManifestKnob) -> Placed:
    """The claim for `wish`: rounded to the protective side, then the bounds, then the engine's limits."""
    value = wish
    if action.step is not None and math.isfinite(wish):
        multiple = wish / action.step
        lower = KNOBS[action.knob].protective == "lower"
        whole = math.floor(multiple + _TOLERANCE) if lower else math.ceil(multiple - _TOLERANCE)
        value = whole * action.step
    value = min(max(value, action.minimum), action.maximum)
    return Placed(_representable(value, action, knob), not knob.minimum <= value <= knob.maximum)


def stride(value: float, wish: float, action: Action, knob: ManifestKnob) -> Placed:
    """The claim one step from `value` towards `wish`: at least one place on the grid, if there is one.

    Or a knob of whole numbers would stay where a small step rounds to nothing: 1 times 0.6 is 1 again.
    """
    placed = place(wish, action, knob)
    if placed.value != value or wish == value:
        return placed
    size = max(knob.granularity, action.step or 0.0)
    further = place(value + math.copysign(size, wish - value), action, knob)
    return further if (further.value - value) * (wish - value) > 0 else placed


def recover_step(value: float, recover: Recover, action: Action, knob: ManifestKnob) -> float | None:
    """The claim one step nearer to baseline; None at baseline, or if no nearer value can be claimed."""
    sign = math.copysign(1.0, knob.baseline - value)
    for size in (abs(recover.add), max(abs(recover.add), knob.granularity, action.step or 0.0)):
        wish = value + sign * size
        if (knob.baseline - wish) * sign <= 0:
            return None
        claim = place(wish, action, knob).value
        if value * sign < claim * sign < knob.baseline * sign:
            return claim
    return None


def _representable(value: float, action: Action, knob: ManifestKnob) -> float:
    snapped = knob.snap(value)
    if action.minimum <= snapped <= action.maximum:
        return snapped
    inward = knob.granularity if snapped < action.minimum else -knob.granularity
    for candidate in (knob.snap(snapped + inward), knob.minimum, knob.maximum):
        if action.minimum <= candidate <= action.maximum:
            return candidate
    return snapped
