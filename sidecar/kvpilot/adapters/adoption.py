"""A pilot that starts beside a flying engine takes over the leases that an earlier pilot left in force.

A lease is adopted if the journal knows its decision, that was made for this very start of the engine, and
the policy and rule behind it still exist and still act on that knob; all others are withdrawn by not being
renewed. An adopted lease is renewed as it is until the rule can see its inputs (fresh windows are empty for
a while, and missing would release it at once); then it becomes the rule's own claim and the rule goes on
from there. After `GRACE_NS` it is dropped.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from kvpilot.adapters.actuator import Target
from kvpilot.adapters.engine import Sight
from kvpilot.adapters.pages import Controls
from kvpilot.clock import NS
from kvpilot.journal.records import DecisionRecord
from kvpilot.link.controls import Lease
from kvpilot.link.fields import KNOB_PREFIX
from kvpilot.policy.context import Context
from kvpilot.policy.evaluate import NOT_PROVIDED, Inputs
from kvpilot.policy.grid import place
from kvpilot.policy.lease import LeaseWish
from kvpilot.policy.rules import Policy, PolicySet, Rule
from kvpilot.policy.sight import sees
from kvpilot.policy.state import Claim, Phase, RuleState, State
from kvpilot.policy.trail import Told

GRACE_NS = 10 * NS


@dataclass(frozen=True, slots=True)
class Adopted:
    """One lease waiting for its rule to see."""

    wish: LeaseWish
    number: int
    since_ns: int

    @property
    def target(self) -> Target:
        return self.wish.knob, self.wish.scope


def adopt(
    leases: Iterable[Lease],
    decision: Callable[[int], DecisionRecord | None],
    policies: PolicySet,
    nonce: int,
    now_ns: int,
) -> list[Adopted]:
    """Those of `leases`, which must be in force, that a rule of `policies` can go on from."""
    adopted = []
    for lease in leases:
        row = decision(lease.decision_id)
        found = _find(policies, row.policy, row.rule) if row is not None else None
        if row is None or found is None or (row.knob, row.engine_nonce) != (lease.knob, nonce):
            continue
        if found[1].action_on(lease.knob, lease.scope) is not None:
            wish = LeaseWish(lease.knob, lease.scope, lease.value, lease.ttl_ns, row.policy, row.rule)
            adopted.append(Adopted(wish, lease.decision_id, now_ns))
    return adopted


def hand_over(
    adopted: list[Adopted], state: State, policies: PolicySet, inputs: Inputs, context: Context
) -> tuple[list[Adopted], State]:
    """What still waits, and the state with the claims of those rules that can see now."""
    waiting, rules, told = [], dict(state.rules), dict(state.told)
    now_ns = context.now_ns
    for each in adopted:
        key = (each.wish.policy, each.wish.rule)
        found = _find(policies, *key)
        if found is None or now_ns - each.since_ns > GRACE_NS:
            continue
        policy, rule = found
        old = rules.get(key, RuleState(rule.identity))
        if any((claim.knob, claim.scope) == each.target for claim in old.claims):
            # The rule has gone on by itself, to its fallback for instance.
            continue
        seen = {name: inputs.get((policy.name, name), NOT_PROVIDED) for name in policy.inputs}
        if not sees(rule, seen, context):
            waiting.append(each)
            continue
        action, knob = rule.action_on(*each.target), context.knobs.get(each.wish.knob)
        if action is None or knob is None:
            continue
        claim = Claim(each.wish.knob, each.wish.scope, place(each.wish.value, action, knob).value)
        if old.phase is Phase.INACTIVE:
            old = replace(old, phase=Phase.ACTIVE, since_ns=now_ns, changed_ns=now_ns, steps=1)
        rules[key] = replace(old, claims=(*old.claims, claim))
        # The decision behind it is in the journal, and stays the one that the lease names.
        told[each.target] = Told(*key, each.wish.value, now_ns)
    return waiting, replace(state, rules=rules, told=told) if rules != state.rules else state


def renewed(adopted: Iterable[Adopted], leases: tuple[LeaseWish, ...]) -> tuple[LeaseWish, ...]:
    """`leases` and the adopted ones that nothing else holds."""
    held = {(lease.knob, lease.scope) for lease in leases}
    return (*leases, *(each.wish for each in adopted if (each.wish.knob, each.wish.scope) not in held))


def _find(policies: PolicySet, policy: str, rule: str) -> tuple[Policy, Rule] | None:
    for each in policies.policies:
        if each.name == policy and each.mode == "enforce":
            return next(((each, one) for one in each.rules if one.name == rule), None)
    return None


def left_in_force(controls: Controls, sight: Sight) -> list[Lease]:
    """Leases that an earlier pilot left and that the engine, or every valve, still obeys by its own word."""
    leases = []
    left = controls.engine_left
    if left is not None and left.nonce == sight.nonce and sight.record is not None and sight.manifest:
        for lease in left.leases:
            knob = sight.manifest.knob(lease.knob)
            if knob is not None and sight.record.get(KNOB_PREFIX + lease.knob) == knob.snap(lease.value):
                leases.append(lease)
    obeyed = sight.valve.obeyed if sight.valve is not None else {}
    for lease in controls.valve_left.leases if controls.valve_left is not None else ():
        if obeyed.get((lease.knob, lease.scope)) == lease.value:
            leases.append(lease)
    return leases
