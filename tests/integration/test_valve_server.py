"""The valve in front of a real HTTP server in a process of its own: streams, hang-ups, leases and the
lock."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from kvpilot.clock import NS, SystemClock
from kvpilot.link.controls import ControlsWriter, Lease, Scope
from kvpilot.link.files import open_controls
from kvpilot.link.following import open_pages
from kvpilot.link.place import LinkPlace
from kvpilot.link.valve_page import ValvePageReader, ValveSnapshot

SERVER = """
import asyncio, sys
import uvicorn
from kvpilot.inside.valve import Valve

async def engine(scope, receive, send):
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    tag = scope["state"].get("kvpilot") if scope["method"] == "POST" else None
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if tag is None:
        await send({"type": "http.response.body", "body": b"passed"})
        return
    while (await receive()).get("more_body"):
        pass
    gone = asyncio.ensure_future(receive())
    while not gone.done():
        await send({"type": "http.response.body", "body": repr(tuple(tag)).encode(), "more_body": True})
        await asyncio.wait([gone], timeout=0.02)

class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)

Server(uvicorn.Config(Valve(engine), port=0, log_level="warning", access_log=False)).run()
"""


class Served:
    """A running server, and the pilot's side of its valve."""

    def __init__(self, port: int, place: LinkPlace) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.place = place
        self._renewal = 0

    def snapshot(self) -> ValveSnapshot:
        (page,) = open_pages(self.place.telemetry_directory(None), "valve", self.place.uids, locked=True)
        try:
            snapshot = ValvePageReader(page.read_at).read()
        finally:
            page.close()
        assert snapshot is not None
        return snapshot

    async def until(self, true: Callable[[ValveSnapshot], bool]) -> ValveSnapshot:
        async with asyncio.timeout(10):
            while not true(snapshot := self.snapshot()):
                await asyncio.sleep(0.01)
        return snapshot

    async def shed(self, writer: ControlsWriter, value: float) -> None:
        """Renew a lease until the valve echoes it."""
        while self.snapshot().fractions["interactive"] != value:
            self._renewal += 1
            writer.write([Lease("shed_fraction", Scope("class_at_most", 1), value, NS, self._renewal, 3)])
            await asyncio.sleep(0.05)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    for name in ("telemetry", "controls"):
        (tmp_path / name).mkdir()
    callers = tmp_path / "callers.json"
    callers.write_text(
        json.dumps({"classes": {"batch": 0, "interactive": 1, "gold": 2}, "header": "x-kvpilot-caller"})
    )
    environ = {
        "KVPILOT_TELEMETRY": str(tmp_path / "telemetry"),
        "KVPILOT_CONTROLS": str(tmp_path / "controls"),
        "KVPILOT_ENGINE": "demo",
        "KVPILOT_CALLERS": str(callers),
    }
    child = subprocess.Popen(
        [sys.executable, "-c", SERVER], env={**os.environ, **environ}, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    try:
        place = LinkPlace.from_environ(environ)
        assert place is not None
        yield Served(int(child.stdout.readline()), place)
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            assert child.wait(10) in (0, -signal.SIGTERM)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        # The lock went with the process; the page stays for the recorder.
        assert open_pages(place.telemetry_directory(None), "valve", place.uids, locked=True) == []
        (page,) = open_pages(place.telemetry_directory(None), "valve", place.uids, locked=False)
        page.close()


@asynccontextmanager
async def stream(served: Served, caller: str) -> AsyncIterator[httpx.Response]:
    async with httpx.AsyncClient(timeout=10) as http:
        headers = {"x-kvpilot-caller": caller}
        async with http.stream("POST", f"{served.url}/v1/completions", headers=headers, json={}) as response:
            yield response


def test_streams_flow_and_a_hang_up_is_counted_out_once(served: Served) -> None:
    async def run() -> None:
        async with stream(served, "interactive") as response:
            chunks = response.aiter_bytes()
            first = [await anext(chunks) for _ in range(3)]  # endless: a buffering valve would never answer
            assert first[0].startswith(b"('interactive', 1, '')")
            flowing = await served.until(lambda s: s.in_flight == 1 and s.last_byte_ns > s.first_byte_ns > 0)
            assert flowing.seconds_since_byte is not None
            assert flowing.seconds_since_byte < 5
        gone = await served.until(lambda s: s.in_flight == 0)
        (row,) = gone.rows
        assert (row.class_name, row.offered, row.admitted, row.shed) == ("interactive", 1, 1, 0)

    asyncio.run(run())


def test_a_live_pilots_lease_sheds_and_its_death_opens(served: Served) -> None:
    async def run() -> None:
        writer, page = open_controls(served.place, None, SystemClock())
        async with httpx.AsyncClient(timeout=10) as http:
            await served.shed(writer, 1.0)
            refused = await http.post(
                f"{served.url}/v1/chat/completions", headers={"x-kvpilot-caller": "interactive"}, json={}
            )
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.json()["error"]["class"] == "interactive"
            assert (await http.get(f"{served.url}/health")).text == "passed"
        async with stream(served, "gold") as response:  # above the class named
            assert response.status_code == 200
        writer.close()
        page.close()  # no renewal from here on: one ttl, then a linear opening
        began = SystemClock().monotonic_ns()
        await served.until(lambda s: 0 < s.fractions["interactive"] < 1)
        assert (SystemClock().monotonic_ns() - began) / NS < 4

    asyncio.run(run())
