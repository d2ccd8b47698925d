"""The output-length table: conditioned on survival, never sticky, sane without data."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.inside.lengths import WINDOW, LengthPredictor
from kvpilot.link.fields import HORIZONS

MAX = 2048
lengths = st.lists(st.integers(1, MAX), max_size=60)


def table(observed: list[int], max_tokens: int = MAX, window: int = WINDOW) -> LengthPredictor:
    predictor = LengthPredictor(max_tokens, window)
    for tokens in observed:
        predictor.observe(tokens)
    return predictor


@given(generated=st.integers(0, MAX - 1), q=st.floats(0, 1))
def test_without_data_the_prior_spreads_what_max_tokens_leaves(generated: int, q: float) -> None:
    left = MAX - generated
    assert LengthPredictor(MAX).remaining(generated, q) == pytest.approx(q * left, abs=1)


@given(lengths, st.integers(0, 2 * MAX), st.floats(0, 1), st.floats(0, 1))
def test_remaining_is_bounded_and_rises_with_q(
    observed: list[int], generated: int, a: float, b: float
) -> None:
    predictor = table(observed)
    low, high = predictor.remaining(generated, min(a, b)), predictor.remaining(generated, max(a, b))
    assert low <= high
    assert (1 if generated < MAX else 0) <= low
    assert generated + high <= max(MAX, generated)


@given(st.lists(st.integers(1, MAX), min_size=1, max_size=60), st.integers(0, MAX - 1))
def test_predicted_total_never_falls_as_a_request_lives_on(observed: list[int], generated: int) -> None:
    """Survival: having outlived short requests can only raise the expected end, never lower it."""
    predictor = table(observed)
    for q in (0.1, 0.5, 0.9):
        now = generated + predictor.remaining(generated, q)
        later = generated + 1 + predictor.remaining(generated + 1, q)
        if generated + 1 < MAX:
            assert later >= now


def test_survivors_alone_decide() -> None:
    """Nine in ten are short; a request past them is one of the long ones."""
    predictor = table([20] * 460 + [800] * 52)
    assert predictor.remaining(0, 0.5) == 20
    assert predictor.remaining(21, 0.5) == 800 - 21


@given(st.lists(st.integers(1, MAX), max_size=80), st.lists(st.integers(1, MAX), min_size=16, max_size=40))
def test_a_bad_hour_fades_without_a_trace(bad: list[int], good: list[int]) -> None:
    after, fresh = table([*bad, *good], window=16), table(good[-16:], window=16)
    for generated in (0, 7, 300, 2000):
        for q in (0.0, 0.1, 0.5, 0.9, 1.0):
            assert after.remaining(generated, q) == fresh.remaining(generated, q)
    assert after.demand([(100, 10)], 16) == fresh.demand([(100, 10)], 16)


@given(
    lengths,
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 2 * MAX)), max_size=20),
    st.sampled_from([1, 16, 32]),
)
def test_demand_is_ordered_and_within_what_could_be_held(
    observed: list[int], running: list[tuple[int, int]], block_size: int
) -> None:
    demand = table(observed).demand(running, block_size)
    for horizon, row in zip(HORIZONS, demand, strict=True):
        most = sum(-(-(held + horizon) // block_size) for held, _ in running)
        assert 0 <= row.p10 <= row.p50 <= row.p90 <= most


def test_demand_grows_then_empties_as_certain_requests_finish() -> None:
    """All lengths equal 100: at 50 tokens every request is still there at +16 and gone at +64."""
    predictor = table([100] * WINDOW)
    running = [(66, 50)] * 10
    at_16, at_64, *_ = predictor.demand(running, 16)
    assert at_16.p50 == pytest.approx(10 * -(-(66 + 16) // 16), rel=0.02)
    assert at_64.p50 < 0.05 * 10 * -(-(66 + 64) // 16)


def test_demand_interval_covers_what_happens() -> None:
    """Lengths drawn from the table's own law: the p10-p90 band holds about four outcomes in five."""
    rng = random.Random(5)
    predictor = table([rng.randrange(1, 400) for _ in range(WINDOW)], max_tokens=400)
    running = [(100 + g, g) for g in (rng.randrange(0, 200) for _ in range(40))]
    horizon = 64
    (row,) = predictor.demand(running, 16, (horizon,))
    inside = 0
    for _ in range(500):
        held = 0
        for tokens, generated in running:
            if rng.randrange(generated + 1, 400) > generated + horizon:
                held += -(-(tokens + horizon) // 16)
        inside += row.p10 <= held <= row.p90
    assert 0.7 < inside / 500 < 0.9


def test_demand_is_cheap() -> None:
    """Called every few steps for up to 64 sequences: under 200 us of CPU (the best: others share the
    machine)."""
    rng = random.Random(1)
    predictor = table([rng.randrange(1, MAX) for _ in range(WINDOW)])
    running = [(rng.randrange(2000), rng.randrange(800)) for _ in range(64)]
    best = min(_cpu_seconds(lambda: predictor.demand(running, 16)) for _ in range(30))
    assert best < 200e-6


def _cpu_seconds(call) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


@pytest.mark.parametrize(
    ("kwargs", "word"), [({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 9, "window": 0}, "window")]
)
def test_misuse_is_named(kwargs: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        LengthPredictor(**kwargs)
    with pytest.raises(ValueError, match="q="):
        LengthPredictor(9).remaining(0, 1.5)
