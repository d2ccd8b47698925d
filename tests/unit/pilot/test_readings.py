"""Every signal of the catalogue has a source, and a field that is not there makes its signals missing."""

import pytest
from pilot_world import MemoryValve, World, manifest

from kvpilot.adapters.condition import CONDITION_SIGNALS
from kvpilot.adapters.gpu_signals import GPU_SIGNALS
from kvpilot.adapters.readings import DERIVED, FIELD_OF, HISTOGRAM_OF
from kvpilot.adapters.valves import VALVE_SIGNALS
from kvpilot.adapters.windows import Reading
from kvpilot.forecast.outlook import FORECAST_SIGNALS
from kvpilot.link.fields import HORIZONS, KV_BITS, STEP_FIELDS
from kvpilot.signals import SIGNALS, Missing

PILOTS_OWN = (*CONDITION_SIGNALS, *GPU_SIGNALS)
DEMAND = tuple(f"demand_{horizon}_p90_blocks" for horizon in HORIZONS)


def test_every_signal_has_exactly_one_source() -> None:
    sources = [*FIELD_OF, *DERIVED, *HISTOGRAM_OF, *VALVE_SIGNALS, *FORECAST_SIGNALS, *PILOTS_OWN]
    assert sorted(sources) == sorted(SIGNALS)
    assert set(FIELD_OF.values()) <= set(STEP_FIELDS)


def test_an_engine_that_provides_everything_leaves_nothing_out() -> None:
    world = World()
    names = (*FIELD_OF.values(), "time_ns", "duration_ns", "tail_waste_tokens", "accepted_tokens_total")
    names += ("prefix_tokens_hit_total", "prefix_tokens_queried_total")
    names += ("device_reserved_bytes", "device_allocated_bytes")
    names += tuple(f"kv_{bits}bit_blocks" for bits in KV_BITS)
    world.start_engine(manifest(tuple(dict.fromkeys((*names, *DEMAND)))))
    MemoryValve(world)
    assert world.hook is not None
    for level in (0, 1):
        world.hook.set_class(level, 0, 0)
    world.tick(
        running=1,
        kv_blocks_free=60,
        kv_blocks_cached=10,
        tail_waste_tokens=48,
        device_free_bytes=5e6,
        device_reserved_bytes=8e6,
        device_allocated_bytes=6e6,
        kv_16bit_blocks=20,
        kv_4bit_blocks=10,
        demand_64_p90_blocks=120,
    )
    latest = world.pilot.board.latest
    absent = {name for (name, _), reading in latest.items() if isinstance(reading, Missing)}
    assert absent <= {*FORECAST_SIGNALS, *GPU_SIGNALS, "rank_load_ratio"}, (
        "forecasts take more than one record"
    )
    value = {
        name: reading.value for (name, c), reading in latest.items() if isinstance(reading, Reading) and not c
    }
    assert value["kv_occupancy"] == 0.3
    assert value["kv_demand_ratio"] == 0.3, "nothing waits"
    assert value["kv_peak_ratio"] == 1.2
    assert value["tail_waste_ratio"] == 48 / (30 * 16)
    assert value["device_headroom_tokens"] == 5000
    assert value["device_fragmentation_ratio"] == 0.25
    block_bytes = manifest().bytes_per_block
    assert [value[f"kv_{bits}bit_bytes"] for bits in (16, 8, 4)] == [20 * block_bytes, 0, 10 * block_bytes]


def test_an_engine_that_provides_nothing_has_no_numbers() -> None:
    world = World()
    world.start_engine(manifest(("time_ns", "steps_total")))
    world.tick()
    known = {
        name
        for (name, _), reading in world.pilot.board.latest.items()
        if isinstance(reading, Reading) and name not in HISTOGRAM_OF
    }
    # Class rows are beside the step record, and this engine has not filled them.
    assert known == {"steps"}


def test_a_share_of_no_slots_is_missing_not_zero() -> None:
    world = World()
    world.start_engine()
    world.tick(running=0)
    assert world.pilot.board.latest["tail_waste_ratio", None] == Missing("no_samples")


def test_demand_is_what_is_held_and_what_waiting_prompts_need_and_may_exceed_the_pool() -> None:
    world = World()
    world.start_engine()
    world.tick(running=1, kv_blocks_free=20, kv_blocks_cached=10, waiting_prompt_tokens=1600)
    reading = world.pilot.board.latest["kv_demand_ratio", None]
    assert isinstance(reading, Reading)
    assert reading.value == 1.7


@pytest.mark.parametrize("absent", ["kv_blocks_free", "waiting_prompt_tokens"])
def test_demand_is_missing_where_a_part_of_it_is(absent: str) -> None:
    world = World()
    fields = tuple(column.name for column in manifest().fields if column.name != absent)
    world.start_engine(manifest(fields))
    world.tick(running=1)
    assert world.pilot.board.latest["kv_demand_ratio", None] == Missing("not_provided")


def test_the_predicted_peak_is_never_below_what_is_held_and_is_missing_without_a_prediction() -> None:
    world = World()
    world.start_engine(manifest(("time_ns", "steps_total", "running", "waiting", "kv_blocks_free", *DEMAND)))
    world.tick(running=1, kv_blocks_free=20, demand_16_p90_blocks=70, demand_256_p90_blocks=30)
    reading = world.pilot.board.latest["kv_peak_ratio", None]
    assert isinstance(reading, Reading)
    assert reading.value == 0.8
    bare = World()
    bare.start_engine(manifest(("time_ns", "steps_total", "running", "waiting", "kv_blocks_free")))
    bare.tick(running=1, kv_blocks_free=20)
    assert bare.pilot.board.latest["kv_peak_ratio", None] == Missing("not_provided")
