"""The tick in virtual time: from step records through rules to what the engine's next step obeys."""

import asyncio
import json
import math

import pytest
from pilot_world import MemoryValve, World, manifest, policy

from kvpilot.adapters.adoption import Adopted
from kvpilot.clock import NS
from kvpilot.config import Arm
from kvpilot.journal.records import DecisionRecord, EventRecord, VerdictRecord
from kvpilot.link.controls import Scope, newest_slot
from kvpilot.pilot import TICK_NS, fly
from kvpilot.policy.lease import LeaseWish

SHED = "{knob: shed_fraction, set: 0.5, scope: {classAtMost: 0}}"


def test_a_condition_in_a_step_record_moves_the_knob_at_the_next_step() -> None:
    world = World(policy())
    world.start_engine()
    world.tick(waiting=3, running=1)
    assert world.knob("prefill_chunk_tokens") == 512
    world.tick(waiting=11)
    assert world.knob("prefill_chunk_tokens") == 64
    assert world.knob("speculative_tokens") == 4


def test_a_lease_is_renewed_as_long_as_it_holds_and_withdrawn_in_the_tick_that_ends_it() -> None:
    world = World(policy(rule="lease: 2s"))
    world.start_engine()
    world.ticks(10, waiting=11, running=1)
    assert world.knob("prefill_chunk_tokens") == 64
    world.tick(waiting=0)
    assert world.knob("prefill_chunk_tokens") == 512


def test_a_silent_pilot_loses_its_leases_one_ttl_later() -> None:
    world = World(policy(rule="lease: 2s"))
    world.start_engine()
    world.tick(waiting=11, running=1)
    assert world.knob("prefill_chunk_tokens") == 64
    world.clock.advance(1.8)
    assert world.knob("prefill_chunk_tokens") == 64
    world.clock.advance(0.3)
    assert world.knob("prefill_chunk_tokens") == 512


def test_applied_is_the_echo_not_the_write() -> None:
    world = World(policy())
    world.start_engine()
    world.tick(waiting=11, running=1)
    assert [row.verdict for row in world.of(DecisionRecord)] == ["unconfirmed"]
    world.only_tick()
    assert world.of(VerdictRecord) == []
    world.tick()
    (verdict,) = world.of(VerdictRecord)
    assert (verdict.number, verdict.verdict) == (1, "applied")
    assert verdict.after_s == pytest.approx(0.2)
    assert [row.verdict for row in world.pilot.ledger.recent] == ["applied"]


def test_shedding_goes_to_the_valve_and_its_echo_confirms_it() -> None:
    world = World(policy(do=SHED))
    world.start_engine()
    valve = MemoryValve(world)
    world.tick(waiting=11, running=1)
    assert world.of(VerdictRecord) == []
    valve.look()
    tick = world.tick()
    assert [row.verdict for row in world.of(VerdictRecord)] == ["applied"]
    assert tick.context is not None
    assert tick.context.values["shed_fraction", Scope("class_at_most", 0)] == 0.5
    assert tick.sight.valve is not None
    assert tick.sight.valve.fractions == {"batch": 0.5, "interactive": 0.0}


def test_missing_is_not_zero_for_an_engine_that_lacks_the_field() -> None:
    world = World(policy(signal="preemptions", agg="rate", window="window: 1s,", when="x < 1.0"))
    fields = tuple(name for name in manifest().fields if name.name != "preemptions_total")
    world.start_engine(manifest(tuple(column.name for column in fields)))
    tick = world.ticks(3, running=1)
    assert tick.inputs["guard", "x"].reason == "not_provided"  # type: ignore[union-attr]
    assert tick.leases == ()


def test_an_idle_engine_is_not_missing() -> None:
    world = World(policy(signal="kv_free_blocks", when="x > 10.0"))
    world.start_engine()
    world.tick(running=0, waiting=0)
    for _ in range(100):
        tick = world.only_tick()
    assert tick.sight.liveness == "idle"
    assert tick.inputs["guard", "x"] == 100
    assert len(tick.leases) == 1


def test_a_stalled_engine_has_signals_too_old_and_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    world = World(policy(when="x > 0.0"))
    world.start_engine()
    assert world.tick(running=1, waiting=1).leases != ()
    for _ in range(40):
        tick = world.only_tick()
    assert tick.sight.liveness == "stalled"
    assert tick.inputs["guard", "x"].reason == "too_old"  # type: ignore[union-attr]
    assert tick.leases == ()
    assert [r.getMessage() for r in caplog.records if "stalled" in r.getMessage()] == [
        "engine 0000000000000001 is stalled"
    ]


def test_without_an_engine_the_pilot_waits_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    world = World(policy())
    for _ in range(50):
        tick = world.only_tick()
    assert tick.outcome is None
    assert [record.getMessage() for record in caplog.records] == ["waiting: no engine writes to memory"]
    world.start_engine()
    world.ticks(1, waiting=11, running=1)
    assert world.knob("prefill_chunk_tokens") == 64


def test_a_restarted_engine_begins_with_empty_windows_and_unarmed() -> None:
    world = World(
        policy(signal="preemptions", agg="increase", window="window: 60s,", when="x > 5.0"),
        arm=Arm(after=5.0, finished=2),
    )
    world.start_engine()
    world.ticks(6, running=1, finished_total=9)
    world.ticks(1, preemptions_total=50)
    assert world.knob("prefill_chunk_tokens") == 64
    world.start_engine()
    while not (tick := world.tick(running=1)).sight.restarted:
        assert tick.sight.nonce == 1
    assert tick.inputs["guard", "x"].reason == "restarted"  # type: ignore[union-attr]
    assert tick.leases == ()
    assert world.knob("prefill_chunk_tokens") == 512
    world.tick()
    tick = world.ticks(3, preemptions_total=50)
    assert not tick.armed
    assert tick.leases == ()
    assert [row.verdict for row in world.of(DecisionRecord)][-1] == "shadowed"
    tick = world.ticks(3, finished_total=1)
    assert not tick.armed
    assert world.ticks(0.2, finished_total=2).armed


def test_age_counts_from_the_engines_start_not_from_the_pilots() -> None:
    world = World(arm=Arm(after=60.0, finished=0))
    world.start_engine()
    world.clock.advance(61)
    assert world.tick(running=1).armed


def test_off_withdraws_every_lease_within_one_tick_and_on_lets_rules_act_again() -> None:
    world = World(policy())
    world.start_engine()
    world.ticks(1, waiting=11, running=1)
    world.pilot.orders.turn(True, "maintenance", "kim")
    tick = world.tick()
    assert tick.leases == ()
    assert world.knob("prefill_chunk_tokens") == 512
    world.pilot.orders.turn(False, "", "kim")
    world.ticks(0.3)
    assert world.knob("prefill_chunk_tokens") == 64


def test_an_override_outranks_policies_until_it_ends() -> None:
    world = World(policy())
    world.start_engine()
    world.ticks(1, waiting=11, running=1)
    limits = world.sight().manifest.knob("prefill_chunk_tokens")  # type: ignore[union-attr]
    world.pilot.orders.override("prefill_chunk_tokens", Scope("all"), 1024, 5.0, "test", "kim", limits)
    world.tick()
    assert world.knob("prefill_chunk_tokens") == 1024
    world.ticks(4.8)
    assert world.knob("prefill_chunk_tokens") == 1024
    world.ticks(0.3)
    assert world.knob("prefill_chunk_tokens") == 64


def test_withdrawing_while_the_engine_is_idle_is_not_read_as_still_in_force() -> None:
    """The last echo of an idle engine is old news: a rule that multiplies must start from baseline again."""
    world = World(policy(do="{knob: prefill_chunk_tokens, multiply: 0.5}", rule="cooldown: 60s"))
    world.start_engine()
    world.ticks(0.5, waiting=11, running=1)
    assert world.knob("prefill_chunk_tokens") == 256
    world.tick(waiting=0, running=0)
    for _ in range(20):
        world.only_tick()
    tick = world.only_tick()
    assert tick.context is not None
    knob = tick.context.knobs["prefill_chunk_tokens"]
    assert tick.context.value_in_force(knob, Scope("all")) == 512


@pytest.mark.parametrize(
    ("rule_exists", "expected"), [(True, 64.0), (False, 512.0)], ids=["rule exists", "rule is gone"]
)
def test_an_adopted_lease_holds_until_its_rule_can_see(rule_exists: bool, expected: float) -> None:
    wish = LeaseWish("prefill_chunk_tokens", Scope("all"), 64, 15 * NS, "guard", "act")
    text = policy(
        signal="preemptions", agg="rate", window="window: 5s,", when="x > 1.0", rule="until: x < 0.5"
    )
    world = World(
        text if rule_exists else text.replace("name: act", "name: other"),
        adopted=[Adopted(wish, 41, 1000 * NS)],
    )
    world.start_engine()
    world.tick(running=1)
    assert world.knob("prefill_chunk_tokens") == expected
    if rule_exists:
        # The rule sees a rate now, adopts the claim as its own, and ends it by its own exit condition.
        world.ticks(0.2)
        assert world.knob("prefill_chunk_tokens") == 512


def test_exhaustion_is_forecast_from_the_slope_of_free_blocks() -> None:
    world = World(policy(signal="forecast.kv_exhaustion_seconds", when="x < 3.0"))
    world.start_engine()
    tick = world.tick(running=1, kv_blocks_free=100)
    assert tick.inputs["guard", "x"].reason == "too_few_samples"  # type: ignore[union-attr]
    tick = world.ticks(3)
    assert math.isinf(tick.inputs["guard", "x"])  # type: ignore[arg-type]
    free = 100.0
    while not tick.leases:
        free -= 1
        tick = world.tick(kv_blocks_free=int(free))
    # One block a tick: 3 s before the end there are 30 left, less what the window's lag costs.
    assert 15 <= free <= 32


def test_policies_are_swapped_between_ticks_and_a_removed_rules_lease_is_withdrawn() -> None:
    world = World(policy())
    world.start_engine()
    world.ticks(0.5, waiting=11, running=1)
    world.use(policy(name="other", when="x > 1000.0"))
    world.tick()
    assert world.knob("prefill_chunk_tokens") == 512


def test_the_journal_says_which_engine_came_and_what_was_waited_for() -> None:
    world = World(policy())
    world.only_tick()
    world.start_engine()
    world.ticks(1, running=1)
    assert [row.detail for row in world.of(EventRecord)] == [
        "no engine writes to memory",
        "0000000000000001 test 1, tiny, 100 KV blocks, 0 leases adopted",
    ]


class Late:
    """A clock on which one tick takes longer than it should."""

    def __init__(self, world: World, slow_tick: int, takes_s: float) -> None:
        self.starts_ns: list[int] = []
        self._world = world
        tick = world.pilot.tick

        def slow() -> object:
            self.starts_ns.append(world.clock.monotonic_ns())
            if len(self.starts_ns) == slow_tick:
                world.clock.advance(takes_s)
            return tick()

        self.tick = slow


def test_a_missed_tick_is_counted_and_never_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    late = Late(world, slow_tick=3, takes_s=0.35)
    monkeypatch.setattr(type(world.pilot), "tick", lambda pilot: late.tick())
    asyncio.run(fly(world.pilot, world.clock, lambda: len(late.starts_ns) >= 6))
    begun = [(start - 1000 * NS) // (TICK_NS // 2) / 2 for start in late.starts_ns]
    assert begun == [0, 1, 2, 5.5, 6, 7]
    assert world.pilot.board.missed == 2


def test_a_defect_in_a_tick_is_logged_once_and_the_pilot_flies_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(policy())
    world.start_engine()
    world.ticks(0.5, waiting=11, running=1)
    ticks = 0

    def broken(pilot: object) -> None:
        nonlocal ticks
        ticks += 1
        world.step()
        raise RuntimeError("a bug")

    monkeypatch.setattr(type(world.pilot), "tick", broken)
    asyncio.run(fly(world.pilot, world.clock, lambda: ticks >= 5))
    assert world.pilot.board.failures == 5
    assert len([r for r in caplog.records if "a tick failed" in r.getMessage()]) == 1
    assert world.knob("prefill_chunk_tokens") == 512  # Landing withdrew what the broken ticks did not renew.


def test_the_status_is_json_with_a_value_or_a_reason_for_every_signal() -> None:
    from kvpilot.flight import Flight
    from kvpilot.publish.status import status
    from kvpilot.signals import SIGNALS

    world = World(policy())
    world.start_engine()
    world.ticks(1, waiting=11, running=1)
    described = json.loads(
        json.dumps(status(Flight("lab", world.pilot, None, None, None)), allow_nan=False)  # type: ignore[arg-type]
    )
    assert set(described["signals"]) == set(SIGNALS)
    assert all(("value" in each) != ("missing" in each) for each in described["signals"].values())
    assert described["signals"]["requests_waiting"]["value"] == 11
    assert described["signals"]["offered"]["missing"] == "not_provided"
    assert described["rules"][0]["state"] == "active"
    assert described["leases"][0]["confirmed"] is True
    assert described["actions"] == 1


def test_actions_are_changes_of_values_in_force_not_rows_of_the_journal() -> None:
    """A limit that is content holds baseline; one that moves with every tick acts with every move."""
    follow = policy(do="{knob: prefill_chunk_tokens, set: 16 * x, min: 16}", when="x >= 0.0")
    world = World(follow)
    world.start_engine()
    world.ticks(1, waiting=32, running=1)
    assert world.pilot.ledger.actions == 0
    for waiting in (31, 30, 29, 29):
        world.tick(waiting=waiting)
    assert world.pilot.ledger.actions == 3
    world.ticks(2)
    assert [row.after for row in world.pilot.ledger.recent] == [512, 496, 464]
    assert {row.verdict for row in world.pilot.ledger.recent} == {"applied"}


def test_a_change_that_moves_on_in_every_tick_is_confirmed_and_never_called_rejected() -> None:
    follow = policy(do="{knob: prefill_chunk_tokens, set: 16 * x, min: 16}", when="x >= 0.0")
    world = World(follow)
    world.start_engine()
    for tick in range(60):
        world.tick(waiting=10 + tick % 7, running=1)
    verdicts = [row.verdict for row in world.of(VerdictRecord)]
    assert set(verdicts) == {"applied"}
    assert len(verdicts) >= 5


def test_a_lease_names_the_decision_of_whoever_holds_it() -> None:
    """Otherwise a restarted pilot would hand the lease to the rule that let go of it."""
    low = policy(name="a-low", do="{knob: prefill_chunk_tokens, set: 64}")
    high = policy(name="z-high", when="x > 20.0", spec="priority: 200")
    high = high.replace("set: 64", "set: 128")
    world = World(low, high)
    world.start_engine()

    def holder() -> str:
        slot = newest_slot(world.engine_controls)
        assert slot is not None
        (lease,) = slot.leases
        rows = {row.number: row.policy for row in world.of(DecisionRecord)}  # type: ignore[attr-defined]
        return rows[lease.decision_id]

    world.tick(waiting=11, running=1)
    assert holder() == "a-low"
    world.tick(waiting=21)
    assert holder() == "z-high"
    world.tick(waiting=11)
    assert holder() == "a-low"


def test_an_adopted_lease_keeps_the_number_of_its_decision_and_is_no_action() -> None:
    wish = LeaseWish("prefill_chunk_tokens", Scope("all"), 64, 15 * NS, "guard", "act")
    world = World(policy(), adopted=[Adopted(wish, 41, 1000 * NS)])
    world.start_engine()
    world.ticks(2, waiting=11, running=1)
    slot = newest_slot(world.engine_controls)
    assert slot is not None
    assert [lease.decision_id for lease in slot.leases] == [41]
    assert world.pilot.ledger.actions == 0
    assert world.of(DecisionRecord) == []


def test_a_pilot_that_may_not_act_yet_says_what_it_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    """In the log once for each change, and in every tick for the status."""
    caplog.set_level("INFO", "kvpilot.pilot")
    world = World(arm=Arm(after=5.0, finished=20))
    world.start_engine()
    tick = world.ticks(1, running=1, finished_total=3)
    assert tick.arming == "in 4 s and after 17 more finished requests"
    assert world.ticks(5, finished_total=3).arming == "after 17 more finished requests"
    assert world.ticks(0.2, finished_total=20).arming is None
    said = [record.getMessage() for record in caplog.records if "arm" in record.getMessage()]
    assert len(said) == 2
    assert "until then rules run shadowed" in said[0]
    assert said[1] == "armed: rules act"


@pytest.mark.parametrize(("ours", "warned"), [(("batch", "interactive"), False), (("gold",), True)])
def test_classes_that_the_engine_does_not_have_are_named(
    ours: tuple[str, ...], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    by_class = {name: {"itl": 0.05, "ttft": 1.0} for name in ours}
    world = World(slo={"itl": 0.05, "ttft": 1.0, **by_class, "lowest": by_class[ours[0]]})
    world.start_engine()
    world.ticks(1, running=1)
    said = [record.getMessage() for record in caplog.records if "classes" in record.getMessage()]
    assert len(said) == warned
    if warned:
        assert "kvpilot.yaml has gold, this engine has batch, interactive" in said[0]
