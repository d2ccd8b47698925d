"""The HTTP server: OpenAI-compatible completions and chat, streaming and not.

One generation is answered in two parts. Its first tokens are awaited before anything is sent, so that
whatever goes wrong until then (too long, out of memory, core gone) gets its own status code; then the rest
follows as events, or all at once. When the client goes away, at any point, the generation is cancelled and
its KV is free.

This process never imports torch: the model lives in the core process.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kvengine.answer import Answer, ChatAnswer, TextAnswer
from kvengine.frontend import CORE_GONE, EngineClient, GenerationError
from kvengine.model.tokenizer import TextTooLong, Tokenizer, TokenizerError
from kvengine.protocol import (
    MAX_CHOICES,
    BadRequest,
    Body,
    ChatBody,
    CompletionBody,
    error_body,
    parse,
    sampling,
)
from kvengine.sched.admission import Limits, refusal
from kvpilot.clock import NS, Clock

MAX_BODY_BYTES = 4 << 20
CLIENT_GONE_STATUS = 499
"""Seen by nobody; what proxies log for a client that left."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the server knows of the model."""

    name: str
    vocabulary: int
    limits: Limits
    levels: int = 1
    max_choices: int = MAX_CHOICES
    """Most generations of one request: those that run at once."""


class ClientGone(Exception):
    """Nobody is there to be answered."""


class Server:
    """Answers requests with one engine."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, model: ServedModel, clock: Clock) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model = model
        self._clock = clock
        self._created_s = clock.wall_ns() // NS

    def app(self) -> FastAPI:
        """The ASGI application, without the valve."""
        app = FastAPI(title="kvengine", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        app.add_exception_handler(BadRequest, _on_bad_request)
        app.add_exception_handler(GenerationError, _on_generation_error)
        app.add_exception_handler(HTTPException, _on_http_exception)
        app.add_exception_handler(ClientGone, _on_client_gone)
        app.add_exception_handler(Exception, _on_exception)
        return app

    async def health(self) -> Response:
        if self._engine.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse(error_body(503, CORE_GONE), 503)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._card()

    async def completions(self, request: Request) -> Response:
        received_ns = self._clock.monotonic_ns()
        body = parse(CompletionBody, await _read(request))
        self._check_model(body.model)
        if isinstance(body.prompt, str):
            prompt = self._encode(self._tokenizer.encode, body.prompt)
        else:
            prompt = body.prompt
        return await self._respond(request, body, prompt, received_ns, TextAnswer)

    async def chat(self, request: Request) -> Response:
        received_ns = self._clock.monotonic_ns()
        body = parse(ChatBody, await _read(request))
        self._check_model(body.model)
        messages = [{"role": one.role, "content": one.content or ""} for one in body.messages]
        prompt = self._encode(self._tokenizer.encode_chat, messages)
        return await self._respond(request, body, prompt, received_ns, ChatAnswer)

    async def _respond(
        self, request: Request, body: Body, prompt: list[int], received_ns: int, kind: type[Answer]
    ) -> Response:
        asked = body.asked_tokens or max(1, self._model.limits.tokens - len(prompt))
        reason = refusal(len(prompt), asked, self._model.limits)
        if reason is not None:
            self._refuse(reason)
        # A tokenizer may know tokens that its model lacks; one of them would fail the step of everybody.
        if prompt and not 0 <= min(prompt) <= max(prompt) < self._model.vocabulary:
            raise BadRequest(f"prompt: token ids go from 0 to {self._model.vocabulary - 1}", param="prompt")
        if body.candidates > self._model.max_choices:
            name = "n" if body.candidates == body.n else "best_of"
            raise BadRequest(
                f"{name}={body.candidates}: this engine runs {self._model.max_choices} at once.", param=name
            )
        if body.use_beam_search and 2 * body.candidates > self._model.vocabulary:
            raise BadRequest(
                f"best_of={body.candidates}: a vocabulary of {self._model.vocabulary} tokens is enough for "
                f"{self._model.vocabulary // 2} beams.",
                param="best_of",
            )
        level, tenant = self._tag(request)
        generations = self._engine.submit(
            prompt,
            sampling(body, asked, secrets.randbits(48)),
            level,
            tenant,
            received_ns,
            choices=body.candidates,
            eviction=None if body.kvpilot_evict is None else body.kvpilot_evict.eviction.to_wire(),
        )
        answer = kind(
            self._tokenizer, body, self._model.name, self._clock.wall_ns() // NS, len(prompt), generations
        )
        try:
            if not body.stream:
                await _unless_gone(request, answer.collect())
                return JSONResponse(answer.whole())
            first = await _unless_gone(request, answer.advance())
        except BaseException:
            answer.cancel()
            raise
        return EventSourceResponse(
            _events(answer, first),
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    def _encode(self, encode: Any, text: Any) -> list[int]:
        try:
            # Streams of others wait meanwhile: no more is encoded than can be served.
            tokens: list[int] = encode(text, self._model.limits.tokens)
        except TextTooLong as error:
            self._refuse(str(error))
        except TokenizerError as error:
            raise BadRequest(str(error)) from None
        return tokens

    def _refuse(self, reason: str) -> NoReturn:
        """It can never be served: the core need not see it, only count it."""
        self._engine.count_rejected()
        raise BadRequest(reason)

    def _tag(self, request: Request) -> tuple[int, str | None]:
        """Class level and tenant, from the valve's tag and nowhere else."""
        tag = request.scope.get("state", {}).get("kvpilot")
        if tag is None:
            return 0, None
        return min(tag.level, self._model.levels - 1), tag.tenant or None

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model.name:
            raise BadRequest(
                f"The model {name!r} does not exist; this engine serves {self._model.name!r}.",
                404,
                "model",
                "model_not_found",
            )

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "kvengine",
            "max_model_len": self._model.limits.tokens,
        }


async def _events(answer: Answer, first: list[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Server-sent events: chunks, then `[DONE]`; or an error event, and the end."""
    try:
        chunks = answer.opening() + first
        while True:
            for chunk in chunks:
                yield _event(chunk)
            if answer.done:
                yield b"data: [DONE]\n\n"
                return
            chunks = await answer.advance()
    except GenerationError as error:
        yield _event(error_body(error.status, str(error)))
    finally:
        answer.cancel()


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _read(request: Request) -> bytes:
    """The body, if it is of a sane size."""
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > MAX_BODY_BYTES:
                raise BadRequest(f"The body is over {MAX_BODY_BYTES} bytes.", 413)
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(data)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or ClientGone as soon as the client disconnects."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        gone.cancel()
        working.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _on_bad_request(_request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return JSONResponse(error_body(error.status, str(error), error.param, error.code), error.status)


async def _on_generation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, GenerationError)
    return JSONResponse(error_body(error.status, str(error)), error.status)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_body(error.status_code, message), error.status_code, headers=error.headers)


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE_STATUS)


async def _on_exception(_request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(500, f"The server failed: {type(error).__name__}."), 500)
