"""The step loop: knobs, arrivals, one step, what came out, the record; and again. It waits only when idle.

One iteration is a *step boundary*: leases are read and expire here, arrivals and cancellations take effect
here, and nowhere else. Nothing in it blocks on the API process, and it ends when that process does.

Messages from the API process: `["add", id, prompt, sampling, level, tenant, received_ns, choices, pin,
eviction]` (of several choices the others have the ids, and seeds, that follow; beams are choices that come
whole, best first), `["cancel", id]` (the client went away), `["stop", id]` (its text reached a stop string),
`["reject", 0]` (one was refused before it came here).
To it: `["out", emitted_ns, [[id, tokens, finish or null, first_scheduled_ns, preemptions, logprob], ...]]`
and `["fail", id, status, message]`.
"""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from kvengine.channel import Channel
from kvengine.config import ExternalMemory
from kvengine.core import Core, Step
from kvengine.errors import ChannelClosed
from kvengine.kv.eviction.policy import UNDER_PRESSURE, Eviction
from kvengine.request import Request, SamplingParams
from kvengine.sched.beam import BeamGroup
from kvengine.sched.scheduler import Knobs
from kvengine.telemetry import Telemetry
from kvpilot.clock import NS, Clock

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.05
"""An idle engine looks at its controls this often: it must already know its pilot when a burst arrives."""


class Neighbour(Protocol):
    """Whoever can take device memory from outside the engine."""

    def set_external(self, size_bytes: int) -> int: ...


class EngineLoop:
    """Drives a core between a channel and the telemetry."""

    def __init__(
        self,
        core: Core,
        telemetry: Telemetry,
        channel: Channel,
        clock: Clock,
        external: tuple[ExternalMemory, Neighbour] | None = None,
        evict_tenants: Sequence[str] = (),
    ) -> None:
        self._core = core
        self._telemetry = telemetry
        self._channel = channel
        self._clock = clock
        self._external = external
        self._evict_tenants = frozenset(evict_tenants)
        self._started_ns = clock.monotonic_ns()

    def run(self) -> None:
        """Until the API process is gone."""
        try:
            while True:
                self.turn()
        except ChannelClosed:
            log.info("the API process is gone; stopping")
        except BaseException as error:
            self._telemetry.last_words(error)
            raise
        finally:
            self._telemetry.close()

    def turn(self) -> None:
        """One step boundary and, if there is work, the step after it. Raises ChannelClosed."""
        now_ns = self._clock.monotonic_ns()
        if self._external is not None:
            self._let_neighbour_in(now_ns)
        knobs = self._telemetry.knobs(now_ns)
        for message in self._channel.receive():
            self._take(message)
        if self._core.requests:
            step = self._core.step(knobs)
            self._report(step)
            self._telemetry.record(step, knobs)
        else:
            self._idle(now_ns, knobs)

    def _take(self, message: list[Any]) -> None:
        kind, request_id, *rest = message
        if kind == "cancel":
            self._core.cancel(request_id)
        elif kind == "stop":
            self._core.stop(request_id)
        elif kind == "reject":
            self._core.count_rejected()
        else:
            self._accept(request_id, *rest)

    def _accept(
        self,
        request_id: int,
        prompt: list[int],
        sampling: dict[str, Any],
        level: int,
        tenant: str | None,
        received_ns: int,
        choices: int = 1,
        pin: bool = False,
        eviction: dict[str, Any] | None = None,
    ) -> None:
        evicts = Eviction.from_wire(eviction)
        if evicts is None and tenant in self._evict_tenants and not sampling.get("beams"):
            evicts = UNDER_PRESSURE
        first, *others = [
            Request(
                request_id + number,
                prompt,
                SamplingParams(**{**sampling, "seed": sampling.get("seed", 0) + number}),
                level,
                tenant,
                received_ns,
                pin=pin,
                eviction=evicts,
            )
            for number in range(choices)
        ]
        if first.sampling.beams:
            BeamGroup([first, *others])
        else:
            first.add_forks(others)
        reason = self._core.accept(first)
        if reason is not None:
            for request in (first, *others):
                self._channel.send(["fail", request.id, 400, reason])

    def _report(self, step: Step) -> None:
        rows = [
            (
                e.request.id,
                e.tokens if e.request.group is None else e.request.tokens[len(e.request.prompt) :],
                e.finish,
                e.request.first_scheduled_ns,
                e.request.preemptions,
                e.request.logprob,
            )
            for e in step.emissions
            # Which beams were worth telling is known at the end.
            if e.request.group is None or e.finish is not None
        ]
        if rows:
            self._channel.send(["out", step.ended_ns, rows])
        elif self._channel.unsent:
            self._channel.flush()
        for failure in step.failures:
            self._channel.send(["fail", failure.request.id, failure.status, failure.message])

    def _idle(self, now_ns: int, knobs: Knobs) -> None:
        self._telemetry.record_idle(now_ns, knobs)
        wait_s = IDLE_WAIT_S
        expiry_ns = self._telemetry.wake_by_ns()
        if expiry_ns is not None:
            wait_s = min(wait_s, max(0.0, (expiry_ns - now_ns) / NS))
        if self._channel.unsent:
            self._channel.flush()
        self._channel.wait(wait_s)

    def _let_neighbour_in(self, now_ns: int) -> None:
        external, neighbour = self._external or (None, None)
        if external and neighbour and now_ns - self._started_ns >= external.after_s * NS:
            taken_bytes = neighbour.set_external(external.bytes)
            log.warning("a neighbour took %.1f MiB of device memory", taken_bytes / 2**20)
            self._external = None
