"""The clients against a real socket: times, retries, patience, hanging up, and every arrival accounted
for."""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvpilot.clock import SystemClock, VirtualClock
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.client import Clients, Patience
from kvpilot.workload.outcome import Fate, Outcome

Answer = tuple[int, dict[str, str], bytes] | None
"""(status, headers, body), or None to say nothing until the client hangs up."""


@dataclass
class Server:
    """A loopback HTTP/1.1 server that answers as `script(request, attempt)` says, attempts counted by
    seed."""

    script: Callable[[dict[str, Any], int], Answer]
    url: str = ""
    requests: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    hung_up: int = 0
    _attempts: Counter[int] = field(default_factory=Counter)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")[1:-2]
                headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines)}
                request = json.loads(await reader.readexactly(int(headers["content-length"])))
                self.requests.append((headers, request))
                self._attempts[request["seed"]] += 1
                answer = self.script(request, self._attempts[request["seed"]])
                if answer is None:
                    await reader.read(1)
                    self.hung_up += 1
                    return
                status, extra, body = answer
                lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}"]
                lines += [f"{name}: {value}" for name, value in extra.items()]
                writer.write("\r\n".join([*lines, "", ""]).encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def ok(request: dict[str, Any], _attempt: int = 1) -> Answer:
    emitted = [[1_000_000_000 + i * 10_000_000, 1] for i in range(request["max_tokens"])]
    body = {"choices": [{"text": "x"}], "kvpilot": {"received_ns": 900_000_000, "emitted": emitted}}
    return 200, {}, json.dumps(body).encode()


def shed(retry_after: str) -> Answer:
    return 429, {"retry-after": retry_after}, b'{"error": {"message": "class batch is shed"}}'


def arrivals(count: int, at_s: float = 0.0) -> list[Arrival]:
    return [Arrival(at_s, 10, 5, "interactive", "acme", "json", seed) for seed in range(count)]


def drive(
    script: Callable[[dict[str, Any], int], Answer],
    offered: list[Arrival],
    patience: Patience = Patience(30.0),  # noqa: B008
    drain_s: float = 10.0,
    check: Callable[[Server, Clients], Awaitable[None]] | None = None,
) -> tuple[list[Outcome], Server, Clients]:
    async def run() -> tuple[list[Outcome], Server, Clients]:
        server = Server(script)
        listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        clients = Clients(url, "m", lambda a: "x" * a.prompt_tokens, {"interactive": patience}, SystemClock())
        outcomes = await clients.run(offered, drain_s)
        hung_up = sum(o.fate in (Fate.ABANDONED, Fate.UNFINISHED) for o in outcomes)
        while server.hung_up < hung_up:
            await asyncio.sleep(0)
        listening.close()
        return outcomes, server, clients

    return asyncio.run(asyncio.wait_for(run(), 30))


def test_an_answer_brings_the_engines_times() -> None:
    (outcome,), server, clients = drive(ok, arrivals(1))
    assert outcome.fate is Fate.FINISHED
    assert outcome.ttft_s == pytest.approx(0.1)
    assert outcome.gaps() == [(10_000_000, 1)] * 4
    ((headers, request),) = server.requests
    assert headers["x-kvpilot-caller"] == "interactive/acme"
    assert request["prompt"] == "x" * 10
    assert (request["max_tokens"], request["ignore_eos"], request["kvpilot_times"]) == (5, True, True)
    assert clients.in_flight == 0


def test_a_shed_request_comes_back_when_told_and_counts_once() -> None:
    def script(request: dict[str, Any], attempt: int) -> Answer:
        return ok(request) if attempt == 3 else shed("0.05")

    (outcome,), server, _ = drive(script, arrivals(1), Patience(30.0, retries=2))
    assert (outcome.fate, outcome.attempts) == (Fate.FINISHED, 3)
    assert len(server.requests) == 3
    assert outcome.waited_s >= 0.1
    assert outcome.ttft_s == pytest.approx(0.1 + outcome.waited_s)


def test_retries_end() -> None:
    outcomes, server, _ = drive(lambda *_: shed("0"), arrivals(2), Patience(30.0, retries=2))
    assert [(o.fate, o.attempts, o.http_status) for o in outcomes] == [(Fate.SHED, 3, 429)] * 2
    assert outcomes[0].error == "class batch is shed"
    assert len(server.requests) == 6


def test_no_retry_when_it_would_outlast_patience() -> None:
    (outcome,), _, _ = drive(lambda *_: shed("31"), arrivals(1), Patience(30.0, retries=2))
    assert (outcome.fate, outcome.attempts) == (Fate.SHED, 1)


@pytest.mark.parametrize("value", ["soon", "-1", "nan", ""])
def test_a_senseless_retry_after_is_a_second(value: str) -> None:
    (outcome,), _, _ = drive(lambda *_: shed(value), arrivals(1), Patience(0.9, retries=1))
    assert (outcome.fate, outcome.attempts) == (Fate.SHED, 1)


def test_a_503_is_shed_only_where_it_says_when_to_come_back() -> None:
    """A draining valve does; an engine that ran out of memory does not: that request failed, at once."""
    body = b'{"error": {"message": "The engine ran out of device memory"}}'
    retrying = Patience(30.0, retries=1)
    (outcome,), _, _ = drive(lambda *_: (503, {"retry-after": "0"}, body), arrivals(1), retrying)
    assert (outcome.fate, outcome.attempts) == (Fate.SHED, 2)
    (outcome,), _, _ = drive(lambda *_: (503, {}, body), arrivals(1), retrying)
    assert (outcome.fate, outcome.attempts) == (Fate.FAILED, 1)
    assert outcome.error == "The engine ran out of device memory"


def test_lost_patience_closes_the_connection() -> None:
    (outcome,), server, _ = drive(lambda *_: None, arrivals(1), Patience(0.05))
    assert outcome.fate is Fate.ABANDONED
    assert server.hung_up == 1


def test_the_end_of_the_drain_hangs_up_on_the_rest() -> None:
    def script(request: dict[str, Any], _attempt: int) -> Answer:
        return ok(request) if request["seed"] else None

    outcomes, server, clients = drive(script, arrivals(3), drain_s=0.2)
    assert sorted(o.fate for o in outcomes) == [Fate.FINISHED, Fate.FINISHED, Fate.UNFINISHED]
    assert server.hung_up == 1
    assert clients.in_flight == 0


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((500, {}, b'{"error": {"message": "out of device memory"}}'), "out of device memory"),
        ((500, {}, b"oops"), "HTTP 500"),
        ((200, {}, b"oops"), "not JSON"),
        ((200, {}, b"{}"), "no token times"),
        ((200, {}, b'{"kvpilot": {"received_ns": 1, "emitted": [[1]]}}'), "no token times"),
        ((200, {}, b'{"kvpilot": {"received_ns": 1, "emitted": [[2, 3]]}}'), "3 of 5 tokens"),
        ((400, {}, b"[]"), "HTTP 400"),
    ],
)
def test_anything_else_failed_and_says_why(answer: Answer, says: str) -> None:
    (outcome,), _, _ = drive(lambda *_: answer, arrivals(1))
    assert outcome.fate is Fate.FAILED
    assert says in (outcome.error or "")


def test_nobody_listens() -> None:
    clients = Clients("http://127.0.0.1:1", "m", lambda a: "", {"interactive": Patience(5.0)}, SystemClock())
    (outcome,) = asyncio.run(clients.run(arrivals(1), 1.0))
    assert outcome.fate is Fate.FAILED
    assert "ConnectError" in (outcome.error or "")


def test_arrivals_leave_at_their_time_whatever_became_of_the_others() -> None:
    """Open loop: the first hangs, the others are sent on time (virtual time: no one waits for real)."""

    async def run() -> tuple[list[Outcome], float]:
        server = Server(lambda request, _: ok(request) if request["seed"] else None)
        listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        clock = VirtualClock()
        clients = Clients(url, "m", lambda a: "x", {"interactive": Patience(60.0)}, clock)
        offered = [Arrival(3.0 * seed, 10, 5, "interactive", "", "json", seed) for seed in range(4)]
        outcomes = await clients.run(offered, 0.3)
        listening.close()
        return outcomes, clients.lateness_s

    outcomes, lateness_s = asyncio.run(run())
    assert sorted((o.arrival.seed, o.fate) for o in outcomes) == [
        (0, Fate.UNFINISHED),
        (1, Fate.FINISHED),
        (2, Fate.FINISHED),
        (3, Fate.FINISHED),
    ]
    assert lateness_s == 0.0


def test_a_request_costs_the_client_little() -> None:
    """The client shares two cores with the engine: at most 4 ms of CPU a request, this server's share
    included."""
    before = os.times()
    outcomes, _, _ = drive(ok, arrivals(150))
    after = os.times()
    assert all(o.fate is Fate.FINISHED for o in outcomes)
    assert (after.user + after.system - before.user - before.system) / 150 < 0.004


def test_patience_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="answer_s"):
        Patience(0.0)
