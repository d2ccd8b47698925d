"""KV time to exhaustion by survival curves: bands that cover, warnings in time, no cry of wolf."""

import math

import pytest
from forecast_pools import BLOCK, STEP_S, Pool
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.forecast.arrivals import Arrivals
from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.scores import Outcome, judge, warnings
from kvpilot.forecast.service import ServiceRate
from kvpilot.forecast.survival import Inflow, demand_ahead, exhaustion
from kvpilot.link.fields import HORIZONS, QUANTILES
from kvpilot.link.records import StepRecord

LOOK_STEPS = 25


def fly(pool: Pool, blocks: int, steps: int) -> tuple[list[tuple[float, Estimate]], list[float]]:
    """((time, forecast) every half second, times at which the pool came to be exhausted)."""
    service, arrivals = ServiceRate(), Arrivals()
    said: list[tuple[float, Estimate]] = []
    events: list[float] = []
    above = False
    for number in range(steps):
        pool.advance()
        service.observe(pool.at_s, pool.served, pool.waiting_tokens())
        arrivals.observe(pool.at_s, pool.served, pool.waiting_tokens())
        if pool.held >= blocks and not above:
            events.append(pool.at_s)
        above = pool.held >= blocks
        if number % LOOK_STEPS or number < 50 or above:
            continue
        rate = service.tokens_per_s()
        inflow = tuple(
            Inflow(
                pool.waiting_tokens(),
                arrivals.tokens_per_s() or 0.0,
                rate / factor if isinstance(rate, float) else math.inf,
                250.0,
                pool.mean_output,
            )
            for factor in service.band
        )
        found = exhaustion(blocks, blocks - pool.held, pool.ahead(), STEP_S, BLOCK, inflow)  # type: ignore[arg-type]
        said.append((pool.at_s, found))
    return said, events


def outcomes(seeds: range, blocks: int, horizon_s: float = 15.0) -> list[Outcome]:
    """Forecasts of an exhaustion within the horizon, and when it then came (infinite: not within two)."""
    found = []
    for seed in seeds:
        said, events = fly(Pool(seed, arrivals_per_s=7.0), blocks, 2500)
        for at_s, forecast in said:
            true_s = min((event - at_s for event in events if event >= at_s), default=math.inf)
            if forecast.p50 <= horizon_s and at_s < 30:
                found.append(Outcome(forecast, true_s if true_s < 4 * horizon_s else math.inf))
    return found


def test_the_band_covers_when_a_filling_pool_is_exhausted() -> None:
    verdict = judge(outcomes(range(20), blocks=1100))
    assert verdict is not None
    assert verdict.outcomes > 300
    assert 0.75 < verdict.inside < 0.93
    assert 0.35 < verdict.over_middle < 0.65


def test_a_pool_that_is_large_enough_is_left_in_peace_and_one_that_is_not_is_warned_of() -> None:
    calm_alarms, warned, events, leads = 0.0, 0, 0, []
    for seed in range(6):
        said, none = fly(Pool(seed, arrivals_per_s=4.0), 4000, 2500)
        assert none == []
        calm_alarms += warnings([(at_s, each.p50) for at_s, each in said], none, 3.0).alarms
        said, some = fly(Pool(seed, arrivals_per_s=8.0), 1000, 1500)
        found = warnings([(at_s, each.p50) for at_s, each in said], some[:1], 3.0)
        warned, events, leads = warned + found.warned, events + found.events, [*leads, *found.lead_s]
    assert calm_alarms == 0
    assert warned == events == 6
    assert sorted(leads)[3] > 1.0


def test_nothing_available_is_no_time() -> None:
    none = (Inflow(), Inflow(), Inflow())
    assert exhaustion(100, 0, [], 0.02, 16, none) == (0.0, 0.0, 0.0)


def test_a_line_is_crossed_where_it_is() -> None:
    ahead = [(100.0, Estimate(60.0, 80.0, 120.0)), (200.0, Estimate(70.0, 120.0, 140.0))]
    none = (Inflow(), Inflow(), Inflow())
    found = exhaustion(100, 60, ahead, 0.1, 16, none)
    assert found.p10 == pytest.approx(10 * 60 / 80)
    assert found.p50 == pytest.approx(10 + 10 * 20 / 40)
    assert math.isinf(found.p90)


def test_what_waits_and_what_comes_brings_it_nearer_no_faster_than_it_is_served() -> None:
    ahead = [(100.0, Estimate(40.0, 40.0, 40.0))]
    alone = exhaustion(100, 60, ahead, 0.1, 16, (Inflow(),) * 3).p50
    waiting = exhaustion(100, 60, ahead, 0.1, 16, (Inflow(2000.0),) * 3).p50
    slow = exhaustion(100, 60, ahead, 0.1, 16, (Inflow(2000.0, 0.0, 50.0),) * 3).p50
    coming = exhaustion(100, 60, ahead, 0.1, 16, (Inflow(0.0, 150.0, 1e9),) * 3).p50
    ending = exhaustion(100, 60, ahead, 0.1, 16, (Inflow(0.0, 150.0, 1e9, 10.0, 5.0),) * 3).p50
    growing = exhaustion(100, 60, ahead, 0.1, 16, (Inflow(0.0, 90.0, 1e9, 10.0),) * 3).p50
    assert math.isinf(alone)
    assert math.isinf(slow)
    assert waiting < 10
    assert coming < 10
    assert growing < 10
    assert math.isinf(ending), "each is gone half a second after it came"


def test_a_backlog_fills_what_admission_may_fill_and_exhausts_the_pool_only_by_growing_beyond() -> None:
    """Waiting for nothing but memory: where admission keeps a fifth back, the pool is not exhausted by it."""
    ahead = [(16.0, Estimate(78.0, 80.0, 82.0)), (64.0, Estimate(70.0, 75.0, 80.0))]
    queue = (Inflow(1e6, 0.0, math.inf, 16.0, 50.0),) * 3
    full = exhaustion(100, 20, ahead, 0.05, 16, queue, watermark=1.0)
    assert full.p50 < 1.0
    kept = exhaustion(100, 20, ahead, 0.05, 16, queue, watermark=0.8)
    assert math.isinf(kept.p50)
    long = (Inflow(1e6, 0.0, math.inf, 480.0, 50.0),) * 3
    whole = exhaustion(100, 20, ahead, 0.05, 16, long, watermark=1.0)
    assert whole.p10 < 1.0
    assert math.isinf(whole.p50), "the next one needs 30 blocks: what is left over is not taken"
    growing = (Inflow(1e6, 0.0, math.inf, 16.0, 1e6),) * 3
    assert exhaustion(100, 20, [(500.0, Estimate(10.0, 10.0, 10.0))], 0.05, 16, growing, 0.8).p50 < 25


blocks = st.floats(0, 1e5)


@given(
    st.floats(1, 1e5),
    blocks,
    st.lists(st.tuples(blocks, blocks, blocks), min_size=4, max_size=4),
    st.floats(1e-4, 1.0),
    st.builds(Inflow, st.floats(0, 1e6), st.floats(0, 1e5), st.floats(0, 1e6), st.floats(1, 1e4)),
)
def test_quantiles_are_ordered_and_never_before_now(
    pool: float, free: float, demands: list[tuple[float, float, float]], token_s: float, inflow: Inflow
) -> None:
    ahead = [(float(h), Estimate(*sorted(each))) for h, each in zip(HORIZONS, demands, strict=True)]
    found = exhaustion(pool, min(free, pool), ahead, token_s, 16, (inflow, inflow, inflow))
    assert 0 <= found.p10 <= found.p50 <= found.p90


def test_demand_is_read_from_the_step_at_which_it_was_taken() -> None:
    names = [f"demand_{h}_{q}_blocks" for h in HORIZONS for q in QUANTILES]
    index = {name: i for i, name in enumerate([*names, "steps_total", "demand_step"])}
    values = tuple(float(i) for i in range(len(names)))
    record = StepRecord(1, (*values, 1030.0, 1000.0), index)
    ahead = demand_ahead(record)
    assert ahead is not None
    assert [steps for steps, _ in ahead] == [64 - 30, 256 - 30, 1024 - 30], "16 steps have passed"
    assert ahead[0][1] == (3.0, 4.0, 5.0)
    few = StepRecord(1, (1.0, 2.0), {"steps_total": 0, "demand_step": 1})
    assert demand_ahead(few) is None
