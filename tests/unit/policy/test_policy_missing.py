"""`onMissing: {fallback: ...}`: what a blind rule claims, for how long, and how it lets go."""

from policy_flight import GONE, HALVE, LOWEST, Flight, policy

from kvpilot.policy.state import Phase

FALLBACK = "onMissing: {fallback: {set: 256}}\n  holdFor: 3s"


def test_a_rule_that_goes_blind_claims_the_fallback_for_a_while() -> None:
    flight = Flight([policy(HALVE, spec=FALLBACK)])
    flight.fly(20, 3)
    assert flight.held() == 512
    flight.fly(GONE)
    assert flight.held() == 512, "cooldown holds for the fallback too"
    flight.fly(GONE, 9)
    assert flight.held() == 256
    assert flight.log[-1].reason == "fallback: load is missing (no_samples)"
    flight.fly(GONE, 20)
    assert (flight.phase(), flight.held()) == (Phase.ACTIVE, 256)
    flight.fly(GONE)
    assert (flight.phase(), flight.held()) == (Phase.INACTIVE, None)
    flight.fly(GONE, 50)
    assert flight.held() is None, "not again before it has seen"


def test_an_inactive_rule_falls_back_too_and_walks_home_when_it_sees() -> None:
    flight = Flight([policy(HALVE, spec=FALLBACK)])
    flight.fly(1, 3)
    flight.fly(GONE, 5)
    assert (flight.phase(), flight.held()) == (Phase.INACTIVE, 256)
    flight.fly(1)
    assert flight.held() == 256
    flight.fly(1, 5)
    assert flight.held() == 512
    flight.fly(1, 10)
    assert flight.held() is None


def test_a_rule_that_sees_trouble_again_goes_on_from_the_fallback() -> None:
    flight = Flight([policy(HALVE, spec=FALLBACK)])
    flight.fly(GONE, 5)
    flight.fly(20, 3)
    assert (flight.phase(), flight.held()) == (Phase.ACTIVE, 256)
    flight.fly(20, 10)
    assert flight.held() == 128


def test_without_recover_the_fallback_is_dropped_when_it_sees() -> None:
    flight = Flight([policy(HALVE.split("      recover")[0], spec=FALLBACK)])
    flight.fly(GONE, 5)
    flight.fly(1)
    assert flight.held() is None
    assert flight.log[-1].reason == "its inputs are back"


def test_a_value_by_knob_and_what_has_none_is_released() -> None:
    rule = """
    - name: both
      when: load > 10
      do:
        - {knob: prefill_chunk_tokens, set: 512}
        - {knob: shed_fraction, set: 0.5, scope: {classAtMost: 0}}
"""
    flight = Flight([policy(rule, spec="onMissing: {fallback: {set: {shed_fraction: 20%}}}")])
    flight.fly(20)
    assert (flight.held(), flight.held("shed_fraction", LOWEST)) == (512, 0.5)
    flight.fly(GONE)
    assert (flight.held(), flight.held("shed_fraction", LOWEST)) == (None, 0.2)
    assert [(d.knob, d.verdict) for d in flight.log[-2:]] == [
        ("prefill_chunk_tokens", "missing_input"),
        ("shed_fraction", "applied"),
    ]


def test_a_claim_that_follows_an_expression_falls_back_and_says_so() -> None:
    rule = "- {name: follow, when: load > 10, do: [{knob: prefill_chunk_tokens, set: 10 * seen}]}"
    flight = Flight([policy(rule, spec=FALLBACK)])
    flight.fly(20, seen=64)
    flight.fly(20, seen=GONE)
    assert flight.held() == 256
    assert flight.log[-1].reason == "fallback: seen is missing (no_samples)"
    flight.fly(20, seen=64)
    assert flight.held() == 640


def test_limits_hold_for_the_fallback_too() -> None:
    flight = Flight([policy(HALVE, spec=FALLBACK + "\n  limits: {maxChanges: 1, per: 60s}")])
    flight.fly(20, 3)
    flight.fly(GONE, 20)
    assert flight.held() == 512
    assert flight.verdicts()[-1] == "rate_limited"


def test_an_overruled_claim_does_not_fall_back() -> None:
    high = policy(
        "- {name: pin, when: seen > 5, do: [{knob: prefill_chunk_tokens, set: 2048}]}",
        "high",
        "priority: 200",
    )
    flight = Flight([policy(HALVE, spec=FALLBACK), high])
    flight.fly(20, 3)
    flight.fly(20, 2, seen=9.0)
    flight.fly(GONE, 15, seen=9.0)
    assert flight.state.rules["guard", "halve"].claims[0].value == 512
