"""One engine with its valve and, if there is one, its pilot, in virtual time.

    replica = Replica(deployment, plant, promises, policies)
    outcomes = replica.fly(arrivals, drain_s=60)

or, where somebody else hands out arrivals: `offer` each, `fly_to` a moment, and in the end `land`. While a
step is computed time passes for everybody: clients come, leave and return, the pilot ticks at 10 Hz; what
they want of the engine waits for its next step boundary, as it would in the engine's channel.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from kvpilot.clock import NS, VirtualClock
from kvpilot.inside.valve_law import Decision
from kvpilot.link.controls import CONTROLS_BYTES
from kvpilot.link.telemetry import TelemetryReader
from kvpilot.pilot import TICK_NS
from kvpilot.policy.rules import PolicySet
from kvpilot.recordings.recorded import Held
from kvpilot.recordings.recorder import Moment
from kvpilot.score import EngineTotals
from kvpilot.simulate.agenda import Agenda
from kvpilot.simulate.clients import Clients, Prompt
from kvpilot.simulate.cockpit import Cockpit
from kvpilot.simulate.deployment import Deployment, Promises
from kvpilot.simulate.engine import build_engine
from kvpilot.simulate.faults import Fault
from kvpilot.simulate.pages import MemoryPages
from kvpilot.simulate.plants.acceptance import Acceptance, Fixed
from kvpilot.simulate.plants.plant import Plant
from kvpilot.simulate.recorded_hand import RecordedHand
from kvpilot.simulate.stability import Range
from kvpilot.simulate.valve import VirtualValve
from kvpilot.simulate.wire import Wire
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.outcome import Outcome

START_NS = 1_000 * NS
"""Virtual time begins here: 0 would mean "never" to those who note when something happened."""
CAPPED = Decision(False, 429, 1.0, "the queue is full", "fraction")


def plain_prompt(arrival: Arrival) -> list[int]:
    """Token ids of a prompt that nobody shares, where no prefix cache looks at them."""
    return [1] * arrival.prompt_tokens


class Replica:
    """See the module docstring. `policies` None: nobody flies it, and it stays at its baselines."""

    def __init__(
        self,
        deployment: Deployment,
        plant: Plant,
        promises: Promises,
        policies: PolicySet | None = None,
        acceptance: Acceptance | None = None,
        prompt: Prompt = plain_prompt,
        faults: Sequence[Fault] = (),
        journalled: bool = True,
        record: Callable[[Moment], object] | None = None,
        decided: Sequence[Held] | None = None,
    ) -> None:
        """`record` takes what each tick saw and did. `decided`: nobody decides, and these leases are in force
        at their times.
        """
        self.deployment = deployment
        self.clock = VirtualClock(START_NS)
        self.agenda = Agenda(self.clock)
        pages, slo = MemoryPages(), promises.for_policies(deployment.classes)
        self.cockpit: Cockpit | None = None
        if policies is not None:
            self.cockpit = Cockpit(
                *(self.clock, pages, policies, slo, deployment.classes),
                faults=faults,
                now_s=lambda: self.now_s,
                journalled=journalled,
                record=record,
            )
        self.hand = self.cockpit if decided is None else RecordedHand(self.clock, decided)
        """Who moves the knobs, if anybody does."""
        hand = self.hand
        self.valve = VirtualValve(
            self.clock, deployment.classes, hand.valve_controls if hand else bytearray(CONTROLS_BYTES)
        )
        self._wire = Wire(self.agenda, self._hear)
        self.clients = Clients(
            self.agenda,
            self,
            self._tell_engine,
            deployment.classes,
            promises.patience,
            prompt,
            START_NS,
        )
        self.engine = build_engine(
            deployment,
            plant,
            self._wire,
            self._spend,
            self.clock,
            hand.engine_controls if hand else bytearray(CONTROLS_BYTES),
            acceptance or Fixed(0.7),
            self._domain,
            piloted=hand is not None,
            faults=faults,
            requests=record is not None,
        )
        self._offered = 0
        self._recorded = record is not None
        if hand is not None:
            pages.engines.append(self.engine.page)
            pages.valve_pages.append(self.valve.page)
            self.agenda.at(START_NS, self._tick)

    @property
    def now_s(self) -> float:
        """Seconds of the run."""
        return (self.clock.monotonic_ns() - START_NS) / NS

    @property
    def outcomes(self) -> list[Outcome]:
        return self.clients.outcomes

    def fly(self, arrivals: Iterable[Arrival], drain_s: float) -> list[Outcome]:
        """All of them, in order of time, and up to `drain_s` after the last; then whoever is left is told
        that it is over.
        """
        last_s = 0.0
        for arrival in arrivals:
            # One ahead of time is enough, and a trace may be long.
            self.fly_to(arrival.at_s - 0.1)
            self.offer(arrival)
            last_s = arrival.at_s
        self.fly_to(last_s)
        self.drain(last_s + drain_s)
        return self.land()

    def drain(self, until_s: float) -> None:
        """Until everybody has an outcome, at most until that second of the run."""
        while self._open and self.now_s < until_s:
            self._turn(until_s)

    @property
    def _open(self) -> int:
        """Arrivals without an outcome, those that are still to come among them."""
        return self._offered - len(self.outcomes)

    def offer(self, arrival: Arrival) -> None:
        """It comes at its time, or at once where that has passed."""
        self._offered += 1
        self.agenda.at(START_NS + arrival.at_ns, partial(self.clients.arrive, arrival))

    def fly_to(self, at_s: float) -> None:
        """Until that second of the run; a step under way is finished."""
        while self.now_s < at_s:
            self._turn(at_s)

    def land(self) -> list[Outcome]:
        """End the run. Checks that nothing was lost."""
        if self._recorded and self.hand is not None:
            # What ended since the last tick is part of the recording.
            self.hand.tick()
        self.clients.hang_up()
        self.engine.conservation.at_end(self.clients.arrived, self.outcomes)
        return self.outcomes

    @property
    def totals(self) -> EngineTotals:
        """What the engine counted."""
        core = self.engine.core
        return EngineTotals(
            core.totals.oom,
            core.scheduler.preemptions_total,
            core.totals.recomputed_tokens,
            kv_occupancy_max=self.engine.conservation.most_blocks / self.deployment.blocks,
        )

    @property
    def knob_ranges(self) -> dict[str, Range]:
        """As the engine tells its pilot; empty without one."""
        if self.hand is None:
            return {}
        knobs = TelemetryReader(self.engine.page.read_at).manifest.knobs
        return {knob.name: (knob.minimum, knob.maximum, knob.baseline) for knob in knobs}

    @property
    def actions(self) -> int:
        """Changes of knob values by the pilot."""
        return self.hand.actions if self.hand is not None else 0

    def _turn(self, until_s: float) -> None:
        self._wire.until_ns = START_NS + round(until_s * NS)
        self.engine.loop.turn()
        self.engine.conservation.after_turn()

    def _spend(self, seconds: float) -> None:
        """A step takes so long; the world goes on meanwhile."""
        self.agenda.pass_to(self.clock.monotonic_ns() + max(1, round(seconds * NS)))

    def _tick(self) -> None:
        assert self.hand is not None
        self.valve.poll()
        self.hand.tick()
        self.agenda.at(self.clock.monotonic_ns() + TICK_NS, self._tick)

    def _tell_engine(self, message: list[Any]) -> None:
        self._wire.inbox.append(message)

    def _hear(self, message: list[Any]) -> None:
        self.clients.hear(message)

    def _domain(self, request_id: int) -> str:
        visit = self.clients.served.get(request_id)
        # Its client has just gone: the step that computes its last tokens began before.
        return visit.arrival.domain if visit is not None else ""

    # The door (`clients.Door`): a static setting's cap on the queue, then the valve.

    def admit(self, level: int, arrival: Arrival, body_bytes: int, drawn: float) -> tuple[Decision, int]:
        cap = self.deployment.queue_caps.get(arrival.klass)
        if cap is not None and self._waiting(level) >= cap:
            self.valve.turned_away(level, arrival.tenant, body_bytes)
            return CAPPED, 0
        return self.valve.admit(level, arrival.tenant, body_bytes, drawn)

    def _waiting(self, level: int) -> int:
        queue: int = self.engine.core.scheduler.waiting.waiting_by_level[level]
        return queue + sum(1 for message in self._wire.inbox if message[0] == "add" and message[4] == level)

    def ended(self, ticket: int) -> None:
        self.valve.counts.ended(ticket)

    def byte_left(self, first: bool) -> None:
        now_ns = self.valve.counts.last_byte_ns = self.clock.monotonic_ns()
        if first:
            self.valve.counts.first_byte_ns = now_ns
