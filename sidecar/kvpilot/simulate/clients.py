"""Clients in virtual time: they come, lose patience, hang up, and come back when told to.

The rules are those of `kvpilot.workload.client`: a retry keeps its first arrival and counts once, patience
counts from the first attempt, `Retry-After` is honoured in whole seconds. Every arrival has exactly one
outcome. Nothing is random but the valve's jitter, which is each arrival's own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from kvpilot.clock import NS
from kvpilot.inside.valve_law import Decision
from kvpilot.simulate.agenda import Agenda
from kvpilot.simulate.emissions import Emissions
from kvpilot.simulate.plants.acceptance import uniform
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.client import Patience
from kvpilot.workload.outcome import Fate, Outcome

BYTES_PER_TOKEN = 4
"""Of a prompt's body."""
_JITTER = 1 << 32
"""Draws of `uniform` from here on are the jitter's: output positions lie below."""

Prompt = Callable[[Arrival], list[int]]
"""The prompt's token ids, as many as the arrival says."""


class Door(Protocol):
    """Where requests come in: a valve, or something in front of one."""

    def admit(self, level: int, arrival: Arrival, body_bytes: int, drawn: float) -> tuple[Decision, int]: ...
    def ended(self, ticket: int) -> None: ...
    def byte_left(self, first: bool) -> None: ...


@dataclass(slots=True, eq=False)
class Visit:
    """One arrival on its way to its outcome. Times are the virtual clock's."""

    arrival: Arrival
    level: int
    first_ns: int
    attempts: int = 0
    sent_ns: int = 0
    """When the newest attempt left, or will."""
    request_id: int | None = None
    """While the engine has it."""
    ticket: int = 0
    emitted: Emissions = field(default_factory=Emissions)
    over: bool = False


class Clients:
    """All clients of one engine."""

    def __init__(
        self,
        agenda: Agenda,
        door: Door,
        tell_engine: Callable[[list[Any]], None],
        classes: Sequence[str],
        patience: Mapping[str, Patience],
        prompt: Prompt,
        start_ns: int,
    ) -> None:
        self._agenda = agenda
        self._door = door
        self._tell_engine = tell_engine
        self._levels = {name: level for level, name in enumerate(classes)}
        self._patience = patience
        self._prompt = prompt
        self._start_ns = start_ns
        self._requests = 0
        self.served: dict[int, Visit] = {}
        """By request id: those that the engine has, or is about to have."""
        self._present: dict[Visit, None] = {}
        self.arrived = 0
        self.outcomes: list[Outcome] = []
        """In order of ending."""

    @property
    def open(self) -> int:
        """Arrivals without an outcome."""
        return len(self._present)

    def arrive(self, arrival: Arrival) -> None:
        """A new one, now. Raises KeyError for a class that the engine does not have."""
        now_ns = self._agenda.clock.monotonic_ns()
        visit = Visit(arrival, self._levels[arrival.klass], now_ns)
        self.arrived += 1
        self._present[visit] = None
        self._attempt(visit)
        if not visit.over:
            give_up_ns = now_ns + round(self._patience[arrival.klass].answer_s * NS)
            self._agenda.at(give_up_ns, partial(self._give_up, visit))

    def _attempt(self, visit: Visit) -> None:
        if visit.over:
            return
        arrival, now_ns = visit.arrival, self._agenda.clock.monotonic_ns()
        visit.attempts += 1
        visit.sent_ns = now_ns
        drawn = uniform(arrival.seed, _JITTER + visit.attempts)
        body_bytes = arrival.prompt_tokens * BYTES_PER_TOKEN
        decision, visit.ticket = self._door.admit(visit.level, arrival, body_bytes, drawn)
        if not decision.admitted:
            self._turned_away(visit, decision, now_ns)
            return
        self._requests += 1
        visit.request_id = self._requests
        self.served[visit.request_id] = visit
        sampling = {"max_tokens": arrival.output_tokens, "seed": arrival.seed, "ignore_eos": True}
        self._tell_engine(
            [
                "add",
                visit.request_id,
                self._prompt(arrival),
                sampling,
                visit.level,
                arrival.tenant or None,
                now_ns,
            ]
        )

    def _turned_away(self, visit: Visit, decision: Decision, now_ns: int) -> None:
        patience = self._patience[visit.arrival.klass]
        after_s = math.ceil(decision.retry_after_s)
        waited_s = (now_ns - visit.first_ns) / NS
        if visit.attempts > patience.retries or waited_s + after_s >= patience.answer_s:
            self._end(visit, Fate.SHED, decision.status)
            return
        visit.sent_ns = now_ns + after_s * NS
        self._agenda.at(visit.sent_ns, partial(self._attempt, visit))

    def _give_up(self, visit: Visit) -> None:
        if visit.over:
            return
        if visit.request_id is not None:
            self._tell_engine(["cancel", visit.request_id])
        self._end(visit, Fate.ABANDONED, error="the client lost patience")

    def hear(self, message: list[Any]) -> None:
        """What the engine says."""
        if message[0] == "out":
            at_ns, rows = message[1], message[2]
            served, begins = self.served, False
            for request_id, tokens, finish, *_ in rows:
                visit = served.get(request_id)
                if visit is None:  # Its client has gone; the engine hears of that at its next step.
                    continue
                begins = begins or not visit.emitted
                visit.emitted.add(at_ns, len(tokens))
                if finish is not None:
                    self._end(visit, Fate.FINISHED, 200)
            self._door.byte_left(begins)
            return
        _, request_id, status, why = message
        visit = self.served.get(request_id)
        if visit is not None:
            self._end(visit, Fate.FAILED, status, why)

    def hang_up(self) -> None:
        """The run is over: whoever is still there is unfinished. Retries that would come do not."""
        for visit in list(self._present):
            self._end(visit, Fate.UNFINISHED, error="still running when the run ended")

    def _end(self, visit: Visit, fate: Fate, status: int | None = None, error: str | None = None) -> None:
        assert not visit.over, f"{visit.arrival} ends twice"
        visit.over = True
        del self._present[visit]
        if visit.request_id is not None:
            del self.served[visit.request_id]
            self._door.ended(visit.ticket)
        now_ns, finished = self._agenda.clock.monotonic_ns(), fate is Fate.FINISHED
        self.outcomes.append(
            Outcome(
                arrival=visit.arrival,
                fate=fate,
                attempts=visit.attempts,
                waited_s=(visit.sent_ns - visit.first_ns) / NS,
                ended_at_s=(now_ns - self._start_ns) / NS,
                http_status=status,
                error=error,
                received_ns=visit.sent_ns if finished else 0,
                emitted=visit.emitted if finished else (),
            )
        )
