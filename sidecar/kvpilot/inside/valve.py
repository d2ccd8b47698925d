"""The valve: an ASGI middleware that turns requests away before the engine accepts them.

It classifies each generating request (`callers`), asks the law (`valve_law`), answers 429 or lets it through
with its tag in `scope["state"]["kvpilot"]` and in `CURRENT`, and counts in a page of its own
(`link.valve_page`). Everything else (health, metrics, model lists) passes untouched, and so does every byte
of a request or response: nothing is buffered.

    uvicorn.run(Valve(app))          or for vLLM: --middleware kvpilot.inside.valve.Valve

Several API-server processes have one each, and share what credits allow by the load that each is offered
(`shares`).

It starts no thread, opens no socket and never fails a request: any failure of its own disables it, is counted
and logged once, and requests go through. Without the link's environment it classifies and counts, and sheds
nothing. The controls page is read at most every POLL_NS while requests come, and every WATCH_NS without
them, or a lease would look like history to a valve that nobody called for a while; the siblings' pages are
read once in LOOK_NS, beside the requests. At most 50 us a request.
"""

import asyncio
import json
import logging
import math
import os
import random
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from kvpilot.clock import NS, Clock, SystemClock
from kvpilot.inside.callers import NO_TENANT, Callers, CallersError, Tag
from kvpilot.inside.shares import LOOK_NS
from kvpilot.inside.valve_law import Decision, ValveLaw
from kvpilot.link.files import WritablePage, create_page
from kvpilot.link.following import ControlsFile
from kvpilot.link.page import LinkError
from kvpilot.link.place import VALVE_CONTROLS, LinkPlace, new_nonce, this_process
from kvpilot.link.siblings import Siblings
from kvpilot.link.valve_layout import VALVE_PAGE_BYTES
from kvpilot.link.valve_writer import ValvePageWriter

__all__ = ["CURRENT", "ENVIRON_CALLERS", "STATE_KEY", "Decision", "Tag", "Valve", "ValveLaw"]

log = logging.getLogger("kvpilot.valve")

ENVIRON_CALLERS = "KVPILOT_CALLERS"
STATE_KEY = "kvpilot"
"""Where the engine finds the request's Tag in `scope["state"]`."""

CURRENT: ContextVar[Tag | None] = ContextVar("kvpilot.inside.valve.CURRENT", default=None)
"""The tag of the request that is being served, for engines whose scope does not reach where it is needed.
Tasks that an application starts for a request inherit it; outside of admitted requests it is None."""

GENERATING = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/systemone",
    "/cohere/v2/chat",
    "/generate",
    "/generative_scoring",
    "/invocations",
)
"""Ends of the paths whose POST makes an engine generate (the reference engine's and vLLM's, which also has
`/inference/v1/generate`); all else passes."""

POLL_NS = NS // 50
WATCH_NS = NS // 5

_MAX_BODY_BYTES = 1 << 30
"""What a Content-Length is believed up to, so that no header can overflow a counter."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
HttpScope = MutableMapping[str, Any]
App = Callable[[HttpScope, Receive, Send], Awaitable[None]]


class Valve:
    """See the module docstring. `environ` names the callers file and the link's directories."""

    def __init__(
        self,
        app: App,
        environ: Mapping[str, str] = os.environ,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._app = app
        self._clock = clock or SystemClock()
        self._file: WritablePage | None = None
        self._controls: ControlsFile | None = None
        self._siblings: Siblings | None = None
        self._poll_ns = self._look_ns = 0
        self._watching = False
        self._problem: str | None = None
        self.enabled = False
        """False after a failure, and where the callers file cannot be used: then every request passes."""
        self._callers = Callers.load(None)
        try:
            self._callers = Callers.load(environ.get(ENVIRON_CALLERS) or None)
            self.enabled = True
        except CallersError as error:
            log.warning("nothing is classified or shed: %s", error)
        self._page = self._open(environ)
        # Our page can be seen from here on: no sibling that comes later is missed by the first look.
        now_ns = self._clock.monotonic_ns()
        self._law = ValveLaw(rng or random.Random(), now_ns)
        self._guarded(self._look, now_ns)
        if not self.enabled:
            self._page.failures += 1
            self._page.beat(self._clock.monotonic_ns(), (), 0)

    def _open(self, environ: Mapping[str, str]) -> ValvePageWriter:
        """The page to count in: a file of the link, or memory of our own where there is no link."""
        try:
            place = LinkPlace.from_environ(environ)
            if place is not None:
                page = self._open_page(place)
                assert self._file is not None
                self._siblings = Siblings(self._file.path, place.uids)
                self._controls = ControlsFile(place.controls_directory(None) / VALVE_CONTROLS, place.uids)
                return page
        except LinkError as error:
            log.warning("the valve runs without the link: %s", error)
        except Exception:
            log.warning("the valve runs without the link: a failure inside kvpilot", exc_info=True)
        return self._page_over(bytearray(VALVE_PAGE_BYTES), new_nonce())

    def _open_page(self, place: LinkPlace) -> ValvePageWriter:
        nonce = new_nonce()
        file = create_page(place.telemetry_directory(None), "valve", nonce, VALVE_PAGE_BYTES, place.uids)
        page = self._page_over(file.buffer, nonce)
        file.publish()
        self._file = file
        return page

    def _page_over(self, buffer: object, nonce: int) -> ValvePageWriter:
        identity = this_process(self._clock)
        return ValvePageWriter(buffer, self._callers.classes, nonce=nonce, identity=identity)

    async def __call__(self, scope: HttpScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        judged = self._judge(scope)
        if judged is None:
            await self._serve(None, scope, receive, send)
            return
        tag, decision, ticket, tagged = judged
        if not decision.admitted:
            await _refuse(send, tag, decision)
            return
        try:
            await self._serve(tag, tagged, receive, self._watched(send))
        finally:
            # However it ended: finished, failed, or the client went away. A ticket counts once.
            self._guarded(self._page.ended, ticket)

    async def _serve(self, tag: Tag | None, scope: HttpScope, receive: Receive, send: Send) -> None:
        """Call the application under `tag`, or under none: a server may start the task of a pipelined request
        while it sends the end of the one before, and what passes must not inherit that one's tag.
        """
        before = CURRENT.set(tag)
        try:
            await self._app(scope, receive, send)
        finally:
            CURRENT.reset(before)

    def _judge(self, scope: HttpScope) -> tuple[Tag, Decision, int, HttpScope] | None:
        """Tag, decision, ticket and tagged scope of a generating request; None for what passes untouched."""
        if not self.enabled:
            return None
        try:
            if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(GENERATING):
                return None
            now_ns = self._clock.monotonic_ns()
            if now_ns - self._poll_ns >= POLL_NS:
                self._poll(now_ns)
            headers = scope["headers"]
            tag = self._callers.classify(headers)
            decision = self._law.admit(tag.level, tag.tenant, _body_bytes(headers), now_ns)
            size, tokens = decision.body_bytes, decision.tokens
            if not decision.admitted:
                self._page.shed(tag.level, tag.tenant, size, decision.why, tokens)
                return tag, decision, 0, scope
            tagged = {**scope, "state": {**(scope.get("state") or {}), STATE_KEY: tag}}
            return tag, decision, self._page.admitted(tag.level, tag.tenant, size, now_ns, tokens), tagged
        except Exception:
            self._disable()
            return None

    def _watched(self, send: Send) -> Send:
        """`send`, noting when bytes left. It hands every message on at once and keeps none."""

        page, answers = self._page, True

        async def watched(message: Message) -> None:
            nonlocal answers
            first = message.get("type") == "http.response.start"
            if first:
                # An error may be said by a server whose engine answers nobody any more.
                answers = message.get("status", 200) < 400
            page.taking += 1
            try:
                await send(message)
            finally:
                page.taking -= 1
            if answers:
                self._guarded(self._sent, first)

        return watched

    def _sent(self, first: bool) -> None:
        now_ns = self._clock.monotonic_ns()
        self._page.last_byte_ns = now_ns
        if first:
            self._page.first_byte_ns = now_ns
        if now_ns - self._poll_ns >= POLL_NS:
            self._poll(now_ns)

    def _poll(self, now_ns: int) -> None:
        """Read the controls page and write the summary."""
        self._poll_ns = now_ns
        if self._controls is not None:
            page = self._controls.read(now_ns)
            self._law.observe(b"" if page is None else page, now_ns)
            problem = self._controls.error or (self._law.page_error if page is not None else None)
            if problem is not None and problem != self._problem:
                self._page.controls_unreadable += 1
                log.warning("shed leases not obeyed: %s", problem)
            self._problem = problem
        if not self._watching and now_ns - self._look_ns >= LOOK_NS:
            # A server that runs no lifespan: there is no other moment.
            self._look(now_ns)
        law, levels = self._law, range(len(self._callers.classes))
        self._page.beat(
            now_ns,
            [law.fraction(level, NO_TENANT, now_ns) for level in levels],
            law.controls_sequence,
            [law.credits_left(level, NO_TENANT, now_ns) for level in levels],
            law.echoes(now_ns),
            law.bytes_per_token(now_ns),
        )

    def _look(self, now_ns: int) -> None:
        """See what the siblings claim. What we then claim is on our page after the next `_poll`."""
        self._look_ns = now_ns
        if self._siblings is None:
            return
        before = self._siblings.error
        self._law.look(self._siblings.look(), now_ns)
        if self._siblings.error is not None and self._siblings.error != before:
            log.warning("other valves of this engine cannot be seen: %s", self._siblings.error)

    async def _lifespan(self, scope: HttpScope, receive: Receive, send: Send) -> None:
        """Pass the server's start and stop on; watch the controls page in between."""
        stopping = False

        async def watched() -> Message:
            nonlocal stopping
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                stopping = True
                self._law.drain()
            return message

        watch = asyncio.create_task(self._watch())
        self._watching = True
        try:
            await self._app(scope, watched, send)
        finally:
            self._watching = False
            watch.cancel()
            await asyncio.wait([watch])
            # An application without a lifespan raises here and is served all the same.
            if stopping:
                self.close()

    async def _watch(self) -> None:
        while self.enabled:
            now_ns = self._clock.monotonic_ns()
            if now_ns - self._look_ns >= LOOK_NS:
                self._guarded(self._look, now_ns)
                self._guarded(self._poll, now_ns)
            elif now_ns - self._poll_ns >= POLL_NS:
                self._guarded(self._poll, now_ns)
            await self._clock.sleep_until(now_ns + WATCH_NS)

    def drain(self) -> None:
        """The server was asked to stop: new requests are told so. Safe to call from a signal handler."""
        self._law.drain()

    def close(self) -> None:
        """Give up page and lock; requests pass from here on. The page stays for the flight recorder."""
        self._guarded(self._poll, self._clock.monotonic_ns())
        self.enabled = False
        with suppress(Exception):
            self._release()

    def _guarded(self, call: Callable[..., None], *args: Any) -> None:
        if not self.enabled:
            return
        try:
            call(*args)
        except Exception:
            self._disable()

    def _disable(self) -> None:
        """Called while handling a failure of our own: from here on everybody passes."""
        self.enabled = False
        log.warning("the valve failed and is disabled; every request passes", exc_info=True)
        with suppress(Exception):
            self._page.failures += 1
            self._page.beat(self._clock.monotonic_ns(), (), self._law.controls_sequence)
            self._release()

    def _release(self) -> None:
        if self._controls is not None:
            self._controls.close()
        if self._file is not None:
            self._page.close()
            self._file.close()
            self._file = None


def _body_bytes(headers: Any) -> int | None:
    """The request's Content-Length, None where it has none or one that makes no sense."""
    for name, value in headers:
        if name == b"content-length":
            return min(int(value), _MAX_BODY_BYTES) if value.isdigit() and len(value) < 20 else None
    return None


async def _refuse(send: Send, tag: Tag, decision: Decision) -> None:
    """An OpenAI-style error that says which class was turned away and why."""
    seconds = math.ceil(decision.retry_after_s)
    why = f"Requests of class {tag.class_name!r} are turned away: {decision.reason}."
    error = {
        "message": f"{why} Retry in {seconds} s.",
        "type": "overloaded_error",
        "param": None,
        "code": "shed" if decision.status == 429 else "unavailable",
        "class": tag.class_name,
        "reason": decision.reason,
    }
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % seconds),
    ]
    await send({"type": "http.response.start", "status": decision.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
