"""Forecasts of exhaustion learn from what became of them: bands cover, and a wolf at the door is believed."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.scores import Outcome, judge
from kvpilot.forecast.tried import LEAST_LIMIT_S, LEAST_OUTCOMES, MOST_FACTOR, TriedExhaustion

SAID = Estimate(0.5, 1.0, 2.0)


class World:
    """Forecasts one after another, each settled before the next."""

    def __init__(self) -> None:
        self.tried = TriedExhaustion()
        self.at_s = 0.0

    def next(self, ratio: float, said: Estimate = SAID) -> Estimate:
        """A forecast, and the pool exhausted after so many times a second; or never, if infinite."""
        band = self.tried.judged(self.at_s, said)
        self.at_s += ratio if math.isfinite(ratio) else 2 * LEAST_LIMIT_S + 1
        self.tried.observe(self.at_s, math.isfinite(ratio))
        self.at_s += 0.5
        return band

    def after(self, ratios: list[float], said: Estimate = SAID) -> Estimate:
        for ratio in ratios:
            self.next(ratio)
        return self.tried.judged(self.at_s, said)


def test_few_outcomes_change_nothing() -> None:
    assert World().after([5.0] * (LEAST_OUTCOMES - 1)) == SAID
    assert World().after([5.0] * LEAST_OUTCOMES) == (5.0, 5.0, 5.0)


def test_bands_cover_whatever_the_model_gets_wrong() -> None:
    """True times are four times as long as said, and scatter; the band is made of that alone."""
    dice, world = random.Random(1), World()
    ratios = [4 * dice.lognormvariate(0.0, 0.7) for _ in range(1500)]
    verdict = judge([Outcome(world.next(ratio), ratio) for ratio in ratios][100:])
    assert verdict is not None
    assert 0.77 < verdict.inside < 0.83
    assert 0.45 < verdict.over_middle < 0.55


def test_bands_cover_while_the_error_drifts() -> None:
    """It doubles and halves every two hundred forecasts: quantiles of the past alone come too late."""
    dice, world = random.Random(2), World()
    ratios = [math.exp(math.sin(n / 32)) * dice.lognormvariate(0.0, 0.2) for n in range(3000)]
    verdict = judge([Outcome(world.next(ratio), ratio) for ratio in ratios][200:])
    assert verdict is not None
    assert 0.73 < verdict.inside < 0.84


def test_who_cried_wolf_is_believed_at_the_door() -> None:
    world = World()
    found = world.after([math.inf] * 40)
    assert found.p50 == MOST_FACTOR
    assert found.p90 == math.inf
    assert world.tried.judged(world.at_s, Estimate(0.01, 0.02, 0.5)).p50 <= 0.2


def test_an_early_end_that_never_comes_true_is_given_up_alone() -> None:
    """The middle sees no exhaustion, the early end always does, and is always wrong."""
    tried, forecast = TriedExhaustion(), Estimate(0.2, math.inf, math.inf)
    found = forecast
    for tenth in range(600):
        found = tried.judged(tenth / 10, forecast)
        assert found.p10 in (0.2, math.inf)
        tried.observe(tenth / 10, False)
    assert found == (math.inf, math.inf, math.inf)
    near = Estimate(0.2, 0.3, math.inf)
    assert tried.judged(61.0, near) == near, "but not where the middle sees it too"


def test_a_forecast_for_far_away_does_not_keep_near_ones_from_being_judged() -> None:
    tried = TriedExhaustion()
    tried.judged(0.0, Estimate(100.0, math.inf, math.inf))
    for second in range(1, 30):
        tried.judged(float(second), Estimate(0.2, math.inf, math.inf))
        tried.observe(float(second), False)
    assert tried.judged(30.0, Estimate(0.2, math.inf, math.inf)).p10 == math.inf


def test_nothing_is_learnt_where_nothing_was_foretold() -> None:
    tried = TriedExhaustion()
    for at_s in range(50):
        tried.judged(float(at_s), Estimate(math.inf, math.inf, math.inf))
        tried.judged(float(at_s), Estimate(0.0, 0.0, 0.0))
        tried.observe(at_s + 0.5, True)
    assert tried.judged(60.0, SAID) == SAID


@given(st.lists(st.floats(1e-3, 1e3) | st.just(math.inf), max_size=60), st.floats(1e-6, 1e6))
def test_quantiles_stay_ordered(ratios: list[float], middle: float) -> None:
    found = World().after(ratios, Estimate(middle / 2, middle, middle * 2))
    assert 0 < found.p10 <= found.p50 <= found.p90
