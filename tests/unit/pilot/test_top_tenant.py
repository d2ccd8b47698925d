"""`scope: {tenant: top}` through the whole pilot: from rows in the telemetry page to a lease for valves."""

from pilot_world import MemoryValve, World, policy

from kvpilot.link.controls import Scope, newest_slot

SHED_TOP = policy(
    do="{knob: shed_fraction, add: 0.25, scope: {tenant: top}}",
    rule="cooldown: 500ms\n      recover: [{knob: shed_fraction, add: -0.25, every: 1s}]",
)


def leases(world: World) -> dict[Scope, float]:
    slot = newest_slot(world.valve_controls)
    return (
        {lease.scope: lease.value for lease in slot.leases if lease.knob == "shed_fraction"} if slot else {}
    )


def world_with_tenants() -> tuple[World, MemoryValve]:
    world = World(SHED_TOP)
    world.start_engine()
    valve = MemoryValve(world)
    assert world.hook is not None
    world.hook.set_tenant("acme", 3, 0, 40, 0, 0)
    world.hook.set_tenant("globex", 1, 0, 7, 0, 0)
    world.tick(waiting=1)
    valve.look()
    return world, valve


def test_the_tenant_that_holds_most_is_shed_and_the_claim_moves_with_it() -> None:
    world, valve = world_with_tenants()
    world.tick(waiting=20)
    assert leases(world) == {Scope("tenant", "acme"): 0.25}
    assert world.hook is not None
    world.hook.set_tenant("globex", 5, 0, 60, 0, 0)
    for _ in range(6):
        valve.look()
        world.tick(waiting=20)
    assert leases(world) == {Scope("tenant", "acme"): 0.25, Scope("tenant", "globex"): 0.25}
    for _ in range(11):
        valve.look()
        world.tick(waiting=20)
    assert leases(world) == {Scope("tenant", "globex"): 0.75}, "who holds less now has walked home"
    for _ in range(60):
        valve.look()
        world.tick(waiting=1)
    assert leases(world) == {}


def test_nobody_holds_anything() -> None:
    world, valve = world_with_tenants()
    assert world.hook is not None
    world.hook.set_tenant("acme", 0, 0, 0, 0, 0)
    world.hook.set_tenant("globex", 0, 2, 0, 0, 0)
    world.tick(waiting=20)
    valve.look()
    assert leases(world) == {}
    assert world.pilot.board.tick is not None
    assert world.pilot.board.tick.context is not None
    assert world.pilot.board.tick.context.top_tenant is None
