"""`verify`: the effect of a change, when nobody can say, whom it tells, and what it undoes."""

import pytest
from policy_flight import ALL, GONE, HALVE, Flight, policy

from kvpilot.policy.expr import Reading
from kvpilot.policy.outcome import Effect
from kvpilot.policy.state import Phase

ALERT = (
    HALVE.replace("cooldown: 1s", "cooldown: 60s") + "      verify: {input: seen, falls: 10%, within: 1s}\n"
)
UNDO = ALERT.replace("within: 1s", "within: 1s, else: undo")
DRAFTS = policy("- {name: other, when: seen > 1000, do: [{knob: speculative_tokens, set: 0}]}", "other")


def effects(flight: Flight, seen: list[Reading], load: float = 20.0, **context: object) -> list[Effect]:
    found: list[Effect] = []
    context.setdefault("offered", 10.0)
    for value in seen:
        found += flight.fly(load, seen=value, **context).effects
    return found


def undone(rule: str = UNDO, **kwargs: object) -> Flight:
    """A flight whose only change, at 200 ms, had no effect."""
    flight = Flight([policy(rule)], **kwargs)
    assert [effect.met for effect in effects(flight, [100.0] * 13)] == [False]
    return flight


@pytest.mark.parametrize(("after", "met"), [(90.0, True), (91.0, False)])
def test_expected_beside_realised(after: float, met: bool) -> None:
    flight = Flight([policy(ALERT)])
    (effect,) = effects(flight, [100.0] * 5 + [after] * 8)
    assert (effect.before, effect.after, effect.met) == (100, after, met)
    assert (effect.expected, effect.reason) == ("falls 10% within 1s", "measured")


def test_a_window_is_compared_only_once_all_of_it_lies_after_the_change() -> None:
    """The input looks back a second: `within` alone would still see half a second from before."""
    rule = ALERT.replace("within: 1s", "within: 500ms")
    flight = Flight([policy(rule, seen="{signal: requests_running, agg: mean, window: 1s}")])
    flight.fly(20, 3, seen=100.0, offered=1.0)
    found = [(tick, flight.fly(20, seen=100.0, offered=1.0).effects) for tick in range(3, 20)]
    assert [tick for tick, effects in found if effects] == [13], "in force at 300 ms, and a second later"


def test_a_change_that_the_engine_never_confirms_is_never_judged() -> None:
    flight = Flight([policy(ALERT)])
    (effect,) = effects(flight, [100.0] * 13, unconfirmed=(("prefill_chunk_tokens", ALL),))
    assert (effect.met, effect.reason) == (None, "the engine did not confirm the change")
    flight = Flight([policy(ALERT)], obeys=False)
    (effect,) = effects(flight, [100.0] * 13)
    assert effect.met is None


def test_a_missing_effect_tells_people_and_a_later_one_reassures_them() -> None:
    flight = Flight([policy(ALERT.replace("60s", "2s"))])
    told = []
    for tick in range(60):
        notices = flight.fly(20, seen=100.0 if tick < 25 else 100.0 - tick, offered=1.0).notices
        told += [(tick, n.about, n.receiver, n.severity, n.firing) for n in notices]
    assert told == [(12, "effect", "", "warning", True), (32, "effect", "", "warning", False)]


def test_who_is_told_is_the_rules_receiver_and_it_is_over_with_the_rule() -> None:
    rule = ALERT + "      notify: {receiver: oncall, severity: critical}\n"
    flight = Flight([policy(rule)])
    effects(flight, [100.0] * 13)
    notices = [notice for _ in range(10) for notice in flight.fly(1, seen=100.0).notices]
    assert [(n.about, n.receiver, n.firing) for n in notices] == [
        ("effect", "oncall", False),
        ("state", "oncall", False),
    ]


def test_undo_drops_the_claim_and_suspends_the_rule() -> None:
    flight = undone()
    assert (flight.phase(), flight.held()) == (Phase.INACTIVE, None)
    assert flight.log[-2].verdict == "undone"
    assert flight.log[-2].reason == (
        "seen went from 100 to 100, expected falls 10% within 1s: suspended for 1s"
    )
    assert (flight.log[-1].verdict, flight.log[-1].reason) == ("suspended", "suspended for 1s more")
    flight.fly(20, 9, seen=100.0)
    assert flight.phase() is Phase.INACTIVE
    flight.fly(20, 3, seen=100.0)
    assert flight.phase() is Phase.ACTIVE


def test_each_undo_suspends_for_twice_as_long_and_ten_minutes_at_most() -> None:
    rule = UNDO.replace("cooldown: 60s", "cooldown: 1s").replace("for: 200ms", "for: 0s")
    flight = Flight([policy(rule)], tick_ms=1000)
    spans = []
    for _ in range(4000):
        outcome = flight.fly(20, seen=100.0, offered=1.0)
        spans += [d.reason.rpartition(" for ")[2] for d in outcome.decisions if d.verdict == "undone"]
    assert spans[:11] == ["1s", "2s", "4s", "8s", "16s", "32s", "64s", "128s", "256s", "512s", "10m"]
    assert set(spans[11:]) == {"10m"}


def test_an_effect_that_comes_forgets_the_undos_before() -> None:
    rule = UNDO.replace("cooldown: 60s", "cooldown: 1s").replace("for: 200ms", "for: 0s")
    flight = Flight([policy(rule)])
    found = [flight.fly(20, seen=100.0, offered=1.0) for _ in range(11)]
    assert flight.state.rules["guard", "halve"].undos == 1
    for tick in range(60):
        found.append(flight.fly(20, seen=100.0 * 0.8**tick, offered=1.0))
    assert flight.state.rules["guard", "halve"].undos == 0


@pytest.mark.parametrize(
    ("offered", "why"),
    [
        (11.01, "offered load rose from 10 to 11.01 requests/s"),
        (GONE, "the offered load is not known"),
    ],
)
def test_more_load_makes_a_missing_effect_inconclusive(offered: Reading, why: str) -> None:
    flight = Flight([policy(UNDO)])
    effects(flight, [100.0] * 5)
    (effect,) = effects(flight, [100.0] * 8, offered=offered)
    assert (effect.met, effect.reason) == (None, why)
    assert flight.held() == 512
    assert flight.log[-1].verdict == "inconclusive"
    assert flight.log[-1].reason == f"not undone: {why}"


@pytest.mark.parametrize("after", [float("nan"), GONE])
def test_nothing_is_undone_for_an_effect_that_nobody_can_read(after: Reading) -> None:
    flight = Flight([policy(UNDO)])
    (effect,) = effects(flight, [100.0] * 5 + [after] * 8)
    assert (effect.met, effect.after, effect.reason) == (None, None, "seen is missing")
    assert flight.held() == 512


@pytest.mark.parametrize("before", [float("nan"), float("inf"), GONE])
def test_a_change_that_has_no_before_has_no_effect(before: Reading) -> None:
    flight = Flight([policy(UNDO)])
    assert effects(flight, [before] * 5 + [100.0] * 20) == []
    assert flight.held() == 512


def test_a_tenth_more_load_explains_nothing() -> None:
    flight = Flight([policy(UNDO)])
    effects(flight, [100.0] * 5)
    assert [effect.met for effect in effects(flight, [100.0] * 8, offered=11.0)] == [False]


def test_another_knob_that_moves_makes_it_inconclusive() -> None:
    flight = Flight([policy(UNDO), DRAFTS])
    assert effects(flight, [100.0] * 5) == []
    assert effects(flight, [1001.0]) == []
    (effect,) = effects(flight, [100.0] * 7)
    assert (effect.met, effect.reason) == (None, "speculative_tokens moved too")
    assert flight.held() == 512


def test_an_overruled_change_is_inconclusive() -> None:
    high = policy(
        "- {name: pin, when: seen > 1000, do: [{knob: prefill_chunk_tokens, set: 64}]}", "p", "priority: 200"
    )
    flight = Flight([policy(UNDO), high])
    effects(flight, [100.0] * 5 + [1001.0])
    (effect,) = effects(flight, [100.0] * 7)
    assert (effect.met, effect.reason) == (None, "overruled by p/pin")


def test_what_has_left_already_is_not_undone() -> None:
    flight = Flight([policy(UNDO)])
    effects(flight, [100.0] * 4)
    (effect,) = effects(flight, [100.0] * 9, load=1.0)
    assert effect.met is False
    assert "undone" not in flight.verdicts()


def test_a_suspension_is_not_forgotten_in_shadow_nor_while_switched_off() -> None:
    flight = undone(UNDO.replace("cooldown: 60s", "cooldown: 1s"))
    flight.fly(20, 2, seen=100.0, off=True)
    flight.fly(20, 4, seen=100.0)
    assert flight.phase() is Phase.INACTIVE
    flight.policies = [policy(UNDO.replace("cooldown: 60s", "cooldown: 1s"), spec="mode: off")]
    flight.fly(20, seen=100.0)
    flight.policies = [policy(UNDO.replace("cooldown: 60s", "cooldown: 1s"))]
    flight.fly(20, 2, seen=100.0)
    assert flight.phase() is Phase.INACTIVE
    flight.fly(20, 4, seen=100.0)
    assert flight.phase() is Phase.ACTIVE


def test_a_shadowed_change_has_no_effect_to_measure() -> None:
    flight = Flight([policy(UNDO, spec="mode: shadow")])
    assert effects(flight, [100.0] * 30) == []


def test_a_fallback_is_not_on_trial() -> None:
    flight = Flight([policy(UNDO, spec="onMissing: {fallback: {set: 256}}")])
    for _ in range(20):
        assert flight.fly(GONE, seen=100.0, offered=1.0).effects == ()
    assert flight.held() == 256
