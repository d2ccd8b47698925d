"""The pilot dies with the knobs away from their baselines: the engine flies itself, and nobody notices."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from kvpilot.clock import NS, SystemClock
from kvpilot.demo.instruments import Instruments
from kvpilot.demo.processes import Process, free_port
from kvpilot.link.place import LinkPlace

TTL_S = 2.0
STEP_S = 0.5
"""Far above any step of this engine: the bound must not fail for a busy machine."""

POLICY = """
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: away}
spec:
  mode: enforce
  inputs:
    steps: {signal: requests_running, agg: last, maxAge: 30s}
  onMissing: hold
  rules:
    - name: hold-away
      when: steps >= 0
      lease: 2s
      do:
        - {knob: prefill_chunk_tokens, set: 64}
        - {knob: speculative_tokens, set: 0}
        - {knob: max_running, set: 4}
        - {knob: step_token_budget, set: 128}
        - {knob: admission_watermark, set: 50%}
"""
AWAY = {
    "prefill_chunk_tokens": 64,
    "speculative_tokens": 0,
    "max_running": 4,
    "step_token_budget": 128,
    "admission_watermark": 0.5,
}


class World:
    """A real engine, a real pilot that holds every knob away, and an onlooker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = SystemClock()
        for name in ("telemetry", "controls", "policies"):
            (folder / name).mkdir(mode=0o750)
        self.environ = {
            "KVPILOT_TELEMETRY": str(folder / "telemetry"),
            "KVPILOT_CONTROLS": str(folder / "controls"),
            "KVPILOT_ENGINE": "chaos",
        }
        (folder / "policies/away.yaml").write_text(POLICY)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start_pilot(self) -> "subprocess.Popen[bytes]":
        config = {
            "classes": [{"name": "default", "ttft": "2s", "itl": "50ms"}],
            "policies": str(self.folder / "policies"),
            "arm": {"after": 0, "finished": 0},
            "api": {"port": free_port()},
            "journal": str(self.folder / "journal.db"),
            "socket": str(self.folder / "pilot.sock"),
        }
        (self.folder / "kvpilot.yaml").write_text(json.dumps(config))
        with (self.folder / "pilot.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "kvpilot", "run", "--config", str(self.folder / "kvpilot.yaml")],
                env={**os.environ, **self.environ},
                stdout=log,
                stderr=log,
            )

    def place(self) -> LinkPlace:
        place = LinkPlace.from_environ(self.environ)
        assert place is not None
        return place

    async def until(self, condition: Callable[[], bool], within_s: float, what: str) -> float:
        """Seconds until `condition` held; fails with `what` after `within_s`."""
        began_ns = self.clock.monotonic_ns()
        while (elapsed_s := (self.clock.monotonic_ns() - began_ns) / NS) < within_s:
            if condition():
                return elapsed_s
            await asyncio.sleep(0.01)
        pytest.fail(
            f"{what} within {within_s:g} s; pilot said: {(self.folder / 'pilot.log').read_text()[-800:]}"
        )


@asynccontextmanager
async def flying(folder: Path) -> AsyncIterator[tuple[World, Instruments]]:
    world = World(folder)
    arguments = ["kvengine", "serve", "--port", str(world.port), "--memory", "64MiB"]
    engine = Process("engine", arguments, folder / "engine.log", world.environ)
    try:
        await engine.wait_until_answers(f"{world.url}/health", world.clock, within_s=60)
        instruments = Instruments(world.place())
        yield world, instruments
        instruments.close()
    finally:
        await engine.stop()


async def complete(http: httpx.AsyncClient, url: str, tokens: int = 40) -> int:
    body = {"model": "kvpilot-tiny", "prompt": "{" * 200, "max_tokens": tokens, "ignore_eos": True}
    return (await http.post(f"{url}/v1/completions", json=body)).status_code


async def load(url: str, stop: asyncio.Event) -> list[int]:
    """Six clients, one request after another; the status of every answer."""
    statuses: list[int] = []

    async def one(http: httpx.AsyncClient) -> None:
        while not stop.is_set():
            statuses.append(await complete(http, url))

    async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
        await asyncio.gather(*(one(http) for _ in range(6)))
    return statuses


def test_killed_under_load_every_knob_is_back_within_ttl_and_no_request_fails(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with flying(tmp_path) as (world, instruments):
            stop = asyncio.Event()
            loading = asyncio.create_task(load(world.url, stop))
            moved = _look(instruments)
            for _ in range(3):
                pilot = world.start_pilot()
                await world.until(lambda: moved() == AWAY, 30, "the pilot did not hold every knob away")
                pilot.send_signal(signal.SIGKILL)
                pilot.wait()
                back_s = await world.until(
                    lambda: moved() == {}, TTL_S + STEP_S + 5, "knobs did not come back"
                )
                assert back_s <= TTL_S + STEP_S
            stop.set()
            statuses = await asyncio.wait_for(loading, 60)
            assert len(statuses) > 20
            assert set(statuses) == {200}

    asyncio.run(scenario())


def test_killed_while_the_engine_is_idle_the_next_request_meets_baselines(tmp_path: Path) -> None:
    """An idle engine must not obey a pilot that died meanwhile."""

    async def scenario() -> None:
        async with flying(tmp_path) as (world, instruments):
            moved = _look(instruments)
            async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
                assert await complete(http, world.url) == 200
                pilot = world.start_pilot()
                await world.until(lambda: moved() == AWAY, 30, "an idle engine did not take the leases")
                pilot.send_signal(signal.SIGKILL)
                pilot.wait()
                await world.until(lambda: moved() == {}, TTL_S + 5, "an idle engine kept dead leases")
                assert await complete(http, world.url) == 200
                assert moved() == {}

    asyncio.run(scenario())


def test_a_pilot_told_to_stop_withdraws_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with flying(tmp_path) as (world, instruments):
            moved = _look(instruments)
            async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
                assert await complete(http, world.url) == 200
            pilot = world.start_pilot()
            await world.until(lambda: moved() == AWAY, 30, "the pilot did not hold every knob away")
            pilot.terminate()
            assert pilot.wait(10) == 0
            await world.until(lambda: moved() == {}, 0.5, "leases outlived a landing")

    asyncio.run(scenario())


def _look(instruments: Instruments) -> Callable[[], dict[str, float]]:
    def moved() -> dict[str, float]:
        instruments.poll()
        return instruments.moved_knobs()

    return moved
