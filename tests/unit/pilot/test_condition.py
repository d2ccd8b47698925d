"""The engine as a whole, as signals: there while it is silent, missing where nobody can say."""

from link_pages import manifest as any_manifest
from pilot_world import IDENTITY, MemoryPage, MemoryValve, World, policy

from kvpilot.adapters.condition import condition
from kvpilot.adapters.ranks import Ranks
from kvpilot.adapters.windows import Reading
from kvpilot.link.records import StepRecord
from kvpilot.link.telemetry import TelemetryWriter, plan_page
from kvpilot.signals import Missing

ABSENT = Missing("not_provided")


def record(**fields: float) -> StepRecord:
    return StepRecord(1, tuple(fields.values()), {name: i for i, name in enumerate(fields)})


def test_what_the_engine_is_in_is_known_to_be_so_now() -> None:
    told = record(running=2.0, waiting=1.0)
    found = condition(told, "stalled", 7.0, True, 99)
    assert found["engine_stalled", None] == Reading(99, 1.0)
    assert found["output_wedged", None] == Reading(99, 0.0)
    assert found["telemetry_silent_seconds", None] == Reading(99, 7.0)
    assert condition(told, "idle", 7.0, True, 99)["telemetry_silent_seconds", None] == Reading(99, 0.0)
    assert condition(told, "wedged", 0.1, True, 99)["output_wedged", None] == Reading(99, 1.0)


def test_what_nobody_can_tell_is_missing() -> None:
    assert condition(record(running=2.0, waiting=1.0), "live", 0.0, False, 1)["output_wedged", None] == ABSENT
    assert condition(record(running=2.0), "live", 0.0, True, 1)["engine_stalled", None] == ABSENT


def test_a_stall_reaches_a_rule_while_every_other_signal_has_aged() -> None:
    world = World(policy(signal="engine_stalled", when="x > 0.5", do="{knob: prefill_chunk_tokens, set: 64}"))
    world.start_engine()
    MemoryValve(world)
    world.tick(running=1)
    for _ in range(40):
        tick = world.only_tick()
    assert {lease.knob: lease.value for lease in tick.leases}["prefill_chunk_tokens"] == 64


def rank(running: int, waiting: int) -> MemoryPage:
    described = any_manifest("running", "waiting")
    page = MemoryPage(bytearray(plan_page(described, 64).page_bytes), "telemetry")
    writer = TelemetryWriter(page.buffer, described, nonce=9, identity=IDENTITY, record_count=64)
    writer.write_step((running, waiting))
    return page


def test_a_ranks_load_is_compared_with_the_mean_and_alone_there_is_nothing_to_compare() -> None:
    world = World()
    busy = record(running=8.0, waiting=4.0)
    assert Ranks(world.pages).load_ratio(busy, 0) == ABSENT
    world.pages.rank_pages += [rank(2, 0), rank(4, 0)]
    assert Ranks(world.pages).load_ratio(busy, 0) == 2.0
    assert Ranks(world.pages).load_ratio(record(running=8.0), 0) == ABSENT
    world.pages.rank_pages[:] = [rank(0, 0)]
    assert Ranks(world.pages).load_ratio(record(running=0.0, waiting=0.0), 0) == 1.0
