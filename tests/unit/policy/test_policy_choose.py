"""`choose`: the candidate with the lowest forecast, hysteresis, dwell, and probes that keep signals alive."""

import itertools
import math

import pytest
from policy_flight import GONE, Flight, policy

from kvpilot.policy.context import Forecasts
from kvpilot.policy.expr import Reading
from kvpilot.policy.outcome import Outcome
from kvpilot.policy.state import Phase
from kvpilot.signals import Missing

BLIND = Missing("no_samples")

CHOOSE = """
    - name: drafts
      choose:
        knob: speculative_tokens
        candidates: [0, 1, 2, 4]
        minimise: forecast.seconds_per_token
        hysteresis: 10%
        dwell: 1s
        unless: load > 50
        probe: {candidate: 1, for: 100ms, every: 2s, jitter: 20%, backoff: 2}
"""


class Chooser(Flight):
    """A flight of one choosing rule. The engine drafts 4 by itself."""

    def __init__(self, rule: str = CHOOSE, spec: str = "", **kwargs: object) -> None:
        super().__init__([policy(rule, spec=spec)], **kwargs)

    def price(self, *prices: Reading, ticks: int = 1, load: Reading = 1.0, **context: object) -> Outcome:
        """Forecasts at 0, 1, 2 and 4 drafts."""
        known = dict(zip((0, 1, 2, 4), prices, strict=True))
        return self.fly(load, ticks, forecasts=Forecasts(seconds_per_token=known), **context)

    @property
    def drafts(self) -> float | None:
        return None if self.last is None else self.held("speculative_tokens")

    @property
    def stands(self) -> Phase:
        return self.phase("drafts")


def test_the_lowest_forecast_is_taken_and_held() -> None:
    flight = Chooser()
    flight.price(9, 8, 7, 6, ticks=5)
    assert (flight.drafts, flight.stands, flight.log) == (None, Phase.INACTIVE, [])
    flight.price(9, 8, 5, 6, ticks=30)
    assert (flight.drafts, flight.stands) == (2, Phase.ACTIVE)
    assert [(d.before, d.after, d.verdict) for d in flight.log] == [(4, 2, "applied")]
    assert flight.log[0].reason == "forecast 5 s a token at 2, 6 s at 4"


def test_only_for_a_forecast_that_is_better_by_the_hysteresis() -> None:
    flight = Chooser()
    flight.price(9, 8, 5.5, 6, ticks=20)
    assert flight.drafts is None
    flight.price(9, 8, 5.39, 6)
    assert flight.drafts == 2


def test_it_dwells_between_two_changes() -> None:
    flight = Chooser()
    changed = []
    for tick in range(100):
        before = flight.drafts
        flight.price(9, 1 if tick % 2 else 9, 9 if tick % 2 else 1, 9)
        if flight.drafts != before:
            changed.append(tick)
    assert changed == list(range(0, 100, 11)), "a second, and the tick on which the other is better"


def test_back_at_baseline_it_lets_go() -> None:
    flight = Chooser()
    flight.price(9, 8, 5, 6, ticks=15)
    flight.price(9, 8, 7, 5)
    assert (flight.drafts, flight.stands) == (None, Phase.INACTIVE)
    assert flight.log[-1].after is None
    assert flight.log[-1].reason == "forecast 5 s a token at 4, 7 s at 2"


def test_candidates_that_the_engine_lacks_or_nobody_can_forecast_are_left_out() -> None:
    flight = Chooser(CHOOSE.replace("[0, 1, 2, 4]", "[0, 1, 2, 16]"))
    prices = {0: 9.0, 1: BLIND, 2: 8.0, 4: 10.0, 16: 1.0}
    flight.fly(1, forecasts=Forecasts(seconds_per_token=prices))
    assert flight.drafts == 2


def test_a_forecast_that_is_no_number_is_none() -> None:
    flight = Chooser()
    flight.price(math.nan, 8, 5, 6)
    assert flight.drafts == 2
    flight.price(math.nan, 1, math.nan, 6)
    assert flight.drafts is None
    assert "at 2 is missing (not_finite)" in flight.log[-1].reason


@pytest.mark.parametrize("spec", ["", "onMissing: hold\n  holdFor: 1s"])
def test_a_choice_without_a_forecast_is_missing(spec: str) -> None:
    flight = Chooser(spec=spec)
    flight.price(9, 8, 5, 6, ticks=2)
    flight.price(9, 8, BLIND, 6)
    assert flight.drafts == (2 if spec else None)
    assert flight.log[-1].verdict == "missing_input"
    assert "forecast.seconds_per_token at 2 is missing (no_samples)" in flight.log[-1].reason
    flight.price(9, 8, BLIND, 6, ticks=10)
    assert flight.drafts is None


def test_an_input_of_unless_that_is_missing_is_missing() -> None:
    flight = Chooser()
    flight.price(9, 8, 5, 6, ticks=5, load=GONE)
    assert flight.drafts is None


def turned_off(**kwargs: object) -> Chooser:
    """A flight on which drafts did not pay: off, and acceptance is silent."""
    flight = Chooser(**kwargs)
    flight.price(1, 9, 9, 9)
    assert flight.drafts == 0
    return flight


def probes(flight: Chooser, seconds: float, **context: object) -> list[tuple[int, int]]:
    """(from, to) in ticks of each probe while nothing is known but the price of 0."""
    begun, found = None, []
    for tick in range(round(seconds * 10)):
        flight.price(1, BLIND, BLIND, BLIND, **context)
        if flight.drafts == 1 and begun is None:
            begun = tick
        elif flight.drafts == 0 and begun is not None:
            found.append((begun, tick))
            begun = None
    return found


def test_what_its_own_choice_silences_is_probed_with_jitter_and_backs_off() -> None:
    flight = turned_off()
    found = probes(flight, 200)
    assert all(until - since == 1 for since, until in found), "one tick each"
    waits = [(later[0] - earlier[1]) / 10 for earlier, later in itertools.pairwise(found)]
    assert 1.6 <= found[0][0] / 10 <= 2.5
    expected = [4, 8, 16, 32, 32]
    assert len(waits) >= 5
    for wait, middle in zip(waits, expected, strict=False):
        assert 0.8 * middle <= wait <= 1.2 * middle + 0.1
    assert len({round(wait / middle, 3) for wait, middle in zip(waits, expected, strict=False)}) > 2, "jitter"
    assert flight.stands is Phase.ACTIVE
    assert {d.verdict for d in flight.log} == {"applied"}


def test_the_jitter_is_the_same_on_the_same_flight_and_another_for_another_rule() -> None:
    assert probes(turned_off(), 60) == probes(turned_off(), 60)
    other = CHOOSE.replace("name: drafts", "name: other")
    flight = Flight([policy(other), policy(CHOOSE, "second")])
    for _ in range(30):
        flight.fly(1, forecasts=Forecasts(seconds_per_token={0: 1.0, 4: 9.0}))
    due = {key: state.choosing.due_ns for key, state in flight.state.rules.items()}
    assert len(set(due.values())) == 2


def test_a_probe_that_finds_something_better_becomes_the_choice() -> None:
    flight = turned_off()
    while flight.drafts == 0:
        flight.price(1, BLIND, BLIND, BLIND)
    flight.price(1, 0.7, 0.5, 0.6)
    assert flight.drafts == 2
    assert flight.state.rules["guard", "drafts"].choosing.fruitless == 0
    flight.price(1, 0.7, 0.5, 0.6, ticks=100)
    assert flight.drafts == 2


def test_no_probe_unless_it_is_allowed_and_one_under_way_stands_down() -> None:
    flight = turned_off(rule=CHOOSE.replace("for: 100ms", "for: 1s"))
    assert probes(flight, 60, load=99.0) == []
    while flight.drafts == 0:
        flight.price(1, BLIND, BLIND, BLIND)
    flight.price(1, BLIND, BLIND, BLIND, ticks=3)
    assert flight.drafts == 1
    flight.price(1, BLIND, BLIND, BLIND, load=99.0)
    assert flight.drafts == 0


def test_a_choice_that_silences_nothing_is_not_probed() -> None:
    flight = Chooser()
    flight.price(9, 8, 5, 6, ticks=100)
    assert [d.after for d in flight.log] == [2]


def test_an_engine_that_drafts_nothing_by_itself_is_probed_too() -> None:
    flight = Chooser(values={})
    flight.knobs = tuple(
        knob
        if knob.name != "speculative_tokens"
        else type(knob)("speculative_tokens", "tokens", 0, 8, 0, 1, "")
        for knob in flight.knobs
    )
    seen = []
    for _ in range(40):
        flight.price(1, BLIND, BLIND, BLIND)
        seen.append((flight.drafts, flight.stands))
    assert (1, Phase.INACTIVE) in seen
    assert seen[-1] == (None, Phase.INACTIVE)


def test_probes_count_as_steps_there_and_back() -> None:
    flight = turned_off(spec="limits: {maxChanges: 3, per: 60s}")
    assert len(probes(flight, 55)) == 1, "one change of choice, one probe"


def test_no_probes_in_shadow() -> None:
    flight = Chooser(spec="mode: shadow")
    flight.price(1, 9, 9, 9)
    for _ in range(100):
        flight.price(1, BLIND, BLIND, BLIND)
    assert [(d.after, d.verdict) for d in flight.log] == [(0, "shadowed")]


def test_an_overruled_choice_stays_and_does_not_probe() -> None:
    high = policy(
        "- {name: pin, when: seen > 5, do: [{knob: speculative_tokens, set: 3}]}", "high", "priority: 200"
    )
    flight = Chooser()
    flight.policies.append(high)
    flight.price(1, 9, 9, 9)
    for _ in range(50):
        flight.fly(1, seen=9.0, forecasts=Forecasts(seconds_per_token={0: 5.0, 2: 1.0, 3: 4.0, 4: 9.0}))
        assert flight.drafts == 3
    (claim,) = flight.state.rules["guard", "drafts"].claims
    assert (claim.value, claim.overruled_by) == (0, "high/pin")


def test_a_probe_ends_where_the_rule_goes_blind() -> None:
    flight = turned_off(spec="onMissing: hold")
    while flight.drafts == 0:
        flight.price(1, BLIND, BLIND, BLIND)
    flight.price(BLIND, BLIND, BLIND, BLIND)
    assert (flight.drafts, flight.stands) == (0, Phase.ACTIVE)


def test_an_engine_without_the_knob_is_told_once() -> None:
    flight = Chooser(knobs=())
    flight.price(9, 8, 5, 6, ticks=20)
    assert flight.verdicts() == ["unsupported"]
