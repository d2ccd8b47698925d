"""The output-length table: conditioned on survival, never sticky, sane without data."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.inside.lengths import (
    LEAST_OWN,
    MOST_TENANTS,
    STALE_FINISHES,
    TENANT_WINDOW,
    WINDOW,
    LengthPredictor,
)
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


def two_tenants(short: int = 40, long: int = 900) -> LengthPredictor:
    predictor = LengthPredictor(MAX)
    for i in range(TENANT_WINDOW):
        predictor.observe(short + i % 5, "chat")
        predictor.observe(long + i % 5, "report")
    return predictor


def test_a_tenant_is_predicted_by_its_own_and_anybody_else_by_the_whole() -> None:
    predictor = two_tenants()
    assert predictor.remaining(0, 0.5, "chat") == pytest.approx(42, abs=4)
    assert predictor.remaining(0, 0.5, "report") == pytest.approx(902, abs=4)
    for q in (0.1, 0.5, 0.9):
        assert predictor.remaining(7, q, "stranger") == predictor.remaining(7, q)
    # A chat that has outlived every chat is compared with all requests: the reports.
    assert 900 <= 60 + predictor.remaining(60, 0.5, "chat") <= 905
    for q in (0.1, 0.5, 0.9):
        assert predictor.remaining(1000, q, "chat") == predictor.remaining(1000, q), "longer than any"


def test_a_tenant_with_few_finishes_of_its_own_is_predicted_by_the_whole() -> None:
    predictor = two_tenants()
    for count in range(LEAST_OWN):
        assert predictor.remaining(0, 0.5, "new") == predictor.remaining(0, 0.5), count
        predictor.observe(300, "new")
    assert predictor.remaining(0, 0.5, "new") == 300


@given(
    st.lists(st.tuples(st.integers(1, MAX), st.sampled_from(["", "a", "b"])), max_size=80),
    st.integers(0, MAX - 2),
    st.sampled_from(["", "a", "b"]),
)
def test_predicted_total_never_falls_for_tenants_either(
    observed: list[tuple[int, str]], generated: int, tenant: str
) -> None:
    predictor = LengthPredictor(MAX)
    for tokens, owner in observed:
        predictor.observe(tokens, owner)
    for q in (0.0, 0.1, 0.5, 0.9, 1.0):
        now = generated + predictor.remaining(generated, q, tenant)
        later = generated + 1 + predictor.remaining(generated + 1, q, tenant)
        assert generated < now <= later <= MAX


def test_a_tenants_bad_hour_fades() -> None:
    predictor = LengthPredictor(MAX)
    for _ in range(TENANT_WINDOW):
        predictor.observe(2000, "loop")
    for _ in range(WINDOW):
        predictor.observe(50, "other")
    for _ in range(TENANT_WINDOW):
        predictor.observe(50, "loop")
    assert predictor.remaining(0, 0.99, "loop") == 50, "not even in what its table leans on"


def test_a_quiet_tenants_bad_hour_fades_with_the_engines_finishes() -> None:
    predictor = LengthPredictor(MAX)
    for _ in range(TENANT_WINDOW):
        predictor.observe(2000, "loop")
    for _ in range(STALE_FINISHES):
        predictor.observe(50, "other")
    assert predictor.remaining(0, 0.9, "loop") == 50
    predictor.observe(50, "loop")
    assert predictor.remaining(0, 0.9, "loop") == 50


def test_tenants_are_bounded_and_the_quietest_goes_first() -> None:
    predictor = LengthPredictor(MAX)
    for number in range(3 * MOST_TENANTS):
        for _ in range(LEAST_OWN):
            predictor.observe(100, "always")
            predictor.observe(100 + number, f"tenant {number}")
    assert len(predictor._tenants) == MOST_TENANTS
    assert "always" in predictor._tenants
    assert f"tenant {3 * MOST_TENANTS - 1}" in predictor._tenants
    assert "tenant 0" not in predictor._tenants


def test_demand_follows_each_tenants_lengths() -> None:
    predictor = two_tenants(short=20, long=1800)
    chats = predictor.demand([(100, 10, "chat")] * 20, 16, (64,))[0]
    reports = predictor.demand([(100, 10, "report")] * 20, 16, (64,))[0]
    blind = predictor.demand([(100, 10)] * 20, 16, (64,))[0]
    held = 20 * -(-(100 + 64) // 16)
    assert chats.p50 < 0.1 * held
    assert reports.p50 > 0.9 * held
    assert 0.4 * held < blind.p50 < 0.6 * held


def test_demand_intervals_cover_a_mixture_that_blind_ones_spread_over() -> None:
    """Of what tenants' own laws bring, the p10-p90 band holds about four in five."""
    rng = random.Random(7)
    predictor = LengthPredictor(400)
    law = {"chat": (1, 60), "report": (150, 400)}
    for _ in range(2 * TENANT_WINDOW):
        for tenant, (low, high) in law.items():
            predictor.observe(rng.randrange(low, high), tenant)
    running = [(50 + g, g, tenant) for tenant in law for g in (rng.randrange(0, 50) for _ in range(20))]
    (row,) = predictor.demand(running, 16, (32,))
    inside = 0
    for _ in range(500):
        held = 0
        for tokens, generated, tenant in running:
            low, high = law[tenant]
            if rng.randrange(max(low, generated + 1), high) > generated + 32:
                held += -(-(tokens + 32) // 16)
        inside += row.p10 <= held <= row.p90
    assert 0.7 < inside / 500 < 0.95


@pytest.mark.parametrize(
    ("kwargs", "word"), [({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 9, "window": 0}, "window")]
)
def test_misuse_is_named(kwargs: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        LengthPredictor(**kwargs)
    with pytest.raises(ValueError, match="q="):
        LengthPredictor(9).remaining(0, 1.5)
