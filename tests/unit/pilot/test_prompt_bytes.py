"""Bytes per prompt token: measured over engine and valves, believed when it moved, and held as a lease only
while credits are granted."""

from dataclasses import replace

import pytest
from pilot_world import FIELDS, MemoryValve, World, manifest

from kvpilot.adapters.engine import Sight
from kvpilot.adapters.prompt_bytes import MIN_TOKENS, WINDOW_NS, PromptBytes
from kvpilot.adapters.valves import ValveSight
from kvpilot.clock import NS
from kvpilot.link.controls import Scope, newest_slot
from kvpilot.link.manifest import Manifest
from kvpilot.link.records import StepRecord


def sight(
    second: float, tokens: float | None, admitted_bytes: int, described: Manifest | None = None
) -> Sight:
    record = StepRecord(1, (tokens,), {"prefill_tokens_total": 0}) if tokens is not None else None
    valve = ValveSight(1, {}, 0, 0, {}, admitted_bytes=admitted_bytes)
    return Sight(round(second * NS), manifest=described or manifest(), record=record, valve=valve)


def measured(*looks: Sight) -> float | None:
    prompt_bytes = PromptBytes()
    for look in looks:
        prompt_bytes.observe(look)
    return prompt_bytes.value


def test_bytes_let_in_over_tokens_computed() -> None:
    assert measured(sight(0, 500, 9_000), sight(2, 2_500, 16_000)) == 3.5


def test_nothing_is_learned_from_too_little() -> None:
    assert measured(sight(0, 0, 0), sight(2, MIN_TOKENS - 1, 10**6)) is None
    assert measured(sight(0, None, 0), sight(2, None, 10**6)) is None
    assert measured(sight(0, 0, 0)) is None


def test_only_the_window_counts() -> None:
    looks = [sight(0, 0, 0), sight(1, 2000, 20_000)]
    later = WINDOW_NS / NS + 2
    assert measured(*looks, sight(later, 4000, 24_000), sight(later + 1, 6000, 28_000)) == 2.0


def test_small_moves_are_noise() -> None:
    looks = [sight(0, 0, 0), sight(1, 10_000, 40_000)]
    assert measured(*looks, sight(2, 20_000, 82_000)) == 4.0
    assert measured(*looks, sight(2, 20_000, 90_000)) == 4.5


@pytest.mark.parametrize(("admitted_bytes", "value"), [(0, 0.25), (10**9, 1024.0)])
def test_it_stays_plausible(admitted_bytes: int, value: float) -> None:
    assert measured(sight(0, 0, 0), sight(2, 2000, admitted_bytes)) == value


def test_a_restarted_engine_counts_anew() -> None:
    prompt_bytes = PromptBytes()
    for look in (sight(0, 50_000, 0), replace(sight(1, 100, 8000), restarted=True), sight(2, 2100, 16_000)):
        prompt_bytes.observe(look)
    assert prompt_bytes.value == 4.0


def test_each_rank_behind_the_valves_computes_its_part() -> None:
    both = replace(manifest(), world={"dp": 2})
    assert measured(sight(0, 0, 0, both), sight(2, 1000, 8000, both)) == 4.0


def test_the_lease_is_there_while_credits_are_and_gives_way_to_a_persons() -> None:
    world = World()
    world.start_engine(manifest((*FIELDS, "prefill_tokens_total")))
    valve = MemoryValve(world)

    def held() -> dict[str, float]:
        slot = newest_slot(world.valve_controls)
        return {lease.knob: lease.value for lease in slot.leases} if slot is not None else {}

    for second in range(3):
        valve.writer.admitted(0, "", 6000, 0, 1500)
        valve.look()
        world.ticks(1, prefill_tokens_total=2000 * (second + 1))
    assert held() == {}
    order = world.pilot.orders.override
    order("admission_credits", Scope("all"), 500.0, 600, "test", "me", None)
    world.tick()
    assert held() == {"admission_credits": 500.0, "prompt_bytes_per_token": 3.0}
    for _ in range(2):
        world.tick()
        valve.look()
    assert valve.law.bytes_per_token(world.clock.monotonic_ns()) == 3.0
    order("prompt_bytes_per_token", Scope("all"), 8.0, 600, "test", "me", None)
    world.tick()
    assert held()["prompt_bytes_per_token"] == 8.0
    for knob in ("admission_credits", "prompt_bytes_per_token"):
        order(knob, Scope("all"), None, 0, "", "me", None)
    world.tick()
    assert held() == {}
