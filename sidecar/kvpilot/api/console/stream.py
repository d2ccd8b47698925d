"""One viewer's answer: server-sent events until the viewer goes, is dropped, or the pilot lands."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvpilot.api.console.viewers import Viewer, Viewers

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}


def event(name: str, data: bytes) -> bytes:
    """One event; `data` is JSON on one line."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data)


class EventStream(Response):
    """Sends `first`, then whatever `viewer` is offered."""

    media_type = "text/event-stream"

    def __init__(self, viewers: Viewers, viewer: Viewer, first: bytes) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._viewers = viewers
        self._viewer = viewer
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        waits = [
            asyncio.ensure_future(each)
            for each in (self._pump(send), _gone(receive), self._viewer.over.wait())
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._viewers.leave(self._viewer)
            for each in waits:
                each.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _pump(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        body = self._first
        while True:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            body = await self._viewer.take()


async def _gone(receive: Callable[[], Awaitable[object]]) -> None:
    message = await receive()
    while not isinstance(message, dict) or message.get("type") != "http.disconnect":
        message = await receive()


def cut_off(record: logging.LogRecord) -> bool:
    """A filter: a stream that we end has no proper end, and the server's complaint about it tells nobody."""
    return "without completing response" not in record.getMessage()
