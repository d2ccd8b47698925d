"""One engine process, flown leg after leg: the same arrivals, another hand on the knobs each time.

Between legs the engine drains and returns to its baselines, which is checked and not assumed.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import yaml

from kvpilot.clock import NS, Clock
from kvpilot.demo.calibrate import Calibration, calibrate, slos
from kvpilot.demo.fixed import held
from kvpilot.demo.instruments import Instruments
from kvpilot.demo.processes import DemoError, Process, free_port
from kvpilot.demo.screen import Screen
from kvpilot.demo.settings import Leg, Scenario
from kvpilot.link.place import ENVIRON_CONTROLS, ENVIRON_ENGINE, ENVIRON_TELEMETRY, LinkPlace
from kvpilot.score import EngineTotals, Slo, score
from kvpilot.workload import generator
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.client import CALLER_HEADER, Clients, Patience

ENGINE = "demo"
MODEL = "kvpilot-tiny"
CLASSES = {"batch": 0, "interactive": 1}
TENANTS = sorted({tenant for mix in generator.CLASSES for tenant, _ in mix.tenants})
RETRIES = {"batch": 0, "interactive": 2}
MEASURED_WITH = {"prefill_chunk_tokens": 512.0}
"""An oversubscribed engine must survive being measured; prompt tokens a second hardly depend on it."""
DRAIN_S = 10.0
SETTLE_S = 30.0
LOOK_NS = NS // 10
COUNTERS = ("oom_total", "preemptions_total", "recomputed_tokens_total")


class Flight:
    """The engine under test and everything that looks at it: `start`, then `fly` each leg, then `stop`."""

    def __init__(self, scenario: Scenario, folder: Path, screen: Screen, clock: Clock) -> None:
        self._scenario = scenario
        self._folder = folder
        self._screen = screen
        self._clock = clock
        self._port = free_port()
        self._environ = {
            ENVIRON_TELEMETRY: str(folder / "telemetry"),
            ENVIRON_CONTROLS: str(folder / "controls"),
            ENVIRON_ENGINE: ENGINE,
            "KVPILOT_CALLERS": str(folder / "callers.json"),
        }
        self._place = LinkPlace.from_environ(self._environ)
        self._engine: Process | None = None
        self.calibration: Calibration
        self.slos: dict[str, Slo] = {}
        self.instruments: Instruments

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def start(self, prompt: Any) -> None:
        """Start the engine and measure it. Raises DemoError."""
        for name in ("telemetry", "controls"):
            (self._folder / name).mkdir(mode=0o750)
        callers = {"classes": CLASSES, "default": "batch", "header": CALLER_HEADER, "tenants": TENANTS}
        (self._folder / "callers.json").write_text(json.dumps(callers))
        arguments = ["kvengine", "serve", "--host", "127.0.0.1", "--port", str(self._port), "--name", MODEL]
        # Every leg replays the same prompts: a cache would serve the later legs what the earlier computed.
        arguments += ["--no-prefix-cache", *self._scenario.engine_arguments]
        self._engine = Process("engine", arguments, self._folder / "engine.log", self._environ)
        await self._engine.wait_until_answers(f"{self.url}/health", self._clock, within_s=60)
        assert self._place is not None
        self.instruments = Instruments(self._place)
        async with held(MEASURED_WITH, self._place, self.instruments.nonce, self._clock):
            await self._until_in_force(MEASURED_WITH)
            self.calibration = await calibrate(self.url, MODEL, prompt)
        self.slos = slos(self.calibration)
        self._write_pilot_config()

    async def stop(self) -> None:
        if self._engine is not None:
            await self._engine.stop()

    def _write_pilot_config(self) -> None:
        config = {
            "engine": {"name": ENGINE, "telemetry": "telemetry", "controls": "controls"},
            "callers": "callers.json",
            "classes": [
                {
                    "name": name,
                    "ttft": self.slos[name].ttft_s,
                    "ttft_per_prompt_token": self.slos[name].ttft_s_per_prompt_token,
                    "itl": self.slos[name].itl_s,
                }
                for name in sorted(CLASSES, key=CLASSES.__getitem__)
            ],
            "arm": {"after": 0, "finished": 0},
            "api": {"host": "127.0.0.1", "port": free_port()},
            "journal": "journal.db",
            "socket": "pilot.sock",
        }
        (self._folder / "kvpilot.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        self._pilot_url = f"http://127.0.0.1:{config['api']['port']}"  # type: ignore[index]

    async def fly(
        self, leg: Leg, arrivals: Sequence[Arrival], prompts: Mapping[int, str], seconds: float
    ) -> dict[str, Any]:
        """One leg, from idle to idle. Returns the score with the leg's name and settings."""
        await self._settle()
        self.instruments.begin_leg()
        before = {field: self.instruments.count(field) for field in COUNTERS}
        actions = 0
        async with self._hand(leg) as pilot:
            clients = Clients(
                self.url, MODEL, lambda arrival: prompts[arrival.seed], self._patience(), self._clock
            )
            self._screen.begin_leg()
            running = asyncio.create_task(clients.run(arrivals, DRAIN_S))
            try:
                await self._watch(running, leg, seconds, pilot is not None)
                outcomes = await running
            finally:
                running.cancel()
                self._screen.end_leg()
            if pilot is not None:
                # Knob changes that the pilot made, as its own status counts them.
                actions = int((await self._status())["actions"])
        await self._settle()
        diff = {field: self.instruments.count(field) - before[field] for field in COUNTERS}
        totals = EngineTotals(
            oom=diff["oom_total"],
            preemptions=diff["preemptions_total"],
            recomputed_tokens=diff["recomputed_tokens_total"],
            kv_occupancy_max=self.instruments.extremes.kv_occupancy_max,
            tail_waste_ratio=self.instruments.extremes.tail_waste_ratio,
        )
        result = score(outcomes, self.slos, self.calibration.speed.r, (0.0, seconds), totals, actions)
        return {
            "name": leg.name,
            "settings": dict(leg.knobs),
            "lateness_s": clients.lateness_s,
            **asdict(result),
        }

    async def _watch(self, running: "asyncio.Task[Any]", leg: Leg, seconds: float, piloted: bool) -> None:
        """Show the leg while it runs; the pilot is asked twice a second what it holds, and why."""
        began_ns = asked_ns = self._clock.monotonic_ns()
        why: list[str] = []
        while not running.done():
            now_ns = self._clock.monotonic_ns()
            if piloted and now_ns >= asked_ns:
                asked_ns = now_ns + NS // 2
                why = _reasons(await self._status())
            self.instruments.poll()
            state = {**self.instruments.state(), "why": why}
            self._screen.show(leg.name, (now_ns - began_ns) / NS, seconds, state)
            await self._clock.sleep_until(now_ns + LOOK_NS)

    def _patience(self) -> dict[str, Patience]:
        """Clients give up at twice the time that a long answer within its targets would take."""
        return {
            name: Patience(min(2 * (slo.ttft_s + 200 * slo.itl_s), 60.0), RETRIES[name])
            for name, slo in self.slos.items()
        }

    @contextlib.asynccontextmanager
    async def _hand(self, leg: Leg) -> AsyncIterator[Process | None]:
        """Whoever holds the knobs in this leg."""
        assert self._place is not None
        if leg.kind == "static":
            async with held(leg.knobs, self._place, self.instruments.nonce, self._clock):
                await self._until_in_force(leg.knobs)
                yield None
        elif leg.kind == "off":
            yield None
        else:
            arguments = ["kvpilot", "run", "--config", str(self._folder / "kvpilot.yaml")]
            pilot = Process("pilot", arguments, self._folder / "pilot.log", self._environ)
            try:
                await pilot.wait_until_answers(f"{self._pilot_url}/healthz", self._clock, within_s=30)
                yield pilot
            finally:
                await pilot.stop()

    async def _status(self) -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=5.0, trust_env=False) as http:
            status: dict[str, Any] = (await http.get(f"{self._pilot_url}/status")).json()
        return status

    async def _until_in_force(self, knobs: Mapping[str, float]) -> None:
        """Wait until the engine echoes these values. Raises DemoError."""
        deadline_ns = self._clock.monotonic_ns() + round(SETTLE_S * NS)
        while self._clock.monotonic_ns() < deadline_ns:
            self.instruments.poll()
            if self.instruments.moved_knobs() == knobs:
                return
            await self._clock.sleep_until(self._clock.monotonic_ns() + LOOK_NS)
        raise DemoError(f"the engine did not take {dict(knobs)} within {SETTLE_S:g} s; see its log")

    async def _settle(self) -> None:
        """Wait until nothing runs or waits and every knob is at its baseline.

        A small request makes the engine step, so that it tells. Raises DemoError where it does not come to
        rest: the next leg would not be comparable.
        """
        deadline_ns = self._clock.monotonic_ns() + round(SETTLE_S * NS)
        async with httpx.AsyncClient(timeout=SETTLE_S, trust_env=False) as http:
            while self._clock.monotonic_ns() < deadline_ns:
                self.instruments.poll()
                if self.instruments.idle():
                    await http.post(
                        f"{self.url}/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 1}
                    )
                    self.instruments.poll()
                    if self.instruments.idle() and not self.instruments.moved_knobs():
                        return
                await self._clock.sleep_until(self._clock.monotonic_ns() + LOOK_NS)
        raise DemoError(
            f"the engine did not come to rest within {SETTLE_S:g} s: knobs away from baseline: "
            f"{self.instruments.moved_knobs() or 'none'}; see {self._folder / 'engine.log'}"
        )


def _reasons(status: Mapping[str, Any]) -> list[str]:
    """What the pilot holds now, one line a lease: the knob, its value, and the rule that holds it."""
    return [
        f"{lease['knob']} {lease['value']:g}"
        + ("" if lease["scope"] == "all" else f" for {lease['scope']}")
        + f"   {lease['policy']} / {lease['rule']}"
        for lease in status["leases"]
    ]
