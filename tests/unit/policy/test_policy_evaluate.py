"""The semantics, one by one, in virtual time: states, claims, missing inputs, limits, arming, orders."""

import pytest
from policy_flight import ALL, DRAFTS, GONE, HALVE, LOWEST, MS, SHED_RULE, Flight, policy

from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.context import Override
from kvpilot.policy.state import Phase


def test_the_whole_round() -> None:
    flight = Flight([policy(HALVE)])
    flight.fly(1, 3)
    assert (flight.phase(), flight.held(), flight.log) == (Phase.INACTIVE, None, [])
    flight.fly(20, 2)
    assert (flight.phase(), flight.held()) == (Phase.PENDING, None)
    flight.fly(20)
    assert (flight.phase(), flight.held()) == (Phase.ACTIVE, 512)
    flight.fly(20, 9)
    assert flight.held() == 512, "cooldown"
    flight.fly(20)
    assert flight.held() == 256
    flight.fly(20, 10)
    assert flight.held() == 128
    flight.fly(20, 10)
    assert flight.held() == 112, "100 is off the engine's grid: the nearest value inside the rule's bounds"
    flight.fly(7, 5)
    assert flight.phase() == Phase.ACTIVE, "between the two thresholds"
    flight.fly(1, 3)
    assert (flight.phase(), flight.held()) == (Phase.LEAVING, 112)
    flight.fly(1)
    assert (flight.phase(), flight.held()) == (Phase.INACTIVE, 112)
    flight.fly(1, 5)
    assert flight.held() == 368
    flight.fly(1, 14)
    assert flight.held() == 880
    flight.fly(1)
    assert flight.held() is None, "at baseline there is no claim"
    assert set(flight.verdicts()) == {"applied"}
    assert flight.log[-1].after is None
    assert flight.log[-1].reason == "recovered to baseline"


def test_pending_needs_when_throughout() -> None:
    flight = Flight([policy(HALVE)])
    for load in (20, 20, 1, 20, 20, GONE, 20, 20):
        flight.fly(load)
        assert flight.phase() in (Phase.INACTIVE, Phase.PENDING)
    assert flight.log == []


def test_leaving_needs_until_throughout_and_takes_no_step() -> None:
    flight = Flight([policy(HALVE)])
    flight.fly(20, 3)
    flight.fly(1, 2)
    assert flight.phase() == Phase.LEAVING
    flight.fly(7)
    assert flight.phase() == Phase.ACTIVE
    flight.fly(1, 10)
    assert flight.held() == 768
    assert [decision.after for decision in flight.log] == [512, 768]


def test_for_is_elapsed_time_and_not_a_count_of_ticks() -> None:
    flight = Flight([policy(HALVE)], tick_ms=1000)
    flight.fly(20, 2)
    assert flight.phase() == Phase.ACTIVE
    quick = Flight([policy(HALVE)], tick_ms=10)
    quick.fly(20, 20)
    assert quick.phase() == Phase.PENDING


def test_cooldown_counts_across_episodes_and_an_entry_inside_it_acts_when_it_ends() -> None:
    rule = HALVE.replace("1s", "5s").replace("keepFor: 300ms", "keepFor: 0s")
    flight = Flight([policy(rule)])
    flight.fly(20, 3)
    flight.fly(1, 10)
    assert flight.held() == 768
    flight.fly(20, 3)
    assert flight.phase() == Phase.ACTIVE
    assert flight.held() == 768, "still cooling down"
    assert flight.verdicts().count("cooling_down") == 1
    flight.fly(20, 36)
    assert flight.held() == 768
    flight.fly(20)
    assert flight.held() == 384, "five seconds after the first step"


def test_a_claim_is_renewed_through_cooldown_and_limits() -> None:
    flight = Flight([policy(HALVE, spec="limits: {maxChanges: 1, per: 60s}")])
    flight.fly(20, 3)
    for _ in range(100):
        flight.fly(20)
        assert flight.held() == 512
    assert flight.verdicts() == ["applied", "rate_limited"]


def test_limits_are_a_sliding_window() -> None:
    flight = Flight([policy(HALVE, spec="limits: {maxChanges: 2, per: 10s}")])
    flight.fly(20, 102)
    assert flight.held() == 256
    flight.fly(20, 1)
    assert flight.held() == 128, "ten seconds after the first step there is room for another"


def test_missing_releases_at_once() -> None:
    flight = Flight([policy(HALVE)])
    flight.fly(20, 3)
    flight.fly(GONE)
    assert (flight.phase(), flight.held()) == (Phase.INACTIVE, None)
    assert flight.log[-1].verdict == "missing_input"
    assert flight.log[-1].reason == "released: load is missing (no_samples)"
    assert flight.log[-1].inputs == {"load": GONE, "seen": 1.0}


def test_missing_holds_for_a_while_without_steps_then_releases() -> None:
    flight = Flight([policy(HALVE, spec="onMissing: hold\n  holdFor: 3s")])
    flight.fly(20, 3)
    flight.fly(GONE, 30)
    assert (flight.phase(), flight.held()) == (Phase.ACTIVE, 512)
    flight.fly(GONE)
    assert (flight.phase(), flight.held()) == (Phase.INACTIVE, None)
    assert flight.verdicts() == ["applied", "missing_input", "missing_input"]


def test_a_held_claim_goes_on_when_the_input_returns() -> None:
    flight = Flight([policy(HALVE, spec="onMissing: hold")])
    flight.fly(20, 3)
    flight.fly(GONE, 20)
    flight.fly(20)
    assert flight.held() == 256


def test_recovery_waits_while_blind() -> None:
    flight = Flight([policy(HALVE, spec="onMissing: hold")])
    flight.fly(20, 13)
    flight.fly(1, 4)
    flight.fly(GONE, 20)
    assert (flight.phase(), flight.held()) == (Phase.INACTIVE, 256)


def test_while_active_when_is_not_consulted() -> None:
    rule = HALVE.replace("until: load < 5", "until: seen < 5")
    flight = Flight([policy(rule)])
    flight.fly(20, 3, seen=9)
    flight.fly(GONE, 5, seen=9)
    assert flight.phase() == Phase.ACTIVE
    flight.fly(20, 1, seen=GONE)
    assert flight.phase() == Phase.INACTIVE


FOLLOW = """
    - name: follow
      when: load > 10
      do: [{knob: prefill_chunk_tokens, set: 10 * seen, min: 64, step: 32}]
"""


def test_a_set_expression_is_followed_every_tick() -> None:
    flight = Flight([policy(FOLLOW, spec="limits: {maxChanges: 1, per: 60s}")])
    flight.fly(20, seen=50)
    assert flight.held() == 480, "rounded to the protective side"
    flight.fly(20, seen=30)
    assert flight.held() == 288
    flight.fly(20, seen=3)
    assert flight.held() == 64
    flight.fly(20, seen=GONE)
    assert flight.held() is None
    assert [decision.after for decision in flight.log] == [480, None], "small moves within a second"


def test_a_followed_expression_is_journalled_once_a_second_and_where_it_settles() -> None:
    flight = Flight([policy(FOLLOW)])
    for tick in range(45):
        flight.fly(20, seen=40 + 4 * (tick % 5))
    flight.fly(20, 20, seen=64)
    rows = [(decision.at_ns // MS, decision.before, decision.after) for decision in flight.log]
    assert len(rows) <= 6
    assert rows[-1][2] == flight.held() == 640
    assert [row[1] for row in rows[1:]] == [row[2] for row in rows[:-1]], "each row goes on from the last"
    assert {decision.verdict for decision in flight.log} == {"applied"}


def test_a_followed_expression_that_leaps_is_journalled_at_once() -> None:
    flight = Flight([policy(FOLLOW)])
    flight.fly(20, seen=300)
    flight.fly(20, seen=30)
    flight.fly(20, seen=29)
    assert [decision.after for decision in flight.log] == [2976, 288]


def test_a_rule_whose_value_is_missing_does_not_enter() -> None:
    flight = Flight([policy(FOLLOW)])
    flight.fly(20, 5, seen=GONE)
    assert flight.phase("follow") == Phase.INACTIVE


def test_add_starts_from_the_value_in_force() -> None:
    flight = Flight([policy(HALVE)], values={("prefill_chunk_tokens", ALL): 600}, obeys=False)
    flight.fly(20, 3)
    assert flight.held() == 304, "300 on the engine's grid"


def test_a_scoped_claim_and_a_knob_whose_protective_side_is_up() -> None:
    flight = Flight([policy(SHED_RULE)])
    seen = []
    for _ in range(8):
        flight.fly(20)
        seen.append(flight.held("shed_fraction", LOWEST))
    assert seen == pytest.approx([0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0, 1.0])
    flight.fly(1, 20)
    assert flight.held("shed_fraction", LOWEST) is None


def test_the_engines_limits_clamp() -> None:
    narrow = ManifestKnob("prefill_chunk_tokens", "tokens", 700, 4096, 1024, 16, "per step")
    flight = Flight([policy(HALVE)], knobs=(narrow,))
    flight.fly(20, 3)
    assert flight.held() == 700
    assert flight.verdicts() == ["clamped"]


def test_an_engine_without_the_knob() -> None:
    flight = Flight([policy(HALVE)], knobs=(DRAFTS,))
    outcome = flight.fly(20, 30)
    assert (flight.verdicts(), outcome.leases) == (["unsupported"], ())


def test_a_higher_priority_wins_and_nothing_compounds_unseen() -> None:
    high = policy(
        "- {name: pin, when: load > 10, do: [{knob: prefill_chunk_tokens, set: 2048}]}",
        "high",
        "priority: 200",
    )
    flight = Flight([policy(HALVE), high])
    flight.fly(20, 60)
    assert flight.held() == 2048
    (claim,) = flight.state.rules["guard", "halve"].claims
    assert claim.overruled_by == "high/pin"
    assert claim.value == 1024, "half of the value in force when it began, and never stepped since"
    assert [d.verdict for d in flight.log if d.policy == "guard"] == ["overruled"]


def test_a_claim_holds_again_when_its_rival_goes() -> None:
    high = policy(
        "- {name: pin, when: load > 10 && seen > 5, do: [{knob: prefill_chunk_tokens, set: 2048}]}",
        "high",
        "priority: 200",
    )
    flight = Flight([policy(HALVE), high])
    flight.fly(20, 3)
    assert flight.held() == 512
    flight.fly(20, 3, seen=9)
    assert flight.held() == 2048
    flight.fly(20, 1)
    assert flight.held() == 512
    assert [d.verdict for d in flight.log if d.policy == "guard"] == ["applied", "overruled", "applied"]


LIMIT = "- {name: fit, protective: always, when: seen >= 0, do: [{knob: prefill_chunk_tokens, set: seen}]}"


def test_a_limit_tightens_and_never_loosens() -> None:
    limit = policy(LIMIT, "limit", "priority: 1000")
    flight = Flight([policy(HALVE), limit])
    flight.fly(1, seen=4000)
    assert flight.held() == 1024, "content with more than baseline, it holds baseline"
    flight.fly(20, 3, seen=4000)
    assert flight.held() == 512, "the latency rule is not overruled by a content limit"
    flight.fly(20, 1, seen=320)
    assert flight.held() == 320
    flight.fly(20, 30, seen=320)
    assert flight.state.rules["guard", "halve"].claims[0].value == 512, "overruled: no steps"
    flight.fly(20, 1, seen=4000)
    assert flight.held() == 512


def test_a_limit_is_armed_at_once_and_others_only_when_armed() -> None:
    flight = Flight([policy(HALVE), policy(LIMIT, "limit", "priority: 1000")])
    outcome = flight.fly(20, 20, seen=640, armed=False)
    assert [(lease.policy, lease.value) for lease in outcome.leases] == [("limit", 640)]
    assert outcome.shadow[0].policy == "guard"
    assert {d.verdict for d in flight.log if d.policy == "guard"} == {"shadowed"}
    flight.fly(20, 1, seen=4000)
    assert flight.phase() == Phase.PENDING, "what was worked out open loop is no basis for acting"
    flight.fly(20, 3, seen=4000)
    assert flight.held() == 512


def test_shadow_decides_records_and_never_actuates() -> None:
    flight = Flight([policy(HALVE, spec="mode: shadow")])
    for _ in range(30):
        assert flight.fly(20).leases == ()
    assert [d.verdict for d in flight.log] == ["shadowed"] * 3
    assert [d.after for d in flight.log] == [512, 256, 128]
    assert ["open_loop" in d.reason for d in flight.log] == [False, True, True]
    assert flight.last is not None
    assert flight.last.shadow[0].value == 128


def test_in_shadow_the_first_action_alone_is_comparable() -> None:
    """All of it, where it moves two knobs at once; not the way home."""
    rule = """
    - name: both
      when: load > 10
      cooldown: 300ms
      do:
        - {knob: prefill_chunk_tokens, multiply: 0.5}
        - {knob: shed_fraction, add: 0.1}
      recover: [{knob: prefill_chunk_tokens, add: 256, every: 100ms}]
"""
    flight = Flight([policy(rule, spec="mode: shadow")])
    flight.fly(20, 4)
    flight.fly(1, 2)
    assert [(d.knob, d.after, "open_loop" in d.reason) for d in flight.log] == [
        ("prefill_chunk_tokens", 512, False),
        ("shed_fraction", 0.1, False),
        ("prefill_chunk_tokens", 256, True),
        ("shed_fraction", 0.2, True),
        ("shed_fraction", None, False),
        ("prefill_chunk_tokens", 512, True),
    ]
    flight.fly(20)
    assert [("open_loop" in d.reason) for d in flight.log[-2:]] == [False, False], "another episode"


def test_off_withdraws_every_lease_within_one_tick() -> None:
    flight = Flight([policy(HALVE), policy(LIMIT, "limit", "priority: 1000")])
    flight.fly(20, 3, seen=200)
    order = Override("speculative_tokens", ALL, 0, 10**12, "why", "ada")
    assert len(flight.fly(20, seen=200, overrides=(order,)).leases) == 2
    assert flight.fly(20, seen=200, off=True, overrides=(order,)).leases == ()
    flight.fly(20, 20, seen=200, off=True)
    assert flight.last is not None
    assert flight.last.leases == ()
    flight.fly(20, 40, seen=4000)
    assert flight.held() is not None


def test_mode_off_is_not_evaluated() -> None:
    flight = Flight([policy(HALVE, spec="mode: off")])
    assert flight.fly(20, 20).state.rules == {}


def test_a_persons_order_outranks_every_policy_and_ends() -> None:
    flight = Flight([policy(HALVE), policy(LIMIT, "limit", "priority: 1000")])
    order = Override("prefill_chunk_tokens", ALL, 3000, 5000 * MS, "load test", "ada")
    flight.fly(20, 4, seen=640)
    outcome = flight.fly(20, 1, seen=640, overrides=(order,))
    assert [(o.value, o.policy, o.rule) for o in outcome.leases] == [(3008, "override", "ada")]
    assert outcome.leases[0].ttl_ns == 4600 * MS
    assert ("override", "applied", "load test") in [
        (d.policy, d.verdict, d.reason) for d in outcome.decisions
    ]
    assert ("limit", "overruled", "by override/ada") in [
        (d.policy, d.verdict, d.reason) for d in outcome.decisions
    ]
    flight.fly(20, 45, seen=640, overrides=(order,))
    assert flight.held() == 3008
    flight.fly(20, 1, seen=640, overrides=(order,))
    assert flight.held() == 320, "half of what the limit left; it took no step meanwhile"
    assert [d.reason for d in flight.log if d.policy == "override"] == ["load test", "the order ended"]


def test_an_order_displaces_claims_on_the_scopes_that_it_covers() -> None:
    flight = Flight([policy(SHED_RULE)])
    flight.fly(20, 3)
    outcome = flight.fly(20, overrides=(Override("shed_fraction", ALL, 0, 10**12, "open", "ada"),))
    assert [(lease.scope, lease.value) for lease in outcome.leases] == [(ALL, 0)]


def test_an_overruled_claim_that_is_dropped_applies_nothing() -> None:
    high = policy(
        "- {name: pin, when: seen > 5, do: [{knob: prefill_chunk_tokens, set: 2048}]}",
        "high",
        "priority: 200",
    )
    flight = Flight([policy(HALVE.split("      recover")[0]), high])
    flight.fly(20, 3, seen=9)
    flight.fly(1, 5, seen=9)
    assert [d.verdict for d in flight.log if d.policy == "guard"] == ["overruled", "overruled"]


def test_whoever_comes_to_hold_a_knob_without_a_step_says_so() -> None:
    """A limit is never overruled, and two rules may ask for one value: the lease changes hands anyhow."""
    limit = policy(
        "- {name: fit, protective: always, when: seen >= 0, do: [{knob: prefill_chunk_tokens, set: 600}]}",
        "limit",
        "priority: 1000",
    )
    flight = Flight([policy(HALVE.split("      recover")[0]), limit])
    flight.fly(1)
    flight.fly(20, 3)
    assert flight.held() == 304
    flight.fly(1, 4)
    assert flight.held() == 608
    last = flight.log[-1]
    assert (last.policy, last.after, last.reason) == ("limit", 608, "holds the knob again")


def test_notices() -> None:
    rule = HALVE + "      notify: {receiver: oncall, severity: critical, summary: too much}\n"
    flight = Flight([policy(rule)])
    notices = []
    for load in [20] * 5 + [1] * 6:
        notices += flight.fly(load).notices
    assert [(n.receiver, n.severity, n.summary, n.firing) for n in notices] == [
        ("oncall", "critical", "too much", True),
        ("oncall", "critical", "too much", False),
    ]
    flight.fly(20, 3)
    flight.policies = []
    assert [n.firing for n in flight.fly(20).notices] == [False], "a rule that is gone is over"


def test_the_effect_is_measured_beside_what_was_expected() -> None:
    rule = HALVE + "      verify: {input: load, falls: 10%, within: 500ms}\n"
    flight = Flight([policy(rule)])
    effects = []
    for load in [20] * 8 + [15] * 5 + [14.8] * 10 + [GONE] * 10:
        effects += flight.fly(load).effects
    assert [(e.before, e.after, e.met) for e in effects] == [
        (20, 20, False),
        (15, 14.8, False),
        (14.8, None, None),
    ]
    assert effects[0].expected == "falls 10% within 500ms"


def test_what_an_order_or_rule_may_hold_is_on_the_engines_grid() -> None:
    flight = Flight([policy(HALVE)])
    outcome = flight.fly(1, overrides=(Override("prefill_chunk_tokens", ALL, 99999, 10**12, "", "ada"),))
    assert outcome.leases[0].value == 4096
    unknown = Override("max_running", ALL, 1, 10**12, "", "ada")
    assert flight.fly(1, overrides=(unknown,)).leases == ()


def test_a_limit_is_exempt_from_the_policys_limits() -> None:
    rule = """
    - name: fit
      protective: always
      when: load > 10
      cooldown: 100ms
      do: [{knob: prefill_chunk_tokens, multiply: 0.5}]
"""
    flight = Flight([policy(rule, spec="priority: 1000\n  limits: {maxChanges: 1, per: 60s}")])
    flight.fly(20, 3)
    assert flight.held() == 128
