"""Several server processes behind one name: each sees the others, none loses its own lock by looking, and
what they accept of a grant is no more than all of it."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kvpilot.clock import NS, SystemClock
from kvpilot.link.controls import ControlsWriter, Lease, Scope
from kvpilot.link.files import open_controls
from kvpilot.link.following import open_pages
from kvpilot.link.place import LinkPlace
from kvpilot.link.valve_page import LeaseEcho, ValvePageReader, ValveSnapshot

SERVER = """
import uvicorn
from kvpilot.inside.valve import Valve

async def engine(scope, receive, send):
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})

class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)

Server(uvicorn.Config(Valve(engine), port=0, log_level="warning", access_log=False)).run()
"""
SCOPE = Scope("class_at_most", 0)
BODY = b"x" * 400
TOKENS = 100
GRANT = 1000.0


class Fleet:
    """Server processes, and a pilot's hand on their valves."""

    def __init__(self, folder: Path) -> None:
        for name in ("telemetry", "controls"):
            (folder / name).mkdir()
        self._environ = {
            "KVPILOT_TELEMETRY": str(folder / "telemetry"),
            "KVPILOT_CONTROLS": str(folder / "controls"),
            "KVPILOT_ENGINE": "demo",
        }
        place = LinkPlace.from_environ(self._environ)
        assert place is not None
        self.place = place
        self.children: list[subprocess.Popen[str]] = []
        self.urls: list[str] = []
        self.grants = 0
        self._renewal = 0

    def start(self) -> None:
        environ = {**os.environ, **self._environ}
        child = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=environ, stdout=subprocess.PIPE, text=True
        )
        self.children.append(child)
        assert child.stdout is not None
        self.urls.append(f"http://127.0.0.1:{int(child.stdout.readline())}")

    def stop(self) -> None:
        for child in self.children:
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert child.stdout is not None
            child.stdout.close()

    def renew(self, writer: ControlsWriter) -> None:
        self._renewal += 1
        self.grants += 1
        writer.write([Lease("admission_credits", SCOPE, GRANT, 2 * NS, self._renewal, 3)])

    def snapshots(self) -> list[ValveSnapshot]:
        pages = open_pages(self.place.telemetry_directory(None), "valve", self.place.uids, locked=True)
        try:
            found = [ValvePageReader(page.read_at).read() for page in pages]
        finally:
            for page in pages:
                page.close()
        assert None not in found
        return [each for each in found if each is not None]

    def echoes(self) -> list[LeaseEcho]:
        return [echo for each in self.snapshots() for echo in each.leases]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    try:
        yield fleet
    finally:
        fleet.stop()


def test_they_share_a_grant_by_their_load_and_keep_their_locks(fleet: Fleet) -> None:
    async def run() -> None:
        fleet.start()
        fleet.start()
        writer, page = open_controls(fleet.place, None, SystemClock())
        stopping = asyncio.Event()

        async def pilot() -> None:
            while not stopping.is_set():
                fleet.renew(writer)
                await asyncio.sleep(0.1)

        async def client(http: httpx.AsyncClient, url: str) -> int:
            admitted = 0
            while not stopping.is_set():
                admitted += (await http.post(f"{url}/v1/completions", content=BODY)).status_code == 200
                await asyncio.sleep(0.002)
            return admitted

        async with httpx.AsyncClient(timeout=10) as http:
            work = [asyncio.create_task(pilot())]
            async with asyncio.timeout(10):
                # Both claim half, three seconds after they came.
                while sorted(echo.share for echo in fleet.echoes()) != [0.5, 0.5]:
                    await asyncio.sleep(0.05)
            before, granted = admitted_by(fleet), fleet.grants
            clients = [asyncio.create_task(client(http, url)) for url in (*fleet.urls, fleet.urls[0])]
            async with asyncio.timeout(15):
                # The first is offered more than the second.
                while max(echo.share for echo in fleet.echoes()) < 0.53:
                    assert sum(echo.share for echo in fleet.echoes()) <= 1 + 1e-6
                    assert len(fleet.snapshots()) == 2  # both locks are held, many looks later
                    await asyncio.sleep(0.05)
            stopping.set()
            admitted = sum(await asyncio.gather(*clients))
            await asyncio.gather(*work)
        grants = fleet.grants - granted + 1  # the one in force when we began to count
        assert TOKENS * admitted <= GRANT * grants + 2 * TOKENS
        assert TOKENS * admitted >= 0.5 * GRANT * grants
        assert admitted_by(fleet) - before == admitted
        shed = [row.shed_by for each in fleet.snapshots() for row in each.rows]
        assert all(by["credits"] > 0 and not by["fraction"] for by in shed)
        writer.close()
        page.close()

    asyncio.run(run())


def test_one_that_is_killed_leaves_its_share_to_the_other(fleet: Fleet) -> None:
    async def run() -> None:
        fleet.start()
        fleet.start()
        writer, page = open_controls(fleet.place, None, SystemClock())

        async def until(shares: list[float]) -> None:
            async with asyncio.timeout(15):
                while sorted(echo.share for echo in fleet.echoes()) != shares:
                    fleet.renew(writer)
                    await asyncio.sleep(0.05)

        await until([0.5, 0.5])
        fleet.children[0].kill()
        fleet.children[0].wait()
        await until([1.0])
        writer.close()
        page.close()

    asyncio.run(run())


def admitted_by(fleet: Fleet) -> int:
    """Requests let in, by the valves' own word."""
    return sum(row.admitted for each in fleet.snapshots() for row in each.rows)
