"""Closed-loop clients of a real vLLM: each sends its next request at that one's time, or when its last answer
came, whichever is later. An overloaded server is therefore asked later, not more; what a client never got
round to sending counts as unfinished, so that every leg is judged over the same work.

Tokens are timed by the engine (`vllm_lab.times`), not by the clients.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence

import httpx

from kvpilot.clock import NS, Clock
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.client import (
    CALLER_HEADER,
    Clients,
    Patience,
    _Attempt,
    _message,
    _retry_after_s,
    _shed,
)
from kvpilot.workload.outcome import Fate, Outcome
from vllm_lab.times import Times


class ClosedLoop(Clients):
    """`temperature` says how a request samples; prompts are ids below `vocabulary`, drawn by its seed."""

    def __init__(
        self,
        base_url: str,
        model: str,
        patience: Mapping[str, Patience],
        clock: Clock,
        times: Times,
        vocabulary: int,
        temperature: Callable[[Arrival], float],
        leg: str,
    ) -> None:
        super().__init__(base_url, model, lambda arrival: "", patience, clock)
        self._times = times
        self._vocabulary = vocabulary
        self._temperature = temperature
        self._leg = leg
        self._sent = 0

    async def run_clients(self, queues: Sequence[Sequence[Arrival]], drain_s: float) -> list[Outcome]:
        """Each queue is one client's arrivals, in order of time. Hangs up `drain_s` after the last is due."""
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2.0)
        async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as http:
            self._start_ns = self._clock.monotonic_ns()
            clients = [asyncio.create_task(self._client(queue, http)) for queue in queues if queue]
            last_s = max((queue[-1].at_s for queue in queues if queue), default=0.0)
            await self._clock.sleep_until(self._start_ns + round(last_s * NS))
            if clients:
                await asyncio.wait(clients, timeout=drain_s)
            self._draining = True
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        known = {outcome.arrival.seed for outcome in self.outcomes}
        self.outcomes += [
            Outcome(arrival, Fate.UNFINISHED, 0, 0.0, last_s + drain_s, error="never sent")
            for queue in queues
            for arrival in queue
            if arrival.seed not in known
        ]
        return self.outcomes

    async def _client(self, queue: Sequence[Arrival], http: httpx.AsyncClient) -> None:
        for arrival in queue:
            if self._draining:
                return
            await self._clock.sleep_until(self._start_ns + arrival.at_ns)
            await self._follow(arrival, http)

    async def _attempt(self, arrival: Arrival, http: httpx.AsyncClient) -> _Attempt:
        self._sent += 1
        name = f"{self._leg}_{self._sent}"
        request = {
            "model": self._model,
            "prompt": prompt_ids(arrival, self._vocabulary),
            "max_tokens": arrival.output_tokens,
            "ignore_eos": True,
            "temperature": self._temperature(arrival),
        }
        caller = f"{arrival.klass}/{arrival.tenant}" if arrival.tenant else arrival.klass
        try:
            response = await http.post(
                self._url, json=request, headers={CALLER_HEADER: caller, "X-Request-Id": name}
            )
        except httpx.HTTPError as error:
            return _Attempt(error=f"{type(error).__name__}: {error}"[:200])
        attempt = _Attempt(response.status_code, shed=_shed(response), retry_after_s=_retry_after_s(response))
        if response.status_code == 200:
            # The engine writes its line before it answers.
            attempt.body = {"kvpilot": self._times.take(name)}
        else:
            attempt.error = _message(response.json()) or f"HTTP {response.status_code}"
        return attempt


def prompt_ids(arrival: Arrival, vocabulary: int) -> list[int]:
    """Random ids, the same for the same arrival in every leg; the first few hundred are left to specials."""
    rng = random.Random(f"prompt/{arrival.seed}")
    return [rng.randrange(10, vocabulary) for _ in range(arrival.prompt_tokens)]


def deal(arrivals: Sequence[Arrival], clients: int) -> list[list[Arrival]]:
    """Arrivals to clients, round robin in order of time."""
    return [list(arrivals[first::clients]) for first in range(clients)]
