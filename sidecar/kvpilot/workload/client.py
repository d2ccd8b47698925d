"""Clients as they are: they come when they come, lose patience, hang up, and come back when told to.

Open loop: an arrival is sent at its own time whatever became of those before it, and `lateness_s` says how
far the sender itself fell behind (a run with much of it measured the client). Answers are not streamed: the
engine's own token times come back in one body (`kvpilot_times`), so a run of thousands of tokens a second
costs about a millisecond of CPU a request here, and nothing that this process does can move a token's time.

A shed request is tried again after `Retry-After`, as often as its class retries and while its patience lasts.
(A 503 that names no time to come back is no shedding: an engine that ran out of memory, or died, says that.)
Losing patience closes the connection, which is how an engine learns that nobody is waiting. Every arrival has
exactly one outcome.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from kvpilot.clock import NS, Clock
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.outcome import Fate, Outcome

CALLER_HEADER = "x-kvpilot-caller"
"""Carries `class/tenant`; the callers file must name it as its trusted header."""

_DEFAULT_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 3600.0
_ERROR_CHARS = 200
_KEEP_ALIVE_S = 2.0
"""Below the 5 s after which servers drop idle connections: reusing one that just closed would look like a
failure."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How the clients of one class behave. `answer_s` counts from the first attempt to the end of the
    answer."""

    answer_s: float
    retries: int = 0

    def __post_init__(self) -> None:
        if not self.answer_s > 0 or self.retries < 0:
            raise ValueError(f"{self}: answer_s must be above 0 and retries not below")


@dataclass(slots=True)
class _Attempt:
    """What one HTTP exchange came to."""

    status: int | None = None
    body: Any = None
    shed: bool = False
    retry_after_s: float = _DEFAULT_RETRY_AFTER_S
    error: str | None = None


class Clients:
    """All clients of one run against one OpenAI-compatible server. Use once: `outcomes = await
    clients.run(...)`."""

    def __init__(
        self,
        base_url: str,
        model: str,
        prompt: Callable[[Arrival], str],
        patience: Mapping[str, Patience],
        clock: Clock,
    ) -> None:
        self._url = base_url.rstrip("/") + "/v1/completions"
        self._model = model
        self._prompt = prompt
        self._patience = patience
        self._clock = clock
        self._start_ns = 0
        self._draining = False
        self.outcomes: list[Outcome] = []
        """In order of ending; grows while the run lasts, so that a view can follow it."""
        self.in_flight = 0
        self.lateness_s = 0.0
        """The longest that a first attempt left after its time."""

    async def run(self, arrivals: Iterable[Arrival], drain_s: float) -> list[Outcome]:
        """Send every arrival at its time, wait up to `drain_s` after the last, hang up on the rest."""
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S)
        async with (
            httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as http,
            asyncio.TaskGroup() as group,
        ):
            self._start_ns = self._clock.monotonic_ns()
            tasks = []
            for arrival in sorted(arrivals, key=lambda one: one.at_s):
                due_ns = self._start_ns + arrival.at_ns
                await self._clock.sleep_until(due_ns)
                self.lateness_s = max(self.lateness_s, (self._clock.monotonic_ns() - due_ns) / NS)
                tasks.append(group.create_task(self._follow(arrival, http)))
            if tasks:
                await asyncio.wait(tasks, timeout=drain_s)
            self._draining = True
            for task in tasks:
                task.cancel()
        return self.outcomes

    async def _follow(self, arrival: Arrival, http: httpx.AsyncClient) -> None:
        """One arrival from its first attempt to its fate."""
        began_ns = self._clock.monotonic_ns()
        patience = self._patience[arrival.klass]
        sent_ns, attempts, last = began_ns, 0, _Attempt()
        self.in_flight += 1
        try:
            async with asyncio.timeout(patience.answer_s):
                while True:
                    attempts += 1
                    last = await self._attempt(arrival, http)
                    if not self._try_again(last, attempts, began_ns, patience):
                        break
                    sent_ns = self._clock.monotonic_ns() + round(last.retry_after_s * NS)
                    await self._clock.sleep_until(sent_ns)
            fate = _fate(arrival, last)
        except TimeoutError:
            fate, last = Fate.ABANDONED, _Attempt(error="the client lost patience")
        except asyncio.CancelledError:
            if not self._draining:
                raise
            fate, last = Fate.UNFINISHED, _Attempt(error="still running when the run ended")
        finally:
            self.in_flight -= 1
        self.outcomes.append(self._outcome(arrival, fate, last, attempts, began_ns, sent_ns))

    def _try_again(self, last: _Attempt, attempts: int, began_ns: int, patience: Patience) -> bool:
        if not last.shed or attempts > patience.retries:
            return False
        waited_s = (self._clock.monotonic_ns() - began_ns) / NS
        return waited_s + last.retry_after_s < patience.answer_s

    async def _attempt(self, arrival: Arrival, http: httpx.AsyncClient) -> _Attempt:
        request = {
            "model": self._model,
            "prompt": self._prompt(arrival),
            "max_tokens": arrival.output_tokens,
            "ignore_eos": True,
            "temperature": 0.7,
            "seed": arrival.seed,
            "kvpilot_times": True,
        }
        caller = {CALLER_HEADER: f"{arrival.klass}/{arrival.tenant}" if arrival.tenant else arrival.klass}
        try:
            response = await http.post(self._url, json=request, headers=caller)
        except httpx.HTTPError as error:
            return _Attempt(error=f"{type(error).__name__}: {error}"[:_ERROR_CHARS])
        attempt = _Attempt(response.status_code, shed=_shed(response), retry_after_s=_retry_after_s(response))
        try:
            attempt.body = response.json()
        except ValueError:
            attempt.error = "the body is not JSON"
        if response.status_code != 200:
            attempt.error = _message(attempt.body) or f"HTTP {response.status_code}"
        return attempt

    def _outcome(
        self, arrival: Arrival, fate: Fate, last: _Attempt, attempts: int, began_ns: int, sent_ns: int
    ) -> Outcome:
        received_ns, emitted = _times(last.body) if fate is Fate.FINISHED else (0, ())
        return Outcome(
            arrival=arrival,
            fate=fate,
            attempts=attempts,
            waited_s=(sent_ns - began_ns) / NS,
            ended_at_s=(self._clock.monotonic_ns() - self._start_ns) / NS,
            http_status=last.status,
            error=_why_unusable(arrival, last) if fate is Fate.FAILED else last.error,
            received_ns=received_ns,
            emitted=emitted,
        )


def _fate(arrival: Arrival, last: _Attempt) -> Fate:
    if last.shed:
        return Fate.SHED
    return Fate.FAILED if _why_unusable(arrival, last) else Fate.FINISHED


def _why_unusable(arrival: Arrival, last: _Attempt) -> str | None:
    """None if the answer is whole: 200, with the engine's times of every token that was asked for."""
    if last.error is not None or last.status != 200:
        return last.error or f"HTTP {last.status}"
    try:
        _, emitted = _times(last.body)
    except (KeyError, TypeError, ValueError):
        return "the answer holds no token times: is this server started with its times extension?"
    tokens = sum(count for _, count in emitted)
    if tokens != arrival.output_tokens:
        return f"{tokens} of {arrival.output_tokens} tokens came back"
    return None


def _times(body: Any) -> tuple[int, tuple[tuple[int, int], ...]]:
    times = body["kvpilot"]
    return int(times["received_ns"]), tuple((int(at_ns), int(count)) for at_ns, count in times["emitted"])


def _shed(response: httpx.Response) -> bool:
    status = response.status_code
    return status == 429 or (status == 503 and "retry-after" in response.headers)


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds form only (what the valve sends); anything else is the default."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return _DEFAULT_RETRY_AFTER_S
    # `not >=` also catches NaN.
    return _DEFAULT_RETRY_AFTER_S if not seconds >= 0 else min(seconds, _MAX_RETRY_AFTER_S)


def _message(body: Any) -> str | None:
    """The text of an OpenAI-style error body."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message[:_ERROR_CHARS] if isinstance(message, str) else None
