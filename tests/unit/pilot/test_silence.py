"""What an engine says by saying nothing: its state, the alarms over it, and that nobody acts on stale
sight."""

from typing import Any

import pytest
from pilot_world import MemoryValve, World, manifest, policy

from kvpilot.adapters.adoption import adopt
from kvpilot.adapters.windows import Reading
from kvpilot.alerts.watch import (
    DEAD,
    HOOK_FAILED,
    OVER_AFTER_NS,
    RESTARTED,
    RESTARTED_FOR_NS,
    STALLED,
    WEDGED,
)
from kvpilot.clock import NS
from kvpilot.journal.records import DecisionRecord, EventRecord
from kvpilot.link.controls import Lease, Scope, newest_slot
from kvpilot.link.ending import Ending
from kvpilot.policy.load import load_text
from kvpilot.policy.rules import PolicySet
from kvpilot.publish.board import Tick
from kvpilot.signals import SIGNALS, Missing


class Server:
    """An engine and one valve. `tick` is a tick of the pilot while the engine steps or is silent."""

    def __init__(self, *policies: str, **world: Any) -> None:
        self.world = World(*policies, **world)
        self.world.start_engine()
        self.valve = MemoryValve(self.world)
        self.valve_writes = True
        self._tickets: list[int] = []

    def arrive(self, count: int = 1) -> None:
        for _ in range(count):
            self._tickets.append(self.valve.writer.admitted(0, "", 10, self.world.clock.monotonic_ns()))

    def leave(self, count: int = 1, byte: bool = True) -> None:
        """Responses end: with a last byte, or because their clients went away."""
        for _ in range(count):
            self.valve.writer.ended(self._tickets.pop(0))
        if byte:
            self.valve.writer.last_byte_ns = self.world.clock.monotonic_ns()

    def tick(self, steps: bool = True, **fields: float) -> Tick:
        if self.valve_writes:
            self.valve.look()
        return self.world.tick(**fields) if steps else self.world.only_tick()

    def pass_time(self, seconds: float, steps: bool = False, **fields: float) -> Tick:
        for _ in range(round(seconds * 10) - 1):
            self.tick(steps, **fields)
        return self.tick(steps, **fields)

    def states(self, seconds: float, steps: bool = False, **fields: float) -> list[str]:
        """Each state once, in the order in which they came."""
        seen: list[str] = []
        for _ in range(round(seconds * 10)):
            state = self.tick(steps, **fields).sight.liveness
            seen += [state] if seen[-1:] != [state] else []
        return seen

    def restart(self) -> None:
        self.world.start_engine()

    def die(self, ending: Ending | None = None) -> None:
        page = self.world.pages.engines[-1]
        if ending is not None:
            assert self.world.hook is not None
            self.world.hook.close(ending)
        page.alive = False


@pytest.fixture
def server() -> Server:
    server = Server()
    server.pass_time(1, steps=True, running=0, waiting=0)
    return server


def test_an_idle_engine_has_fresh_gauges_zero_rates_and_no_distributions() -> None:
    texts = [
        policy("gauge", "kv_occupancy", when="x >= 0.0"),
        policy("count", "preemptions", "rate", when="x > 1.0", window="window: 10s,"),
        policy("times", "itl_seconds", "p95", when="x > 1.0", window="window: 10s,"),
    ]
    server = Server(*texts)
    server.pass_time(1, steps=True, running=1, preemptions_total=3)
    server.tick(running=0, kv_blocks_free=90)
    tick = server.pass_time(60)
    assert tick.sight.liveness == "idle"
    assert tick.inputs["gauge", "x"] == pytest.approx(0.1)
    assert tick.inputs["count", "x"] == 0.0
    assert isinstance(tick.inputs["times", "x"], Missing)
    assert tick.inputs["times", "x"].reason == "no_samples"
    latest = server.world.pilot.board.latest
    provided = {name: reading for (name, c), reading in latest.items() if c is None}
    ages = [tick.at_ns - reading.at_ns for reading in provided.values() if isinstance(reading, Reading)]
    assert len(ages) >= len(SIGNALS) / 2
    assert max(ages) <= NS
    assert {r.reason for r in provided.values() if isinstance(r, Missing)} <= {"not_provided", "no_samples"}
    assert server.world.alarms == []


def test_an_engine_that_never_stepped_is_idle_and_its_signals_wait_for_samples() -> None:
    server = Server(policy())
    tick = server.pass_time(60)
    assert tick.sight.liveness == "idle"
    assert tick.inputs["guard", "x"] == Missing("no_samples")
    assert server.world.alarms == []


def test_an_engine_without_a_valve_is_never_wedged() -> None:
    world = World()
    world.start_engine()
    world.tick(running=0)
    assert {world.only_tick().sight.liveness for _ in range(600)} == {"idle"}


def test_long_answers_without_a_byte_are_no_alarm(server: Server) -> None:
    """Ten minutes of requests that are not streamed, while others come and are tokenized."""
    server.arrive(8)
    for second in range(600):
        server.arrive(second % 60 == 0)
        server.tick(running=8)
        server.pass_time(0.9, steps=True, running=9 + second // 60)
    server.leave(1)
    server.pass_time(60, steps=True, running=17)
    assert server.world.alarms == []


def test_answers_that_do_not_leave_are_seen_within_seconds_and_until_a_byte_leaves(server: Server) -> None:
    server.arrive(2)
    server.tick(running=2)
    server.tick(running=0, finished_total=2)
    assert server.states(10) == ["live", "wedged"]
    assert server.world.alarms == [(WEDGED, True)]
    (alarm,) = server.world.pilot.watch.firing.values()
    assert alarm.severity == "critical"
    assert alarm.summary == (
        "answers of engine 0000000000000001 do not leave: 2 requests are awaited at its valves, "
        "it has 0 running and 0 waiting"
    )
    assert "SIGTERM may not be enough" in alarm.description
    # Clients give up and others come: nothing has left, so nothing has ended.
    server.leave(2, byte=False)
    server.pass_time(60)
    server.arrive(1)
    server.tick(running=1)
    server.tick(running=0)
    server.pass_time(60)
    assert server.world.alarms == [(WEDGED, True)]
    server.leave(1)
    assert server.states(10) == ["idle"]
    assert server.world.alarms == [(WEDGED, True), (WEDGED, False)]


def test_the_wedge_is_found_within_seconds_of_the_first_lost_answer(server: Server) -> None:
    server.arrive()
    server.tick(running=0, finished_total=1)
    for number in range(100):
        if server.tick(steps=False).sight.liveness == "wedged":
            assert 4.5 <= number / 10 <= 6.5
            return
    raise AssertionError("it never came about")


def test_a_valve_that_hangs_is_no_wedge_and_is_known_as_silent(server: Server) -> None:
    server.arrive(2)
    server.tick(running=0, finished_total=2)
    server.valve_writes = False
    tick = server.pass_time(120)
    assert tick.sight.liveness == "idle"
    assert tick.sight.valve is not None
    assert (tick.sight.valve.silent, tick.sight.valve.awaited) == (1, None)
    assert tick.sight.valve.in_flight == 2, "what it counted is true all the same"
    assert server.world.alarms == []


def test_a_client_that_takes_no_bytes_is_no_wedge(server: Server) -> None:
    """A laptop that went to sleep over its stream: the engine has finished, and nobody else waits."""
    server.arrive()
    server.valve.writer.taking = 1
    server.tick(running=0, finished_total=1)
    assert server.pass_time(900).sight.liveness == "idle"
    assert server.world.alarms == []


def test_a_stalled_engine_is_one_alarm_however_often_it_moves_a_little(server: Server) -> None:
    for _ in range(5):
        server.tick(running=1)
        server.pass_time(4.5)
    assert server.world.alarms == [(STALLED, True)]
    (alarm,) = server.world.pilot.watch.firing.values()
    assert (alarm.severity, alarm.summary) == (
        "warning",
        "engine 0000000000000001 has 1 running and 0 waiting and makes no step",
    )
    server.pass_time(OVER_AFTER_NS[STALLED] / NS + 1, steps=True)
    assert server.world.alarms == [(STALLED, True), (STALLED, False)]


def test_a_moment_of_stall_is_a_state_and_no_alarm(server: Server) -> None:
    server.tick(running=1)
    assert server.states(3.5) == ["live", "stalled"]
    server.pass_time(10, steps=True)
    assert server.world.alarms == []


def test_an_engine_that_takes_requests_in_and_computes_none_is_stalled(server: Server) -> None:
    """Records may be written between steps: they are no steps."""
    world, hook = server.world, server.world.hook
    assert hook is not None
    server.tick(running=1, waiting=0)
    for waiting in range(40):
        world.values |= {"waiting": waiting, "time_ns": world.engine_now_ns}
        hook.begin_step(world.engine_now_ns)
        hook.end_step(tuple(int(world.values[name]) for name in world.fields))
        tick = server.tick(steps=False)
    assert tick.sight.liveness == "stalled"
    assert tick.sight.record is not None
    assert tick.sight.record.get("waiting") == 39


@pytest.mark.parametrize(
    ("ending", "alarm", "severity", "words"),
    [
        (None, DEAD, "critical", "vanished without a word, as by SIGKILL or the out-of-memory killer"),
        (Ending("closed", 1, 1), DEAD, "warning", "closed in order"),
        (
            Ending("exception", 1, 1, "RuntimeError\ncore.py:Core.step:10\nloop.py:run:5"),
            DEAD,
            "critical",
            "died of RuntimeError in Core.step, core.py line 10",
        ),
        (
            Ending("hook_failed", 1, 1, "ValueError"),
            HOOK_FAILED,
            "warning",
            "serves on unseen: kvpilot's own hook failed",
        ),
    ],
)
def test_an_engine_that_is_gone_is_an_alarm_that_says_how(
    server: Server, ending: Ending | None, alarm: str, severity: str, words: str
) -> None:
    server.die(ending)
    server.pass_time(1.5)
    assert server.world.alarms == []
    server.pass_time(60)
    assert server.world.alarms == [(alarm, True)]
    fired = server.world.pilot.watch.firing[alarm]
    assert (fired.severity, fired.summary) == (severity, f"engine 0000000000000001 {words}")
    details = [row.detail for row in server.world.of(EventRecord)]  # type: ignore[attr-defined]
    assert details[-2:] == [
        f"engine 0000000000000001 is dead: it {words}",
        f"{alarm} fires: engine 0000000000000001 {words}",
    ]
    server.restart()
    server.pass_time(1, steps=True)
    assert server.world.alarms[1:] == [(alarm, False), (RESTARTED, True)]


def test_a_restart_that_is_quick_is_one_alarm_and_a_crash_loop_is_one_that_lasts(server: Server) -> None:
    for _ in range(5):
        server.die()
        server.pass_time(1)
        server.restart()
        server.pass_time(60, steps=True)
    assert {change for change in server.world.alarms if change != (RESTARTED, True)} == set()
    fired = server.world.pilot.watch.firing[RESTARTED]
    assert fired.summary == (
        "the engine started again as 0000000000000006; "
        "0000000000000005 vanished without a word, as by SIGKILL or the out-of-memory killer"
    )
    assert server.world.pilot.watch.restarts == 5
    server.pass_time(RESTARTED_FOR_NS / NS, steps=True)
    assert server.world.alarms[-1] == (RESTARTED, False)


def test_the_first_start_that_a_pilot_meets_is_no_restart(server: Server) -> None:
    assert server.world.pilot.watch.restarts == 0
    assert server.world.alarms == []


def test_a_wedge_ends_with_the_start_that_was_in_it(server: Server) -> None:
    server.arrive(2)
    server.tick(running=0, finished_total=2)
    server.pass_time(10)
    server.restart()
    server.pass_time(2, steps=True, running=0, finished_total=0)
    assert server.world.alarms == [(WEDGED, True), (WEDGED, False), (RESTARTED, True)]


# What the pilot does meanwhile


def test_rules_do_not_act_on_what_a_stalled_engine_said_last() -> None:
    server = Server(
        policy("enters", "requests_waiting", when="x > 10.0", rule="for: 3s"),
        policy("holds", "kv_free_blocks", when="x < 50.0", spec="onMissing: hold\n  holdFor: 10s").replace(
            "prefill_chunk_tokens, set: 64", "speculative_tokens, set: 0"
        ),
    )
    server.pass_time(1, steps=True, running=1)
    assert server.tick(running=1, waiting=11, kv_blocks_free=10).sight.liveness == "live"
    tick = server.pass_time(5)
    assert tick.sight.liveness == "stalled"
    assert tick.inputs["enters", "x"].reason == "too_old"  # type: ignore[union-attr]
    assert [(lease.knob, lease.value) for lease in tick.leases] == [("speculative_tokens", 0)]
    tick = server.pass_time(10)
    assert tick.leases == (), "held as long as the policy says, and no longer"
    decided = [row for row in server.world.of(DecisionRecord) if row.rule == "act"]  # type: ignore[attr-defined]
    assert {row.policy for row in decided if row.verdict != "missing_input"} == {"holds"}


def test_rules_do_not_act_on_an_idle_engines_word_while_its_answers_are_stuck() -> None:
    server = Server(policy("guard", "kv_free_blocks", when="x > 10.0", spec="onMissing: hold\n  holdFor: 5s"))
    server.pass_time(1, steps=True, running=0, kv_blocks_free=5)
    server.arrive(2)
    server.tick(running=0, finished_total=2, kv_blocks_free=5)
    tick = server.pass_time(30)
    assert tick.sight.liveness == "wedged"
    assert tick.inputs["guard", "x"].reason == "too_old"  # type: ignore[union-attr]
    assert tick.leases == ()


def test_a_dead_engine_has_no_leases_and_neither_has_its_valve() -> None:
    server = Server(
        policy(spec="onMissing: hold\n  holdFor: 60s"),
        policy("shed", "in_flight", when="x >= 0.0", do="{knob: shed_fraction, set: 0.5}"),
    )
    tick = server.pass_time(1, steps=True, waiting=11, running=1)
    assert len(tick.leases) == 2
    server.die()
    tick = server.tick(steps=False)
    assert tick.leases == ()
    for page in (server.world.engine_controls, server.world.valve_controls):
        slot = newest_slot(page)
        assert slot is not None
        assert slot.leases == ()


def test_an_override_waits_for_the_next_start() -> None:
    server = Server()
    server.pass_time(1, steps=True, running=1)
    limits = server.world.sight().manifest.knob("prefill_chunk_tokens")  # type: ignore[union-attr]
    server.world.pilot.orders.override(
        "prefill_chunk_tokens", Scope("all"), 1024, 600.0, "test", "kim", limits
    )
    assert len(server.tick(running=1).leases) == 1
    server.die()
    assert server.tick(steps=False).leases == ()
    server.restart()
    server.pass_time(2, steps=True, running=1)
    assert server.world.knob("prefill_chunk_tokens") == 1024


@pytest.mark.parametrize("gap_s", [0.0, 3.0])
def test_a_restart_under_load_begins_at_baseline_whatever_rules_held(gap_s: float) -> None:
    """`onMissing: hold` holds through missing inputs, not from one engine to the next."""
    server = Server(policy(spec="onMissing: hold\n  holdFor: 60s", when="x > 10.0", rule="until: x < 2.0"))
    server.pass_time(2, steps=True, waiting=11, running=4)
    assert server.world.knob("prefill_chunk_tokens") == 64
    old = newest_slot(server.world.engine_controls)
    assert old is not None
    server.die()
    if gap_s:
        server.pass_time(gap_s)
    server.restart()
    in_force = []
    for _ in range(100):
        in_force.append(server.world.knob("prefill_chunk_tokens"))
        # Neither enough to begin nor little enough to end: only a claim that crossed over would act.
        server.tick(waiting=5, running=4)
    assert set(in_force) == {512}
    slot = newest_slot(server.world.engine_controls)
    assert slot is not None
    assert slot.leases == ()
    server.pass_time(1, steps=True, waiting=11)
    assert server.world.knob("prefill_chunk_tokens") == 64
    slot = newest_slot(server.world.engine_controls)
    assert slot is not None
    assert (old.nonce, slot.nonce) == (1, 2)


def test_decisions_on_their_way_to_an_engine_that_died_stay_unconfirmed() -> None:
    """Also when the next start reads tables that came after them."""
    drafts = policy("drafts", when="x > 20.0", do="{knob: speculative_tokens, set: 0}")
    server = Server(policy(), drafts)
    server.tick(waiting=21, running=1)
    server.die()
    server.tick(steps=False)
    server.restart()
    server.pass_time(5, steps=True, waiting=11)
    assert server.world.knob("prefill_chunk_tokens") == 64
    recent = server.world.pilot.ledger.recent
    verdicts = [row.verdict for row in recent if row.engine_nonce == 1]
    assert len(verdicts) == 4, "two were taken and withdrawn"
    assert set(verdicts) == {"unconfirmed"}
    assert [row.verdict for row in recent if row.engine_nonce == 2] == ["applied"]


@pytest.mark.parametrize(("nonce", "adopted"), [(1, 1), (2, 0)])
def test_leases_are_adopted_for_the_start_they_were_written_for_alone(nonce: int, adopted: int) -> None:
    """The valves' leases carry no nonce: the journal knows which engine they were meant for."""
    text = policy(do="{knob: shed_fraction, set: 0.5}")
    lease = Lease("shed_fraction", Scope("all"), 0.5, 15 * NS, 1, 41)
    row = DecisionRecord(41, 0, 1, "guard", "act", "shed_fraction", "all", None, 0.5, "applied", "")
    policies = PolicySet((load_text(text),))
    assert len(adopt([lease], lambda number: row, policies, nonce, 0)) == adopted


def test_a_pilot_without_the_valves_flies_the_engine_and_says_what_it_may_not_move() -> None:
    shed = policy("shed", do="{knob: shed_fraction, set: 0.5}")
    server = Server(policy(), shed, flies_valves=False)
    tick = server.pass_time(1, steps=True, waiting=11, running=1)
    assert [lease.knob for lease in tick.leases] == ["prefill_chunk_tokens"]
    assert server.world.knob("prefill_chunk_tokens") == 64
    assert server.world.valve_controls == bytes(len(server.world.valve_controls))
    rows = server.world.of(DecisionRecord)
    assert {(row.policy, row.verdict) for row in rows} >= {("shed", "unsupported")}  # type: ignore[attr-defined]
    server.die()
    assert server.tick(steps=False).leases == ()


def test_beside_other_ranks_their_requests_are_not_missed_here() -> None:
    world = World()
    described = manifest()
    world.start_engine(
        type(described)(
            **{f: getattr(described, f) for f in described.__dataclass_fields__}
            | {"world": {"dp": 2, "tp": 1, "pp": 1}}
        )
    )
    valve = MemoryValve(world)
    for _ in range(5):
        valve.writer.admitted(0, "", 10, 0)
    for _ in range(900):
        valve.look()
        tick = world.tick(running=0)
    assert tick.sight.liveness == "live"
