"""Requests to a server's /v1/completions, and a crowd of closed-loop clients in a thread of their own."""

import asyncio
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from vllm_lab.models import FIRST_ORDINARY, VOCABULARY
from vllm_lab.server import SERVED_MODEL


@dataclass(frozen=True)
class Ask:
    """One request: exactly these prompt ids, exactly `max_tokens` of output."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: bool = True


@dataclass
class Answer:
    """What became of it. `status` 0: no HTTP answer; `error` is empty only when all tokens came."""

    ask: Ask
    status: int = 0
    tokens: tuple[int, ...] = ()
    finish: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""
    """The whole body of an answer that is not 200."""
    first_token_s: float | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def ok(self) -> bool:
        """All tokens came."""
        return not self.error

    @property
    def shed(self) -> bool:
        """Turned away by the valve, not failed."""
        return self.status == 429 and '"shed"' in self.body.replace(" ", "")


def prompt(length: int, seed: int = 0, repeat: int | None = None) -> tuple[int, ...]:
    """Random ordinary ids, the same for the same arguments; `repeat` makes them a cycle of that many."""
    rng = random.Random(f"prompt/{length}/{seed}/{repeat}")
    ids = [rng.randrange(FIRST_ORDINARY, VOCABULARY - 4) for _ in range(repeat or length)]
    return tuple(itertools.islice(itertools.cycle(ids), length))


def client(timeout_s: float = 120.0) -> httpx.AsyncClient:
    """A client that neither queues for connections nor reads proxies from the environment."""
    # A connection of its own for each request: a kept one may be closed by a busy server just as it is used.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=timeout_s, limits=limits, trust_env=False)


async def send(http: httpx.AsyncClient, url: str, ask: Ask) -> Answer:
    """Send one request and follow it to its end. Never raises for what the server does."""
    answer = Answer(ask)
    began = time.monotonic()
    try:
        request = http.build_request(
            "POST", f"{url}/v1/completions", json=_body(ask), headers=dict(ask.headers)
        )
        response = await http.send(request, stream=True)
        try:
            answer.status, answer.headers = response.status_code, response.headers
            if response.status_code != 200:
                answer.body = (await response.aread()).decode(errors="replace")
                answer.error = f"HTTP {response.status_code}: {answer.body[:200]}"
            elif ask.stream:
                await _follow(response, answer, began)
            else:
                _take(json.loads(await response.aread()), answer, began)
        finally:
            await response.aclose()
        if response.status_code == 200 and len(answer.tokens) != ask.max_tokens:
            answer.error = answer.error or f"{len(answer.tokens)} tokens, not {ask.max_tokens}"
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.seconds = time.monotonic() - began
    return answer


async def send_all(
    url: str, asks: Iterable[Ask], at_once: int | None = None, timeout_s: float = 120.0
) -> list[Answer]:
    """All of them, at most `at_once` at a time; answers in the order asked."""
    gate = asyncio.Semaphore(at_once or 10_000)

    async def one(http: httpx.AsyncClient, ask: Ask) -> Answer:
        async with gate:
            return await send(http, url, ask)

    async with client(timeout_s) as http:
        return list(await asyncio.gather(*(one(http, ask) for ask in asks)))


def run(url: str, asks: Iterable[Ask], at_once: int | None = None, timeout_s: float = 120.0) -> list[Answer]:
    """`send_all`, for callers without a loop."""
    return asyncio.run(send_all(url, asks, at_once, timeout_s))


class Crowd:
    """`with Crowd(url, clients, make) as crowd:` keeps `clients` requests in flight, from a thread.

    `make(n)` gives the n-th request. Leaving the context waits for those in flight; `answers` has all that
    ended so far.
    """

    def __init__(self, url: str, clients: int, make: Callable[[int], Ask], timeout_s: float = 120.0) -> None:
        self.answers: list[Answer] = []
        self._url, self._clients, self._make, self._timeout_s = url, clients, make, timeout_s
        self._numbers = itertools.count()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> "Crowd":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> Sequence[Answer]:
        """Send nothing more, wait for what is in flight; all answers."""
        self._stopping.set()
        self._thread.join(self._timeout_s + 10)
        return self.answers

    @property
    def failures(self) -> list[Answer]:
        """Answers that are neither complete nor shed."""
        return [answer for answer in self.answers if not answer.ok and not answer.shed]

    async def _run(self) -> None:
        async with client(self._timeout_s) as http:
            await asyncio.gather(*(self._one(http) for _ in range(self._clients)))

    async def _one(self, http: httpx.AsyncClient) -> None:
        while not self._stopping.is_set():
            answer = await send(http, self._url, self._make(next(self._numbers)))
            self.answers.append(answer)
            if answer.shed:
                await asyncio.sleep(0.05)


def _body(ask: Ask) -> dict[str, object]:
    return {
        "model": SERVED_MODEL,
        "prompt": list(ask.prompt),
        "max_tokens": ask.max_tokens,
        "ignore_eos": True,
        "temperature": ask.temperature,
        "seed": ask.seed,
        "stream": ask.stream,
        "return_token_ids": True,
    }


async def _follow(response: httpx.Response, answer: Answer, began: float) -> None:
    rest = b""
    # Not `aiter_lines`: it also breaks at the line separators of Unicode, which random models like to say.
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                _take(json.loads(line.removeprefix(b"data: ")), answer, began)


def _take(body: dict, answer: Answer, began: float) -> None:
    if "error" in body:
        answer.error = str(body["error"])[:200]
        return
    for choice in body["choices"]:
        tokens = tuple(choice.get("token_ids") or ())
        if tokens and answer.first_token_s is None:
            answer.first_token_s = time.monotonic() - began
        answer.tokens += tokens
        answer.finish = choice.get("finish_reason") or answer.finish
