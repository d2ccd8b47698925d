"""Several API-server processes share credits by the load that each is offered, and never accept more than all
were granted plus one request each, whoever comes, goes, hangs, or looks when."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from valve_world import ALL, Pilot, ValveProcess

from kvpilot.clock import NS
from kvpilot.inside.shares import LOOK_NS, NEW_NS, Claim, Shares
from kvpilot.link.controls import Scope

MS = NS // 1000
POLL_NS = 20 * MS
TICK_NS = 100 * MS
BATCH = Scope("class_at_most", 0)


class World:
    """Processes behind one socket, a pilot that renews, and a count of what was accepted of each grant."""

    def __init__(self, processes: int = 0, seed: int = 0) -> None:
        self.now_ns = 1000 * NS
        self.rng = random.Random(seed)
        self.pilot = Pilot()
        self.page = bytes(self.pilot.page)
        self.processes: list[ValveProcess] = []
        self.granted: dict[int, float] = {}
        self.accepted: Counter[int] = Counter()
        self.last: Counter[tuple[int, int]] = Counter()
        self.offered: Counter[int] = Counter()
        self.admitted: Counter[int] = Counter()
        for _ in range(processes):
            self.start()

    @property
    def live(self) -> list[ValveProcess]:
        return [process for process in self.processes if process.alive]

    def start(self) -> ValveProcess:
        process = ValveProcess(self.now_ns, len(self.processes) + 1)
        self.processes.append(process)
        process.look(self.processes, self.now_ns)
        return process

    def grant(self, value: float, scope: Scope = ALL) -> None:
        self.page = self.pilot.grant((scope, value))
        self.granted[self.pilot.renewal] = value

    def request(self, process: ValveProcess, tokens: int) -> bool:
        number = self.processes.index(process)
        self.offered[number] += tokens
        held = process.law._leases.held
        admitted = process.admit(tokens, self.now_ns).admitted
        if admitted and held:
            renewal = held[0].lease.renewal
            self.accepted[renewal] += tokens
            self.last[renewal, number] = tokens
            self.admitted[number] += tokens
        return admitted

    def conserves(self) -> bool:
        """Of each grant no more was accepted than all of it, and one request of each process."""
        overdrafts: Counter[int] = Counter()
        for (renewal, _), tokens in self.last.items():
            overdrafts[renewal] += tokens
        return all(
            accepted <= self.granted[renewal] + overdrafts[renewal] + 1e-6
            for renewal, accepted in self.accepted.items()
        )

    def run(self, seconds: float, loads: dict[int, float], grant: float, size: int = 10) -> None:
        """Requests at `loads` (tokens a second, by process), a grant every tick, watches every 0.2 s."""
        owed: Counter[int] = Counter()
        for step in range(round(seconds * NS / POLL_NS)):
            if step * POLL_NS % TICK_NS == 0:
                self.grant(grant)
            for number, process in enumerate(self.processes):
                if not process.alive:
                    continue
                if self.now_ns - process.looked_ns >= LOOK_NS + number * 37 * MS:
                    process.look(self.processes, self.now_ns)
                process.poll(self.page, self.now_ns)
                owed[number] += round(loads.get(number, 0) * POLL_NS / NS * 1000)
                while owed[number] >= size * 1000:
                    owed[number] -= size * 1000
                    self.request(process, size)
            self.now_ns += POLL_NS

    def shares(self) -> list[float]:
        return [process.share() for process in self.live]


class TestShares:
    def test_alone_everything(self) -> None:
        world = World(1)
        world.run(0.5, {0: 1000}, 50)
        assert world.shares() == [1.0]

    def test_equal_until_load_tells_them_apart(self) -> None:
        world = World(4)
        world.run(4, {}, 100)
        assert world.shares() == [0.25] * 4

    def test_those_that_run_already_share_a_new_lease_equally_at_once(self) -> None:
        world = World(2)
        world.now_ns += NEW_NS
        for process in world.live:
            process.look(world.processes, world.now_ns)
        world.run(0.3, {0: 1000, 1: 1000}, 50)
        assert world.shares() == [0.5, 0.5]

    @pytest.mark.parametrize("loads", [(3000, 1000), (1000, 1000), (0, 2000), (900, 50, 50)])
    def test_by_the_load_once_it_has_been_seen(self, loads: tuple[float, ...]) -> None:
        world = World(len(loads))
        world.run(40, dict(enumerate(loads)), 60)
        total, even = sum(loads), 1 / len(loads)
        expected = [0.9 * load / total + 0.1 * even for load in loads]
        assert world.shares() == pytest.approx(expected, abs=0.05)
        assert sum(world.shares()) > 0.97

    def test_what_is_granted_is_used_although_it_is_shared(self) -> None:
        """Uneven load, more than is granted: within a few percent of what one process would accept."""
        world = World(3)
        world.run(20, {0: 2000, 1: 500, 2: 500}, 100)
        before = sum(world.admitted.values())
        world.run(20, {0: 2000, 1: 500, 2: 500}, 100)
        assert 0.93 < (sum(world.admitted.values()) - before) / (20 * 1000) <= 1.01
        assert world.conserves()

    def test_load_that_moves_to_another_process_is_followed(self) -> None:
        world = World(2)
        world.run(20, {0: 2000, 1: 100}, 100)
        assert world.shares()[0] > 0.85
        world.run(20, {0: 100, 1: 2000}, 100)
        assert world.shares()[1] > 0.85
        assert world.conserves()

    def test_the_dead_do_not_count(self) -> None:
        world = World(2)
        world.run(5, {0: 1000, 1: 1000}, 100)
        world.processes[1].alive = False
        world.run(8, {0: 1000}, 100)
        assert world.shares() == [pytest.approx(1.0, abs=0.01)]

    def test_a_newcomer_waits_until_it_must_have_been_seen_and_then_gets_its_share(self) -> None:
        world = World(1)
        world.run(5, {0: 2000}, 100)
        newcomer = world.start()
        world.run(2, {0: 1000, 1: 1000}, 100)
        assert newcomer.share() == 0.0
        world.run(30, {0: 1000, 1: 1000}, 100)
        assert world.shares() == pytest.approx([0.5, 0.5], abs=0.05)
        assert world.conserves()

    @pytest.mark.parametrize("count", [2, 3, 5])
    def test_those_that_look_at_the_same_moments_do_not_block_each_other(self, count: int) -> None:
        """All want the room that a dead sibling left, and see it at once."""
        processes = [Shares(0) for _ in range(count)]
        now_ns, written = NEW_NS, [{ALL: Claim(0.0, 0.0)}] * count
        for number in range(60):
            gone = [{ALL: Claim(0.6, 0.0)}] if number < 20 else []
            for index, shares in enumerate(processes):
                shares.look(now_ns, {ALL: 0}, [*(written[i] for i in range(count) if i != index), *gone])
            for shares in processes:
                shares.usable(ALL, 0, now_ns)
            written = [{ALL: shares.claimed(ALL)} for shares in processes]
            now_ns += LOOK_NS
        assert [shares.usable(ALL, 0, now_ns) for shares in processes] == pytest.approx([1 / count] * count)

    def test_an_idle_process_can_accept_its_first_request(self) -> None:
        world = World(2)
        world.run(30, {0: 2000}, 100)
        assert 0.04 < world.shares()[1] < 0.06
        assert world.request(world.processes[1], 10)

    def test_each_scope_has_shares_of_its_own(self) -> None:
        """One class's clients all sit on one connection."""
        world = World(2)
        for step in range(2000):
            if step % 5 == 0:
                world.pilot.renewal += 1
                world.page = world.pilot.grant((BATCH, 100.0), (ALL, 200.0))
            for number, process in enumerate(world.live):
                if world.now_ns - process.looked_ns >= LOOK_NS:
                    process.look(world.processes, world.now_ns)
                process.poll(world.page, world.now_ns)
                process.admit(20, world.now_ns, level=number)
            world.now_ns += POLL_NS
        assert world.processes[0].share(BATCH) == pytest.approx(0.95, abs=0.03)
        assert world.processes[0].share(ALL) == pytest.approx(0.5, abs=0.05)


EVENTS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 3), st.integers(1, 60)),
    st.tuples(st.just("ask"), st.just(0), st.integers(1, 60)),
    st.tuples(st.just("grant"), st.integers(0, 300), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 400), st.just(0)),
    st.tuples(st.just("hang"), st.integers(0, 3), st.integers(1, 8)),
    st.tuples(st.sampled_from(["start", "kill", "withdraw"]), st.integers(0, 3), st.just(0)),
)


class TestConservation:
    @settings(max_examples=150, deadline=None)
    @given(st.integers(1, 3), st.integers(0, 2**32), st.lists(EVENTS, max_size=150))
    def test_no_grant_is_ever_accepted_twice(
        self, count: int, seed: int, events: list[tuple[str, int, int]]
    ) -> None:
        """Whatever is offered to whom, whoever is born or dies; looks come at any moment, a second apart. A
        process that hangs neither looks nor polls nor serves meanwhile, for seconds."""
        world = World(count, seed)
        hanging: dict[int, int] = {}
        for what, first, second in events:
            number = first % max(len(world.processes), 1)
            process = world.processes[number]
            if what == "ask" and process.alive and number not in hanging:
                for _ in range(5):
                    world.request(process, second)
            elif what == "grant":
                world.grant(float(first))
            elif what == "hang":
                hanging[number] = world.now_ns + second * NS // 2
            elif what == "start" and len(world.live) < 4:
                world.start()
            elif what == "kill" and len(world.live) > 1:
                process.alive = False
            elif what == "withdraw":
                world.page = world.pilot.grant()
            elif what == "wait":
                self.pass_time(world, first * MS, hanging)
            assert world.conserves()
            assert sum(world.shares()) <= 1 + 1e-6

    def pass_time(self, world: World, duration_ns: int, hanging: dict[int, int]) -> None:
        """In steps of one poll; every process that does not hang polls and, sometimes late, looks."""
        for _ in range(-(-duration_ns // POLL_NS)):
            world.now_ns += POLL_NS
            for number, process in enumerate(world.processes):
                if hanging.get(number, 0) > world.now_ns or not process.alive:
                    continue
                hanging.pop(number, None)
                if world.now_ns - process.looked_ns >= LOOK_NS + world.rng.randrange(200) * MS:
                    process.look(world.processes, world.now_ns)
                process.poll(world.page, world.now_ns)

    @settings(max_examples=100, deadline=None)
    @given(st.integers(2, 5), st.integers(0, 2**32))
    def test_claims_that_were_not_written_at_once_are_not_used(self, count: int, seed: int) -> None:
        """A process may be stopped between its look and its writing, for as long as it likes: what is in use
        never adds up to more than 1."""
        rng = random.Random(seed)
        now_ns = 0
        processes = [Shares(now_ns) for _ in range(count)]
        written: list[dict[Scope, Claim]] = [{} for _ in processes]
        offered = [0] * count
        now_ns += NEW_NS
        for index, shares in enumerate(processes):
            shares.look(now_ns, {}, [written[i] for i in range(count) if i != index])
        for index, shares in enumerate(processes):
            shares.usable(ALL, 0, now_ns)
            written[index] = {ALL: shares.claimed(ALL)}
        looked = [False] * count
        for _ in range(200):
            now_ns += rng.randrange(NS)
            index = rng.randrange(count)
            offered[index] += rng.choice([0, 0, 10, 1000])
            if looked[index] or rng.random() < 0.3:
                written[index] = {ALL: processes[index].claimed(ALL)}
                looked[index] = False
            else:
                siblings = [dict(written[i]) for i in range(count) if i != index]
                processes[index].look(now_ns, {ALL: offered[index]}, siblings)
                looked[index] = True
            assert sum(shares.usable(ALL, 0, now_ns) for shares in processes) <= 1 + 1e-6
