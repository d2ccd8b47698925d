"""The API process's half of a request, the test being its core: clients that leave, tokens in groups."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any

import pytest

from kvengine.channel import Channel
from kvengine.config import SHIPPED_TARGET
from kvengine.frontend import EngineClient, GenerationError
from kvengine.model.tokenizer import Tokenizer
from kvengine.sched.admission import Limits
from kvengine.server import ServedModel, Server
from kvpilot.clock import VirtualClock

Message = dict[str, Any]
NEVER: Message = {"type": "never"}
GONE: Message = {"type": "http.disconnect"}


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(**arguments: Any) -> None:
        asyncio.run(test(**arguments))

    return run


class Api:
    """A server without a socket; `core` is the other end of its channel."""

    def __init__(self, vocabulary: int = 259) -> None:
        ours, theirs = socket.socketpair()
        self.core = Channel(theirs)
        self.engine = EngineClient(Channel(ours))
        model = ServedModel("tiny", vocabulary, Limits(512, 1024))
        self.app = Server(self.engine, Tokenizer.load(SHIPPED_TARGET), model, VirtualClock()).app()

    async def call(self, receive: Callable[[], Awaitable[Message]]) -> list[Message]:
        """POST a completion; what the server sent."""
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        rest = {"query_string": b"", "http_version": "1.1", "asgi": {"spec_version": "2.3"}}
        await self.app(scope | rest, receive, send)
        return sent

    async def told(self) -> list[Any]:
        """What the core is told next."""
        while not (messages := self.core.receive()):
            await asyncio.sleep(0)
        return messages


@asynccontextmanager
async def api(**options: int) -> AsyncIterator[Api]:
    one = Api(**options)
    one.engine.attach()
    try:
        yield one
    finally:
        one.engine.close()
        one.core.close()


def body(**fields: Any) -> Message:
    data = json.dumps({"prompt": "once", "max_tokens": 40} | fields).encode()
    return {"type": "http.request", "body": data, "more_body": False}


def receiving(*messages: Message) -> Callable[[], Awaitable[Message]]:
    """Each in turn; who is given NEVER waits until it is cancelled."""
    rest = list(messages)

    async def receive() -> Message:
        message = rest.pop(0)
        if message["type"] == "never":
            await asyncio.Event().wait()
        return message

    return receive


@in_a_loop
async def test_a_client_that_leaves_just_as_its_stream_begins_is_cancelled() -> None:
    """The first tokens came, and with them the news that nobody is there."""
    async with api() as one:
        answering = asyncio.ensure_future(one.call(receiving(body(stream=True), NEVER, GONE)))
        ((_add, number, *_rest),) = await one.told()
        one.core.send(["out", 1, [[number, [97], None, 1, 0]]])
        await answering
        assert await one.told() == [["cancel", number]]


@in_a_loop
async def test_a_client_that_leaves_during_its_upload_is_no_failure_of_the_server() -> None:
    """Nothing is raised (the server would log a traceback), and the core never hears of it."""
    async with api() as one:
        half = {"type": "http.request", "body": b'{"prompt"', "more_body": True}
        await one.call(receiving(half, GONE))
        assert one.core.receive() == []


@in_a_loop
async def test_text_of_tokens_that_the_model_lacks_is_refused_and_fails_nobodys_step() -> None:
    async with api(vocabulary=ord("o")) as one:
        start, _body = await one.call(receiving(body(prompt="once")))
        assert start["status"] == 400
        assert one.core.receive() == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "x" * 512}, "the prompt has 512 tokens"),
        ({"prompt": [1] * 1_000_000}, "the prompt has 1000000 tokens"),
        ({"prompt": "x" * 3_000_000}, "the prompt has 3000000 characters"),
        ({"max_tokens": 600}, "Ask for at most 508 tokens"),
        ({"prompt": ""}, "The prompt is empty"),
    ],
)
@in_a_loop
async def test_what_can_never_be_served_does_not_reach_the_step_loop(
    fields: dict[str, Any], words: str
) -> None:
    """The core learns that somebody was refused, for its totals, and no more."""
    async with api() as one:
        start, answer = await one.call(receiving(body(**fields)))
        assert start["status"] == 400
        assert words in json.loads(answer["body"])["error"]["message"]
        assert await one.told() == [["reject", 0]]


@in_a_loop
async def test_a_dead_core_is_not_given_requests_to_remember() -> None:
    async with api() as one:
        one.core.close()
        for _ in range(3):
            with pytest.raises(GenerationError, match="has stopped"):
                one.engine.submit([1], {}, 0, None, 0)
        assert not one.engine._open


@pytest.mark.parametrize("group", [1, 2, 5, 9])
@in_a_loop
async def test_which_stop_string_ends_a_text_does_not_depend_on_how_tokens_were_grouped(group: int) -> None:
    """Speculation brings several tokens out together; text and usage are as without it."""
    output = list(b"one two three")
    async with api() as one:
        request = receiving(body(stop=["two three", "wo"]), NEVER)
        answering = asyncio.ensure_future(one.call(request))
        ((_add, number, *_rest),) = await one.told()
        for at in range(0, len(output), group):
            one.core.send(["out", 1, [[number, output[at : at + group], None, 1, 0]]])
        sent = await answering
        assert ["stop", number] in await one.told()
    answer = json.loads(sent[1]["body"])
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one t", "stop")
    assert answer["usage"]["completion_tokens"] == len("one two")
