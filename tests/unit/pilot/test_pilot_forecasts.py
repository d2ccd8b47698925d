"""The forecast stage inside the tick: from step records to what rules are evaluated against."""

import pytest
from pilot_world import MemoryValve, World, manifest, policy

from kvpilot.clock import NS
from kvpilot.link.fields import HOOK_FIELDS, STEP_FIELDS
from kvpilot.publish.board import Tick
from kvpilot.signals import Missing

FIELDS = tuple(name for name in STEP_FIELDS if name not in HOOK_FIELDS)
STEP = "forecast.step_seconds"


def world(*policies: str) -> World:
    made = World(*policies, slo={"itl": 0.05, "ttft": 1.0})
    made.start_engine(manifest(FIELDS))
    assert made.hook is not None
    made.hook.set_class(0, 3, 900)
    made.hook.set_class(1, 1, 100)
    return made


def busy(made: World, ticks: int, steps: int = 10) -> Tick:
    """Ticks of an engine whose steps take 8 ms, and 10 us more for each prompt token."""
    tick = None
    for number in range(ticks):
        for step in range(steps):
            values = made.values
            chunk = 100 * ((number + step) % 4)
            made.clock.advance(0.1 / steps)
            made.step(
                duration_ns=8_000_000 + 10_000 * chunk,
                prefill_tokens_total=values["prefill_tokens_total"] + chunk,
                decode_sequences_total=values["decode_sequences_total"] + 8,
                decode_tokens_total=values["decode_tokens_total"] + 8,
                context_tokens_total=values["context_tokens_total"] + 8 * 500,
                chunk_positions_total=values["chunk_positions_total"] + chunk * chunk,
                running=9,
                waiting=4,
                waiting_prompt_tokens=1000,
                kv_blocks_free=50,
                device_free_bytes=10**7,
            )
        tick = made.pilot.tick()
    assert tick is not None
    return tick


def latest(made: World, signal: str) -> object:
    return made.pilot.board.latest[signal, None]


def test_steps_become_a_model_that_rules_see_as_a_signal_and_solve_asks() -> None:
    made = world(policy(signal=STEP, when="x > 0.5"))
    tick = busy(made, 40)
    assert tick.inputs["guard", "x"] == pytest.approx(0.0095, rel=0.05)
    assert tick.context is not None
    chunk = tick.context.forecasts.chunk_for(0.0095)
    assert chunk == pytest.approx(150, abs=15)
    assert isinstance(tick.context.forecasts.credits("interactive", 1.0), float)
    assert set(tick.context.forecasts.seconds_per_token) == set(range(9))


def test_a_stalled_engine_has_no_forecasts_and_its_steps_still_count_when_it_goes_on() -> None:
    made = world(policy(signal=STEP, when="x > 0.5"))
    busy(made, 40)
    tick = made.only_tick()
    while tick.sight.liveness != "stalled":
        tick = made.only_tick()
    assert tick.context is not None
    assert tick.context.forecasts.chunk_for(0.05) == Missing("too_old")
    assert isinstance(made.pilot.tick().inputs["guard", "x"], Missing)
    tick = busy(made, 2)
    assert tick.inputs["guard", "x"] == pytest.approx(0.0095, rel=0.1)


def test_another_start_of_the_engine_is_not_forecast_by_the_steps_of_the_one_before() -> None:
    made = world()
    busy(made, 40)
    made.start_engine(manifest(FIELDS))
    while not (tick := busy(made, 1)).sight.restarted:
        pass
    assert tick.context is not None
    assert tick.context.forecasts.chunk_for(0.05) == Missing("too_few_samples")
    tick = busy(made, 30)
    assert isinstance(tick.context.forecasts.chunk_for(0.05), float)  # type: ignore[union-attr]


def test_records_that_came_between_two_ticks_are_all_seen() -> None:
    made = world()
    made.pilot.tick()
    made.clock.advance(0.6)
    busy(made, 1, steps=20)
    assert len(made.sight().records) == 20
    assert [each.sequence for each in made.sight().records] == list(range(1, 21))
    busy(made, 1, steps=60)
    assert len(made.sight().records) == 33, "the newest of them: the rest is in the cumulative counts"


def test_what_valves_let_in_tells_which_classes_come() -> None:
    made = world()
    valve = MemoryValve(made)
    for _ in range(30):
        made.clock.advance(0.01)
        valve.writer.admitted(1, "", 100, made.clock.monotonic_ns())
        busy(made, 1)
    arrivals = made.pilot._forecaster._flow.arrivals
    assert arrivals.share(["interactive"]) == 1.0
    assert arrivals.share(["batch"]) == 0.0
    assert made.clock.monotonic_ns() > 1000 * NS
