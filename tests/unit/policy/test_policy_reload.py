"""Reload, shadow and off: what a rule keeps, what it starts afresh with, what is never forgotten."""

import pytest
from policy_flight import HALVE, SHED_RULE, Flight, policy

from kvpilot.policy.load import load_text
from kvpilot.policy.state import Phase

FOLLOW = """
    - name: follow
      when: load > 10
      do: [{knob: prefill_chunk_tokens, set: 10 * seen, min: 64, step: 32}]
"""


def test_a_removed_rule_is_withdrawn() -> None:
    flight = Flight([policy(HALVE)])
    flight.fly(20, 3)
    flight.policies = []
    assert flight.fly(20).leases == ()
    assert flight.log[-1].reason == "the rule was removed or switched off"


def test_a_changed_rule_starts_afresh_and_walks_its_claim_home() -> None:
    flight = Flight([policy(HALVE)])
    flight.fly(20, 3)
    flight.policies = [policy(HALVE.replace("load > 10", "load > 30"))]
    flight.fly(20, 5)
    assert (flight.phase(), flight.held()) == (Phase.INACTIVE, 512)
    flight.fly(20, 1)
    assert (flight.phase(), flight.held()) == (Phase.INACTIVE, 768)
    flight.fly(20, 5)
    assert flight.held() is None


@pytest.mark.parametrize(
    "rule",
    [
        HALVE.replace("load < 5", "seen < 5"),
        FOLLOW,
        HALVE + "      verify: {input: seen, falls: 10%, within: 2s}\n",
    ],
    ids=["until", "set", "verify"],
)
def test_an_input_that_a_rule_names_anywhere_is_part_of_its_identity(rule: str) -> None:
    (one,) = policy(rule).rules
    text = policy(rule, spec="onMissing: hold").rules[0]
    assert one.identity == text.identity, "the policy's own settings are not"
    other = load_text(
        f"""
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {{name: guard}}
spec:
  inputs:
    load: {{signal: requests_waiting}}
    seen: {{signal: requests_running, agg: max, window: 5s}}
  rules:
    {rule}
"""
    )
    assert other.rules[0].identity != one.identity


def test_a_changed_rules_claim_is_clamped_to_its_new_bounds_at_once() -> None:
    flight = Flight([policy(HALVE)])
    flight.fly(20, 13)
    assert flight.held() == 256
    flight.policies = [policy(HALVE.replace("min: 100", "min: 400").replace("for: 200ms", "for: 0s"))]
    flight.fly(20)
    assert (flight.phase(), flight.held()) == (Phase.ACTIVE, 400)


def test_a_changed_rule_in_shadow_withdraws_nothing_real() -> None:
    flight = Flight([policy(HALVE, spec="mode: shadow")])
    flight.fly(20, 3)
    changed = HALVE.replace("load > 10", "load > 30").split("      recover")[0]
    flight.policies = [policy(changed, spec="mode: shadow")]
    flight.fly(20)
    assert flight.verdicts() == ["shadowed", "shadowed"]


def test_an_unchanged_rule_keeps_its_state_over_a_reload() -> None:
    flight = Flight([policy(HALVE)])
    flight.fly(20, 3)
    flight.policies = [policy(HALVE), policy(SHED_RULE, "new")]
    flight.fly(20, 1)
    assert (flight.phase(), flight.held()) == (Phase.ACTIVE, 512)


TOP = """
    - name: hog
      when: load > 10
      do: [{knob: shed_fraction, add: 0.25, scope: {tenant: top}}]
      recover: [{knob: shed_fraction, add: -0.25, every: 500ms}]
"""


def test_a_changed_rule_on_the_top_tenant_walks_that_tenants_claim_home() -> None:
    flight = Flight([policy(TOP)])
    flight.fly(20, 15, top_tenant="acme")
    flight.policies = [policy(TOP.replace("load > 10", "load > 30"))]
    seen = [[lease.value for lease in flight.fly(20, top_tenant="other").leases] for _ in range(12)]
    assert seen == [[0.5]] * 5 + [[0.25]] * 5 + [[]] * 2


def test_a_changed_rule_forgets_its_suspension_and_its_check_but_not_its_cooldown() -> None:
    undo = HALVE.replace("1s", "5s") + "      verify: {input: seen, falls: 10%, within: 1s, else: undo}\n"
    flight = Flight([policy(undo)])
    flight.fly(20, 14, offered=1.0)
    assert flight.verdicts()[-1] == "suspended"
    flight.policies = [policy(undo.replace("load > 10", "load > 9"))]
    flight.fly(20, 4, offered=1.0)
    assert flight.phase() is Phase.ACTIVE
    assert flight.held() is None, "still cooling down from the step that was undone"


@pytest.mark.parametrize("change", ["shadow", "off", "disarmed", "order"])
def test_what_limits_a_rule_is_not_forgotten_across_shadow_and_off(change: str) -> None:
    """A step at 200 ms, two in all per minute: neither a while in shadow nor being switched off buys more."""
    rule = HALVE.replace("cooldown: 1s", "cooldown: 20s")
    limits = "limits: {maxChanges: 2, per: 60s}"
    flight = Flight([policy(rule, spec=limits)])
    flight.fly(20, 3)
    context: dict[str, object] = {}
    if change in ("shadow", "off"):
        flight.policies = [policy(rule, spec=f"mode: {change}\n  {limits}")]
    else:
        context = {"armed": False} if change == "disarmed" else {"off": True}
    flight.fly(20, 50, **context)
    flight.policies = [policy(rule, spec=limits)]
    taken = []
    for _ in range(700):
        decisions = flight.fly(20).decisions
        taken += [d.at_ns // 10**8 for d in decisions if d.verdict == "applied" and d.after is not None]
    assert taken == [202, 602], "cooldown from the first step; then the first step leaves the window"


def test_a_step_in_shadow_costs_nothing_real() -> None:
    rule = HALVE.replace("cooldown: 1s", "cooldown: 20s")
    flight = Flight([policy(rule, spec="limits: {maxChanges: 1, per: 60s}")])
    flight.fly(20, 5, armed=False)
    assert flight.verdicts() == ["shadowed"]
    flight.fly(20, 3)
    assert flight.held() == 512


def test_a_policy_that_is_gone_leaves_nothing_behind() -> None:
    flight = Flight([policy(HALVE, spec="limits: {maxChanges: 1, per: 60s}")])
    flight.fly(20, 3)
    flight.policies = []
    flight.fly(20, 2)
    assert (dict(flight.state.rules), dict(flight.state.steps_ns)) == ({}, {})


def test_shadowed_claims_arbitrate_among_themselves_on_a_virtual_knob() -> None:
    """The second shadowed rule starts from what the first would hold, not from what the engine is at."""
    first = policy(HALVE, "first", "mode: shadow\n  priority: 5")
    second = policy(HALVE.replace("for: 200ms", "for: 300ms"), "second", "mode: shadow\n  priority: 9")
    flight = Flight([first, second])
    outcome = flight.fly(20, 5)
    assert outcome.leases == ()
    assert [(wish.policy, wish.value) for wish in outcome.shadow] == [("second", 256)]
    (claim,) = flight.state.rules["first", "halve"].claims
    assert (claim.value, claim.overruled_by) == (512, "second/halve")
    assert flight.values == {}
