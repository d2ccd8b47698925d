"""Forecasts of exhaustion learn from what became of them: bands cover, and a wolf at the door is believed."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.scores import Outcome, judge
from kvpilot.forecast.tried import LEAST_LIMIT_S, LEAST_OUTCOMES, MOST_FACTOR, TriedExhaustion

SAID = Estimate(0.5, 1.0, 2.0)
LIMIT_S = LEAST_LIMIT_S


def one_by_one(ratios: list[float]) -> TriedExhaustion:
    """Each a forecast of a second, and the pool exhausted after so many; or never, if infinite."""
    tried, at_s = TriedExhaustion(), 0.0
    for ratio in ratios:
        tried.mark(at_s, SAID)
        at_s += ratio if math.isfinite(ratio) else LIMIT_S + 1
        tried.observe(at_s, math.isfinite(ratio))
        at_s += 0.5
    return tried


def test_few_outcomes_change_nothing() -> None:
    assert one_by_one([5.0] * (LEAST_OUTCOMES - 1)).tried(SAID) == SAID
    assert one_by_one([5.0] * LEAST_OUTCOMES).tried(SAID) == (5.0, 5.0, 5.0)


def test_bands_cover_whatever_the_model_gets_wrong() -> None:
    """True times are four times as long as said, and scatter; the band is made of that alone."""
    dice = random.Random(1)
    ratios = [4 * dice.lognormvariate(0.0, 0.7) for _ in range(600)]
    tried, at_s, pairs = TriedExhaustion(), 0.0, []
    for ratio in ratios:
        tried.mark(at_s, SAID)
        pairs.append(Outcome(tried.tried(SAID), ratio))
        at_s += ratio
        tried.observe(at_s, True)
    verdict = judge(pairs[100:])
    assert verdict is not None
    assert 0.75 < verdict.inside < 0.85
    assert 0.45 < verdict.over_middle < 0.55


def test_who_cried_wolf_is_believed_at_the_door() -> None:
    tried = one_by_one([math.inf] * 40)
    assert tried.tried(SAID) == (MOST_FACTOR, MOST_FACTOR, math.inf)
    assert tried.tried(Estimate(0.01, 0.02, 0.5)).p50 <= 0.2


def test_an_early_end_that_never_comes_true_is_given_up_alone() -> None:
    """The middle sees no exhaustion, the early end always does, and is always wrong."""
    tried, forecast = TriedExhaustion(), Estimate(0.2, math.inf, math.inf)
    for tenth in range(600):
        assert tried.tried(forecast).p10 in (0.2, math.inf)
        tried.mark(tenth / 10, forecast)
        tried.observe(tenth / 10, False)
    assert tried.tried(forecast) == (math.inf, math.inf, math.inf)
    near = Estimate(0.2, 0.3, math.inf)
    assert tried.tried(near) == near, "but not where the middle sees it too"


def test_nothing_is_learnt_where_nothing_was_foretold() -> None:
    tried = TriedExhaustion()
    for at_s in range(50):
        tried.mark(float(at_s), Estimate(math.inf, math.inf, math.inf))
        tried.mark(float(at_s), Estimate(0.0, 0.0, 0.0))
        tried.observe(at_s + 0.5, True)
    assert tried.tried(SAID) == SAID


@given(st.lists(st.floats(1e-3, 1e3) | st.just(math.inf), max_size=60), st.floats(1e-6, 1e6))
def test_quantiles_stay_ordered(ratios: list[float], middle: float) -> None:
    found = one_by_one(ratios).tried(Estimate(middle / 2, middle, middle * 2))
    assert 0 < found.p10 <= found.p50 <= found.p90
