"""`verify`: what a change was expected to do, beside what it did. Pure.

The input is read at the decision, and again `within` later; where the input's window is longer than what is
left of `within` after the value was in force, once all of the window lies after that moment. So the window
that is compared holds no sample from before the change. Nobody can say what a change did that the engine
never confirmed, or while which the offered load rose or another knob moved.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from kvpilot.policy.context import Context
from kvpilot.policy.expr import Reading
from kvpilot.policy.lease import Target
from kvpilot.policy.outcome import Effect
from kvpilot.policy.quantity import format_duration
from kvpilot.policy.rules import Policy, Rule, Verify
from kvpilot.policy.state import Check, Claim
from kvpilot.signals import Missing

LOAD_RISE = 1.1
"""More offered load than this much of what it was explains a missing effect."""
_MEASURED = ("prompt_bytes_per_token",)
"""Knobs by which the pilot tells valves what it measures: no effect comes from them."""
_ECHO = 0.01
"""How near an echo must be to count as the value: engines and valves round."""


def begin(
    reading: Reading | None, changed: tuple[tuple[Target, float], ...], context: Context
) -> Check | None:
    """Remember a change that is made now; None where its input is missing, or has no share to change by."""
    if not isinstance(reading, float | int) or not math.isfinite(reading):
        return None
    mine = {target for target, _ in changed}
    others = {target: value for target, value in context.values.items() if target not in mine}
    return Check(float(reading), context.now_ns, context.offered, changed, others)


def follow(check: Check, held: Mapping[Target, Claim], context: Context) -> Check:
    """What this tick shows of the change: that it is in force, that something else happened."""
    in_force_ns, confounded = check.in_force_ns, check.confounded
    if in_force_ns is None and context.now_ns > check.at_ns and _in_force(check, held, context):
        in_force_ns = context.now_ns
    if confounded is None:
        by = next((held[target].overruled_by for target, _ in check.changed if target in held), None)
        confounded = f"overruled by {by}" if by else _moved(check, context)
    if (in_force_ns, confounded) == (check.in_force_ns, check.confounded):
        return check
    return replace(check, in_force_ns=in_force_ns, confounded=confounded)


def is_due(check: Check, verify: Verify, now_ns: int) -> bool:
    """Whether the effect can be read now, or can never be."""
    if now_ns < check.at_ns + verify.within_ns:
        return False
    return check.in_force_ns is None or now_ns >= check.in_force_ns + verify.window_ns


def judge(policy: Policy, rule: Rule, check: Check, context: Context, reading: Reading | None) -> Effect:
    """The effect of the change that `check` remembers, which is due."""
    verify = rule.verify
    assert verify is not None, "only a rule with `verify` has a check"
    after = None if reading is None or isinstance(reading, Missing) or math.isnan(reading) else float(reading)
    reason = _inconclusive(check, context, verify)
    if reason is None and after is None:
        reason = f"{verify.input} is missing"
    if reason is not None:
        return _effect(policy, rule, verify, check, after, None, reason)
    assert after is not None, "else there is a reason"
    falls = verify.direction == "falls"
    bar = check.before * (1 - verify.ratio if falls else 1 + verify.ratio)
    met = after <= bar if falls else after >= bar
    return _effect(policy, rule, verify, check, after, met, "measured")


def abandon(policy: Policy, rule: Rule, check: Check, reason: str) -> Effect:
    """The effect of a change that will never be measured."""
    assert rule.verify is not None, "only a rule with `verify` has a check"
    return _effect(policy, rule, rule.verify, check, None, None, reason)


def _inconclusive(check: Check, context: Context, verify: Verify) -> str | None:
    """Why nobody can say whose the effect was; None where it can be said."""
    if check.in_force_ns is None:
        return "the engine did not confirm the change"
    if check.confounded is not None:
        return check.confounded
    before, after = check.offered, context.offered
    if isinstance(before, Missing) or isinstance(after, Missing):
        # To tell people of a missing effect needs no proof of whose it is; to undo something does.
        return "the offered load is not known" if verify.undo else None
    if after > before * LOAD_RISE:
        return f"offered load rose from {before:.4g} to {after:.4g} requests/s"
    return None


def _effect(
    policy: Policy,
    rule: Rule,
    verify: Verify,
    check: Check,
    after: float | None,
    met: bool | None,
    reason: str,
) -> Effect:
    expected = f"{verify.direction} {verify.ratio:.0%} within {format_duration(verify.within_ns)}"
    ratio = -verify.ratio if verify.direction == "falls" else verify.ratio
    return Effect(
        policy.name, rule.name, verify.input, expected, ratio, check.before, after, met, reason, check.at_ns
    )


def _in_force(check: Check, held: Mapping[Target, Claim], context: Context) -> bool:
    for target, value in check.changed:
        knob = context.knobs.get(target[0])
        if target in held:
            # A claim that follows something has moved on since.
            value = held[target].value
        if knob is None or target in context.unconfirmed:
            return False
        actual = context.value_in_force(knob, target[1])
        if not math.isclose(actual, value, rel_tol=_ECHO, abs_tol=_ECHO * knob.granularity):
            return False
    return True


def _moved(check: Check, context: Context) -> str | None:
    mine = {target for target, _ in check.changed}
    for target in dict.fromkeys((*check.others, *context.values)):
        knob = context.knobs.get(target[0])
        if knob is None or target in mine or knob.name in _MEASURED:
            continue
        was = check.others.get(target, knob.baseline)
        if context.values.get(target, knob.baseline) != was:
            return f"{target[0]} moved too"
    return None
