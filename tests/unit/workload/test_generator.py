"""The synthetic workload: reproducible, sized to the machine, bursty, of two classes and domains."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpilot.workload.arrival import Arrival, Speed
from kvpilot.workload.generator import BATCH, CLASSES, INTERACTIVE, Burst, Lengths, generate

SPEED = Speed(prefill_tokens_per_s=6000, decode_tokens_per_s=1500)


def work_s(arrivals: list[Arrival], speed: Speed = SPEED) -> float:
    return sum(speed.seconds(a.prompt_tokens, a.output_tokens) for a in arrivals)


@settings(max_examples=40, deadline=None)
@given(st.integers(), st.floats(1, 60), st.floats(0.2, 2.5), st.floats(100, 20_000), st.floats(50, 5_000))
def test_every_seed_offers_the_work_that_the_load_says(
    seed: int, seconds: float, load: float, prefill: float, decode: float
) -> None:
    speed = Speed(prefill, decode)
    arrivals = generate(seed, seconds, load, speed)
    largest = speed.seconds(BATCH.prompt.most, BATCH.output.most)
    assert load * seconds <= work_s(arrivals, speed) < load * seconds + largest
    times = [a.at_s for a in arrivals]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= seconds


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_lengths_stay_inside_their_class(seed: int) -> None:
    by_name = {mix.name: mix for mix in CLASSES}
    for one in generate(seed, 15, 1.0, SPEED):
        mix = by_name[one.klass]
        assert mix.prompt.least <= one.prompt_tokens <= mix.prompt.most
        assert mix.output.least <= one.output_tokens <= mix.output.most
        assert one.domain in dict(mix.domains)
        assert one.tenant in dict(mix.tenants)


def test_same_seed_same_arrivals_other_seed_other_ones() -> None:
    assert generate(1, 15, 1.0, SPEED) == generate(1, 15, 1.0, SPEED)
    assert generate(1, 15, 1.0, SPEED) != generate(2, 15, 1.0, SPEED)


def test_a_faster_machine_is_offered_more_of_the_same() -> None:
    def content(speed: Speed) -> list[tuple[int, int, str, int]]:
        arrivals = generate(3, 15, 1.0, speed)
        return sorted((a.prompt_tokens, a.output_tokens, a.klass, a.seed) for a in arrivals)

    slow, fast = content(SPEED), content(Speed(12_000, 3000))
    assert set(slow) <= set(fast)
    assert len(fast) > 1.6 * len(slow)


def test_both_classes_and_domains_are_there_in_their_shares() -> None:
    arrivals = generate(1, 600, 1.0, SPEED)
    share = sum(a.klass == INTERACTIVE.name for a in arrivals) / len(arrivals)
    assert share == pytest.approx(INTERACTIVE.share, abs=0.03)
    python = sum(a.domain == "python" for a in arrivals) / len(arrivals)
    assert 0.35 < python < 0.6


def test_bursts_come_at_their_factor() -> None:
    """One burst of 4x over a quarter of the run: it holds 4/7 of the requests, wherever jitter moved it."""
    burst = (Burst(start=0.5, length=0.25, factor=4.0),)
    times = [a.at_s for a in generate(7, 1200, 1.0, SPEED, bursts=burst)]
    densest = max(sum(start <= t < start + 300 for t in times) for start in range(0, 901, 10))
    assert densest / len(times) == pytest.approx(4 / 7, abs=0.04)


def test_without_bursts_arrivals_spread_evenly() -> None:
    times = [a.at_s for a in generate(7, 1200, 1.0, SPEED, bursts=())]
    assert sum(t < 600 for t in times) / len(times) == pytest.approx(0.5, abs=0.03)


def test_work_counts_output_by_r() -> None:
    assert SPEED.r == 4.0
    assert Arrival(0, 100, 10, "a", "", "json", 1).work(SPEED.r) == 140.0
    assert SPEED.seconds(6000, 1500) == 2.0


@pytest.mark.parametrize("kwargs", [{"seconds": 0, "load": 1}, {"seconds": 1, "load": 0}])
def test_nothing_to_generate_is_refused(kwargs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        generate(1, speed=SPEED, **kwargs)


def test_a_machine_without_speed_is_refused() -> None:
    with pytest.raises(ValueError, match="decode_tokens_per_s=0"):
        Speed(1, 0)


def test_lengths_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match="least"):
        Lengths(median=10, sigma=1, least=20, most=30)
