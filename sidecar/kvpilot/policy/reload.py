"""What a rule goes on from when something around it changed: its text, its policy's mode, who may act.

- Unchanged: its state. Changed: inactive, with the claims that the new text knows how to walk home, clamped
  to its bounds. Removed, or switched off: its claims are withdrawn.
- Into shadow or out of it: afresh, because what was worked out open loop is no basis for acting, nor the
  other way round. What limits it (its last step, a suspension) is not forgotten, on either side.
"""

from dataclasses import dataclass, replace

from kvpilot.policy.context import Context
from kvpilot.policy.grid import place
from kvpilot.policy.notice import Notice
from kvpilot.policy.rules import Rule
from kvpilot.policy.state import Claim, RuleState


@dataclass(frozen=True, slots=True)
class Restart:
    """The state to go on from, and what ends with the one before: claims, each with why, and notices."""

    state: RuleState | None
    withdrawn: tuple[tuple[Claim, str], ...]
    over: tuple[Notice, ...]


def goes_on(state: RuleState | None, rule: Rule, shadow: bool) -> bool:
    """Whether nothing changed for this rule: it keeps `state`."""
    return state is not None and state.shadow is shadow and state.identity == rule.identity


def restart(state: RuleState | None, rule: Rule, shadow: bool, context: Context) -> Restart:
    """Where `goes_on` is false: what to begin with."""
    if state is None:
        return Restart(RuleState(rule.identity, since_ns=context.now_ns, shadow=shadow), (), ())
    if state.shadow is not shadow:
        reason = "into shadow: off, not armed, or the engine is gone" if shadow else "out of shadow"
        withdrawn = tuple((claim, reason) for claim in state.claims)
        return Restart(_crossed(state, rule, shadow, context.now_ns), withdrawn, _over(state))
    return _changed(state, rule, context)


def retire(state: RuleState) -> Restart:
    """The rule is no longer there."""
    withdrawn = tuple((claim, "the rule was removed or switched off") for claim in state.claims)
    return Restart(None, withdrawn, _over(state))


def park(state: RuleState, rule: Rule) -> Restart:
    """The rule is switched off: nothing of it is left but what will limit it when it is switched on again."""
    gone = retire(state)
    shadowed = state if state.shadow else _crossed(state, rule, True, 0)
    # Kept on the shadowed side: switched on to act, it crosses over, and finds its own last step there.
    parked = RuleState(
        rule.identity,
        shadow=True,
        changed_ns=shadowed.changed_ns,
        apart_ns=shadowed.apart_ns,
        undos=shadowed.undos,
        suspended_ns=shadowed.suspended_ns,
    )
    remembers = parked.changed_ns is not None or parked.apart_ns is not None
    return Restart(parked if remembers else None, gone.withdrawn, gone.over)


def _crossed(state: RuleState, rule: Rule, shadow: bool, now_ns: int) -> RuleState:
    """Afresh on the other side; each side has its own last step."""
    same = state.identity == rule.identity
    return RuleState(
        rule.identity,
        since_ns=now_ns,
        shadow=shadow,
        changed_ns=state.apart_ns,
        apart_ns=state.changed_ns,
        undos=state.undos if same else 0,
        suspended_ns=state.suspended_ns if same else None,
    )


def _changed(state: RuleState, rule: Rule, context: Context) -> Restart:
    """Another text: inactive, with the claims that it knows how to walk home."""
    kept, withdrawn = list[Claim](), list[tuple[Claim, str]]()
    for claim in state.claims:
        action, recover = rule.action_on(claim.knob, claim.scope), rule.recover_of(claim.knob, claim.scope)
        knob = context.knobs.get(claim.knob)
        if action is None or recover is None or knob is None:
            withdrawn.append((claim, "the rule's text changed"))
            continue
        value = place(claim.value, action, knob).value
        kept.append(replace(claim, value=value, recover_at_ns=context.now_ns + recover.every_ns))
    state_now = RuleState(
        rule.identity,
        since_ns=context.now_ns,
        shadow=state.shadow,
        claims=tuple(kept),
        changed_ns=state.changed_ns,
        apart_ns=state.apart_ns,
    )
    return Restart(state_now, tuple(withdrawn), _over(state))


def _over(state: RuleState) -> tuple[Notice, ...]:
    """A rule that starts afresh is no longer firing."""
    firing = [notice for notice in (state.notified, state.disappointed) if notice is not None]
    return tuple(replace(notice, firing=False) for notice in firing)
