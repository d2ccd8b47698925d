"""`solve`: a claim that follows a model every tick, while cooldown and limits slow its coming and going."""

import math
from collections.abc import Callable

import pytest
from policy_flight import ALL, LOWEST, Flight, policy

from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.context import Forecasts
from kvpilot.policy.state import Phase
from kvpilot.signals import Missing

CREDITS = ManifestKnob("admission_credits", "tokens", 0, 2**30, 2**30, 1, "valve")
SLO = {"itl": 0.05, "ttft": 2.0, "lowest": {"itl": 0.2, "ttft": 30.0}}
BLIND = Missing("too_few_samples")

CHUNK_RULE = """
    - name: fit
      when: load > 10
      keepFor: 200ms
      cooldown: 1s
      do: [{knob: prefill_chunk_tokens, solve: {stepTime: 0.8 * slo.itl}, min: 64, step: 32}]
"""
CREDITS_RULE = """
    - name: grant
      when: load > 10
      do:
        - knob: admission_credits
          solve: {ttft: 0.9 * slo.lowest.ttft, class: lowest}
          scope: {classAtMost: 0}
"""


def chunks(tokens_per_second: float | Missing) -> Forecasts:
    """A model whose steps take a second for so many tokens."""

    def chunk_for(step_seconds: float) -> float | Missing:
        return (
            tokens_per_second if isinstance(tokens_per_second, Missing) else tokens_per_second * step_seconds
        )

    return Forecasts(chunk_for=chunk_for)


def test_the_largest_chunk_for_the_step_time_anew_every_tick_whatever_the_limits() -> None:
    flight = Flight([policy(CHUNK_RULE, spec="limits: {maxChanges: 1, per: 60s}")])
    for rate, chunk in ((10_000, 384), (8_100, 320), (20_000, 800), (100, 64), (math.inf, 4096)):
        flight.fly(20, slo=SLO, forecasts=chunks(rate))
        assert flight.held() == chunk, "0.04 s, rounded to the protective side, inside the bounds"


def test_cooldown_slows_its_coming_and_going() -> None:
    flight = Flight([policy(CHUNK_RULE)])
    held = []
    for load in [20] * 3 + [1] * 3 + [20] * 12:
        flight.fly(load, slo=SLO, forecasts=chunks(10_000))
        held.append(flight.held() is not None)
    assert held == [True] * 5 + [False] * 10 + [True] * 3, "a second after it left, at 500 ms"


def test_limits_count_its_entries() -> None:
    flight = Flight(
        [policy(CHUNK_RULE.replace("cooldown: 1s", "cooldown: 0s"), spec="limits: {maxChanges: 2, per: 60s}")]
    )
    for _ in range(5):
        flight.fly(20, 3, slo=SLO, forecasts=chunks(10_000))
        flight.fly(1, 3, slo=SLO, forecasts=chunks(10_000))
    assert flight.verdicts().count("applied") == 4, "two entries and their ends"
    assert flight.verdicts().count("rate_limited") == 3


@pytest.mark.parametrize("forecasts", [Forecasts(), chunks(BLIND), chunks(math.nan)])
def test_a_model_that_is_missing_is_an_input_that_is_missing(forecasts: Forecasts) -> None:
    flight = Flight([policy(CHUNK_RULE, spec="onMissing: hold\n  holdFor: 1s")])
    flight.fly(20, 3, slo=SLO, forecasts=forecasts)
    assert (flight.phase("fit"), flight.held()) == (Phase.INACTIVE, None)
    flight.fly(20, 1, slo=SLO, forecasts=chunks(10_000))
    flight.fly(20, 10, slo=SLO, forecasts=forecasts)
    assert flight.held() == 384, "held"
    assert flight.log[-1].verdict == "missing_input"
    assert "the step-time model is missing" in flight.log[-1].reason
    flight.fly(20, 1, slo=SLO, forecasts=forecasts)
    assert flight.held() is None


def test_a_target_that_is_no_time_is_missing() -> None:
    rule = CHUNK_RULE.replace("0.8 * slo.itl", "slo.itl - seen")
    flight = Flight([policy(rule)])
    flight.fly(20, 2, seen=1.0, slo=SLO, forecasts=chunks(10_000))
    assert flight.held() is None
    flight.fly(20, 1, seen=0.01, slo=SLO, forecasts=chunks(10_000))
    assert flight.held() == 384


@pytest.mark.parametrize(("classes", "asked"), [(("batch", "chat"), "batch"), ((), "lowest")])
def test_credits_of_the_lowest_class(classes: tuple[str, ...], asked: str) -> None:
    seen: list[tuple[str, float]] = []

    def credits_(name: str, ttft_seconds: float) -> float:
        seen.append((name, ttft_seconds))
        return 1234.7

    flight = Flight([policy(CREDITS_RULE)], knobs=(CREDITS,))
    flight.fly(20, slo=SLO, classes=classes, forecasts=Forecasts(credits=credits_))
    assert flight.held("admission_credits", LOWEST) == 1235
    assert seen == [(asked, 27.0)]
    assert flight.held("admission_credits", ALL) is None


def test_no_credits_without_a_service_rate() -> None:
    flight = Flight([policy(CREDITS_RULE)], knobs=(CREDITS,))
    no_rate: Callable[[str, float], Missing] = lambda name, ttft_seconds: BLIND  # noqa: E731
    flight.fly(20, 5, slo=SLO, forecasts=Forecasts(credits=no_rate))
    assert flight.last is not None
    assert flight.last.leases == ()
