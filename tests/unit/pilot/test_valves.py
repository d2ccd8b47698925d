"""Several valves seen as one: totals never fall, and what all of them shed is what is shed."""

from pilot_world import MemoryValve, World, policy

SHED = "{knob: shed_fraction, set: 0.5, scope: {classAtMost: 0}}"


def world_with_valves() -> tuple[World, MemoryValve, MemoryValve]:
    world = World(policy(do=SHED))
    world.start_engine()
    valves = MemoryValve(world, 1), MemoryValve(world, 2)
    valves[0].writer.shed(0, "", 10)
    valves[0].writer.admitted(1, "", 10, 0)
    valves[1].writer.admitted(0, "acme", 10, 0)
    return world, *valves


def test_counts_are_summed_over_processes_and_tenants() -> None:
    world, _, _ = world_with_valves()
    world.tick(running=1)
    sight = world.sight().valve
    assert sight is not None
    assert (sight.processes, sight.in_flight) == (2, 2)
    assert sight.counts["offered", None] == 3
    assert sight.counts["offered", "batch"] == 2
    assert sight.counts["shed", "interactive"] == 0


def test_a_process_that_ends_keeps_its_counts_and_loses_its_requests_in_flight() -> None:
    world, first, _ = world_with_valves()
    world.tick(running=1)
    first.page.alive = False
    world.ticks(2)
    sight = world.sight().valve
    assert sight is not None
    assert (sight.processes, sight.in_flight) == (1, 1)
    assert sight.counts["offered", None] == 3


def test_shed_is_what_every_live_valve_sheds() -> None:
    world, first, second = world_with_valves()
    world.tick(running=1, waiting=11)
    first.look()
    world.tick()
    assert world.sight().valve.fractions["batch"] == 0.0  # type: ignore[union-attr]
    second.look()
    world.tick()
    assert world.sight().valve.fractions["batch"] == 0.5  # type: ignore[union-attr]


def test_the_last_valve_gone_makes_its_signals_missing_not_zero() -> None:
    world = World(policy(signal="offered", agg="rate", window="window: 5s,", when="x < 1.0"))
    world.start_engine()
    valve = MemoryValve(world)
    tick = world.ticks(3, running=1)
    assert tick.inputs["guard", "x"] == 0.0
    valve.page.alive = False
    tick = world.ticks(2)
    assert tick.inputs["guard", "x"].reason == "not_provided"  # type: ignore[union-attr]
