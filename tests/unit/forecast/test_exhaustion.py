"""KV time to exhaustion: right on lines, steady under noise, infinite while nothing falls."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.clock import NS
from kvpilot.forecast.exhaustion import MOST_SAMPLES, KvExhaustion, theil_sen
from kvpilot.signals import Missing


def fed(values: list[float], period_s: float = 0.1) -> KvExhaustion:
    forecast = KvExhaustion()
    for index, value in enumerate(values):
        forecast.observe(round(index * period_s * NS), value)
    return forecast


def test_a_straight_fall_is_exact() -> None:
    values = [300.0 - 5 * index for index in range(20)]
    assert fed(values).seconds(values[-1]) == pytest.approx((values[-1] / 50,) * 3)


@pytest.mark.parametrize("values", [[50.0] * 20, [float(v) for v in range(20)]], ids=["level", "rising"])
def test_no_fall_is_infinite_time(values: list[float]) -> None:
    assert fed(values).seconds(values[-1]) == (math.inf,) * 3


def test_nothing_left_is_no_time_even_before_there_is_a_slope() -> None:
    assert fed([0.0]).seconds(0.0) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few_samples_is_missing(count: int) -> None:
    assert fed([50.0] * count).seconds(50.0) == Missing("too_few_samples")


def test_samples_within_a_moment_say_nothing() -> None:
    assert fed([50.0 - v for v in range(10)], period_s=0.001).seconds(40.0) == Missing("too_few_samples")


def test_requests_that_finish_do_not_hide_the_fall() -> None:
    """Every second a request gives back 20 blocks at once; meanwhile the pool falls by 100 a second."""
    values, free = [], 900.0
    for index in range(30):
        free -= 10
        if index % 10 == 9:
            free += 20
        values.append(free)
    found = fed(values).seconds(free)
    assert not isinstance(found, Missing)
    assert found.p50 == pytest.approx(free / 80, rel=0.3)
    assert found.p10 <= free / 80 <= found.p90


def test_noise_around_a_level_is_not_an_imminent_end() -> None:
    noise = random.Random(1)
    for _ in range(50):
        values = [400 + noise.uniform(-4, 4) for _ in range(30)]
        found = fed(values).seconds(400.0)
        assert not isinstance(found, Missing)
        assert found.p50 > 60


@given(st.lists(st.floats(0, 1e6), min_size=0, max_size=80))
def test_it_is_a_number_of_seconds_or_missing_and_bounded_in_size(values: list[float]) -> None:
    forecast = fed(values)
    assert len(forecast._samples) <= MOST_SAMPLES
    found = forecast.seconds(values[-1] if values else 1.0)
    assert isinstance(found, Missing) or 0 <= found.p10 <= found.p50 <= found.p90


def test_a_slope_needs_two_times() -> None:
    assert theil_sen([(1, 5.0), (1, 9.0)]) is None
    assert theil_sen([(0, 5.0), (NS, 9.0)]) == 4.0
