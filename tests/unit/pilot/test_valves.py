"""Several valves seen as one: totals never fall, and what all of them shed is what is shed."""

from pilot_world import MemoryValve, World, policy

from kvpilot.link.controls import Scope

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


CREDITS = Scope("class_at_most", 0)


def grant(world: World, value: float, *valves: MemoryValve) -> None:
    """An override of credits, renewed until it is obeyed."""
    world.pilot.orders.override("admission_credits", CREDITS, value, 600, "test", "me", None)
    for _ in range(3):
        world.tick(running=1)
        for valve in valves:
            valve.look()
    world.tick()


def test_a_persons_credits_reach_the_valves_and_are_confirmed() -> None:
    world, first, second = world_with_valves()
    grant(world, 100.0, first, second)
    sight = world.sight().valve
    assert sight is not None
    assert sight.obeyed == {("admission_credits", CREDITS): 100.0}
    assert not first.law.admit(0, "", 10**6, world.clock.monotonic_ns()).why
    assert first.law.admit(0, "", 10, world.clock.monotonic_ns()).why == "credits"
    assert first.law.admit(1, "", 10, world.clock.monotonic_ns()).admitted
    assert world.pilot.actuator.unconfirmed == {}


def test_credits_left_are_summed_over_processes_and_are_none_where_one_has_no_limit() -> None:
    world, first, second = world_with_valves()
    grant(world, 100.0, first)
    assert world.sight().valve.credits_left == {}  # type: ignore[union-attr]
    assert world.sight().valve.obeyed == {}  # type: ignore[union-attr]
    grant(world, 100.0, first, second)
    assert world.sight().valve.credits_left == {"batch": 200.0}  # type: ignore[union-attr]


def test_a_fraction_that_opens_is_obeyed_as_far_as_it_still_sheds() -> None:
    world, first, second = world_with_valves()
    for _ in range(3):
        world.tick(running=1, waiting=11)
        first.look()
        second.look()
    world.hook = None  # no pilot renews from here on
    world.clock.advance(15 + 5)
    for valve in (first, second):
        valve.look()
    sight = world.pilot.engine.observe(world.clock.monotonic_ns(), ()).valve
    assert sight is not None
    ((target, value),) = sight.obeyed.items()
    assert target == ("shed_fraction", CREDITS)
    assert 0.2 < value < 0.3


def test_why_requests_were_turned_away_outlives_the_process() -> None:
    world, first, _ = world_with_valves()
    first.writer.shed(0, "acme", 10, "credits", 3)
    world.tick(running=1)
    first.page.alive = False
    world.ticks(2)
    sight = world.sight().valve
    assert sight is not None
    assert sight.shed_by["batch", "credits"] == 1
    assert sight.shed_by["batch", "fraction"] == 1
    assert sight.counts["offered_prompt_tokens", "batch"] == 3
    assert sight.admitted_bytes == 20


def test_an_order_on_a_tenant_outranks_a_policy_on_all() -> None:
    """Only a person may be less protective, and the valve is told which lease is a person's."""
    world = World(policy(do="{knob: shed_fraction, set: 1.0}"))
    world.start_engine()
    valve = MemoryValve(world)
    world.pilot.orders.override("shed_fraction", Scope("tenant", "acme"), 0.0, 600, "they pay", "me", None)
    for _ in range(3):
        world.tick(running=1, waiting=11)
        valve.look()
    assert valve.law.admit(0, "acme", 10, world.clock.monotonic_ns()).admitted
    assert not valve.law.admit(0, "globex", 10, world.clock.monotonic_ns()).admitted
