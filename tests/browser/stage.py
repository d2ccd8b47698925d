"""A pilot whose console is on show: a whole flight in virtual time, served by a real HTTP server in a thread.

Nothing passes by itself: tests fly the flight on, and say when a frame is made. So every picture is the same
each time.
"""

import asyncio
import os
import random
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNIT = Path(__file__).parents[1] / "unit"
sys.path[:0] = [str(UNIT / "pilot"), str(UNIT / "incident"), str(UNIT.parent)]

from plant import SHIPPED, Plant, shipped  # noqa: E402
from recorded import Flown  # noqa: E402

from kvpilot.alerts.outbox import Outbox  # noqa: E402
from kvpilot.api.console.show import Show  # noqa: E402
from kvpilot.api.http import build_app, build_server  # noqa: E402
from kvpilot.flight import Flight  # noqa: E402
from kvpilot.journal.store import JournalStore  # noqa: E402
from kvpilot.journal.writer import JournalWriter  # noqa: E402
from kvpilot.link.place import LinkPlace  # noqa: E402
from kvpilot.pilot import TICK_NS  # noqa: E402
from kvpilot.policy_directory import PolicyDirectory  # noqa: E402
from kvpilot.workload.arrival import Arrival  # noqa: E402

PATIENCE_S = 20.0
HOSTILE = "<img src=x onerror=alert(1)>"
TENANTS = ("acme-search", "globex", "initech", "hooli", HOSTILE)
CALM_S = 6.0
SHADOW = """
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: rehearsal, annotations: {summary: Would run fewer requests at once while KV memory is tight}}
spec:
  mode: shadow
  priority: 50
  inputs:
    occupancy: {signal: kv_occupancy}
  rules:
    - name: fewer-at-once
      when: occupancy > 0.8
      until: occupancy < 0.6
      for: 500ms
      do: [{knob: max_running, set: 16}]
"""


def arrivals(seconds: float, calm_per_s: float, burst_per_s: float) -> list[Arrival]:
    """Two classes from five tenants: calm for `CALM_S`, then a burst."""
    dice, at_s, found = random.Random(3), 0.0, []
    while at_s < seconds:
        at_s += dice.expovariate(calm_per_s if at_s < CALM_S else burst_per_s)
        klass = dice.choice(("batch", "interactive", "interactive"))
        prompt = dice.randint(200, 900) if klass == "batch" else dice.randint(40, 200)
        tenant = dice.choices(TENANTS, (5, 4, 3, 2, 1))[0]
        found.append(Arrival(at_s, prompt, dice.randint(80, 500), klass, tenant, "text", len(found)))
    return found


class Stage:
    """One flight and its server. Everything that touches the flight runs in the server's loop."""

    def __init__(self, folder: Path, burst_per_s: float = 24.0) -> None:
        self.world = Plant(*shipped(), SHADOW)
        self._coming = arrivals(120.0, 4.0, burst_per_s)[::-1]
        self._store = JournalStore(folder / "journal.sqlite")
        self._written = 0
        (folder / "t").mkdir(mode=0o750)
        directory = PolicyDirectory(SHIPPED, ("batch", "interactive"), self.world.clock)
        directory.load()
        self.flight = Flight(
            "chat-eu",
            self.world.pilot,
            directory,
            Outbox({}, "http://pilot"),
            JournalWriter(self._store),
            place=LinkPlace(folder / "t", folder / "t", "chat-eu", frozenset({os.getuid()})),
            config_path=Path("/etc/kvpilot/kvpilot.yaml"),
        )
        self.telemetry = folder / "t"
        self.show = Show(self.flight, self.world.clock)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._server = build_server(build_app(self.flight, self.world.clock, show=self.show))
        self._loop.run_until_complete(self._server.serve(sockets=[self._listener]))
        self._loop.run_until_complete(self._hang_up())
        self._loop.close()

    async def _hang_up(self) -> None:
        """Browsers keep connections open, and open new ones while a server closes."""
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        for _ in range(3):
            await asyncio.sleep(0)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.do(self.show.close)
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)

    def do(self, work: Callable[[], Any]) -> Any:
        """Run `work` in the server's thread, and wait for it."""

        async def run() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(PATIENCE_S * 3)

    def beat(self) -> None:
        """One frame for everybody who watches."""
        self.do(self.show.beat)

    def fly(self, seconds: float) -> None:
        """The flight goes on by `seconds`, with a point of history for each second."""
        self.do(lambda: self._fly(self.world.now_s + seconds))

    def _fly(self, until_s: float) -> None:
        world = self.world
        next_point_s = world.now_s
        while world.now_s < until_s:
            while self._coming and self._coming[-1].at_s <= world.now_s:
                world._arrive(self._coming.pop())
            if world.clock.monotonic_ns() >= world._next_tick_ns:
                world.valve.look()
                world.pilot.tick()
                world.valve.look()
                late = (world.clock.monotonic_ns() - world._next_tick_ns) // TICK_NS
                world._next_tick_ns += (1 + late) * TICK_NS
                if world.now_s >= next_point_s:
                    self.show.history.take(world.pilot.board)
                    next_point_s += 1.0
            world._turn(self._coming)
        self._store.write(world.rows[self._written :])
        self._written = len(world.rows)

    def record_death(self) -> str:
        """A start that was killed for want of memory, recorded. Returns its nonce."""
        start = Flown(nonce=0x7A3C_91D2_0E5B_44F8)
        start.step(ms=20, count=400, kv_blocks_free=60)
        for free in range(60, 0, -1):
            start.step(ms=25, count=8, kv_blocks_free=free, waiting=60 - free, knob_max_running=16)
        start.step(ms=80, count=20, kv_blocks_free=0, preemptions_total=1, host_available_bytes=90 << 20)
        start.save(self.telemetry, "chat-eu")
        return f"{start.writer.nonce:016x}"
