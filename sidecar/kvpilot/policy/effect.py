"""`verify`: what a change was expected to do, beside what it did. Pure.

The input is read at the step and again `within` later. Its window may still hold samples from before the
step, so a window longer than `within` shows less than the whole effect.
"""

from kvpilot.policy.expr import Reading
from kvpilot.policy.outcome import Effect
from kvpilot.policy.quantity import format_duration
from kvpilot.policy.rules import Policy, Rule
from kvpilot.policy.state import Check
from kvpilot.signals import Missing


def judge(policy: Policy, rule: Rule, check: Check, reading: Reading | None, reason: str) -> Effect:
    """The effect of the step that `check` remembers; not met and not failed where there is no reading."""
    verify = rule.verify
    assert verify is not None, "only a rule with `verify` has a check"
    after = None if reading is None or isinstance(reading, Missing) else float(reading)
    met = None
    if after is not None:
        falls = verify.direction == "falls"
        bar = check.before * (1 - verify.ratio if falls else 1 + verify.ratio)
        met = after <= bar if falls else after >= bar
    expected = f"{verify.direction} {verify.ratio:.0%} within {format_duration(verify.within_ns)}"
    return Effect(policy.name, rule.name, verify.input, expected, check.before, after, met, reason)
