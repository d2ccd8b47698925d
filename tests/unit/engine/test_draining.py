"""A server that was asked to stop: who comes now is told so, who was let in before is served."""

import asyncio
import signal
from typing import Any

import uvicorn

from kvengine.commands import DrainingServer
from kvpilot.clock import VirtualClock
from kvpilot.inside.valve import Valve

SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}


def test_from_the_signal_on_new_requests_are_answered_503_and_admitted_ones_finish() -> None:
    async def run() -> None:
        go_on = asyncio.Event()

        async def app(_scope: Any, _receive: Any, send: Any) -> None:
            await go_on.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"done"})

        async def ask() -> int:
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            await valve(dict(SCOPE), None, send)
            return int(sent[0]["status"])

        valve = Valve(app, {}, VirtualClock())
        server = DrainingServer(uvicorn.Config(valve), valve)
        early = asyncio.ensure_future(ask())
        await asyncio.sleep(0)
        server.handle_exit(signal.SIGTERM, None)
        assert server.should_exit
        late = asyncio.ensure_future(ask())
        await asyncio.sleep(0)
        go_on.set()
        assert (await early, await late) == (200, 503)

    asyncio.run(run())
