"""One vLLM server, flown leg after leg: the same arrivals, another hand on the knobs each time.

Between legs the server drains and every knob returns to its baseline, which is checked and not assumed.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from kvpilot.clock import NS, Clock
from kvpilot.demo.instruments import Instruments
from kvpilot.demo.processes import Process, free_port
from kvpilot.link.controls import Scope
from kvpilot.link.place import LinkPlace
from kvpilot.score import EngineTotals, Score, Slo, score
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.client import Patience
from vllm_lab.closed_loop import ClosedLoop
from vllm_lab.leases import Hold
from vllm_lab.times import Times

CLASSES = {"batch": 0, "interactive": 1}
COUNTERS = ("preemptions_total", "recomputed_tokens_total", "drafted_tokens_total", "decode_tokens_total")
DRAIN_S = 12.0
SETTLE_S = 60.0
LOOK_NS = NS // 10
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Leg:
    """One pass of the same workload: under leases of constant value, under the pilot, or under nobody."""

    name: str
    knobs: Mapping[str, float] = field(default_factory=dict)
    shed: float = 0.0
    """Share of the lowest class that is turned away."""
    piloted: bool = False


@dataclass(frozen=True)
class Result:
    """What came of one leg."""

    leg: Leg
    score: Score
    counted: Mapping[str, int]
    seconds: float
    actions: int

    @property
    def goodput(self) -> float:
        return self.score.goodput_work or 0.0


class Flight:
    """Flies legs on a server that runs. `environ` is the link's environment, as the server has it."""

    def __init__(
        self,
        url: str,
        model: str,
        environ: Mapping[str, str],
        times: Times,
        vocabulary: int,
        folder: Path,
        clock: Clock,
    ) -> None:
        place = LinkPlace.from_environ(environ)
        assert place is not None
        self._url, self._model, self._place, self._times = url, model, place, times
        self._environ = environ
        self._vocabulary = vocabulary
        self._folder = folder
        self._clock = clock
        self._legs = 0
        self._pilot_url = ""
        self.instruments = Instruments(place)
        self.slos: dict[str, Slo] = {}

    def promise(self, slos: Mapping[str, Slo]) -> None:
        """What each class was promised, for the score and for the pilot."""
        self.slos = dict(slos)
        port = free_port()
        config = {
            "engine": {
                "name": self._place.engine,
                "telemetry": str(self._place.telemetry),
                "controls": str(self._place.controls),
            },
            "callers": self._environ["KVPILOT_CALLERS"],
            "classes": [
                {
                    "name": name,
                    "ttft": slos[name].ttft_s,
                    "ttft_per_prompt_token": slos[name].ttft_s_per_prompt_token,
                    "itl": slos[name].itl_s,
                }
                for name in sorted(CLASSES, key=CLASSES.__getitem__)
            ],
            "policies": str(ROOT / "policies"),
            "arm": {"after": 0, "finished": 0},
            "api": {"host": "127.0.0.1", "port": port},
            "journal": str(self._folder / "journal.db"),
            "socket": str(self._folder / "pilot.sock"),
        }
        (self._folder / "kvpilot.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        self._pilot_url = f"http://127.0.0.1:{port}"

    async def fly(
        self,
        leg: Leg,
        queues: Sequence[Sequence[Arrival]],
        patience: Mapping[str, Patience],
        temperature: Any,
        r: float,
        seconds: float,
        drain_s: float = DRAIN_S,
    ) -> Result:
        """One leg, from idle to idle."""
        await self._settle()
        self.instruments.begin_leg()
        before = {name: self.instruments.count(name) for name in COUNTERS}
        self._legs += 1
        actions = 0
        clients = ClosedLoop(
            self._url,
            self._model,
            patience,
            self._clock,
            self._times,
            self._vocabulary,
            temperature,
            f"leg{self._legs}",
        )
        async with self._hand(leg):
            began_ns = self._clock.monotonic_ns()
            running = asyncio.create_task(clients.run_clients(queues, drain_s))
            while not running.done():
                self.instruments.poll()
                await self._clock.sleep_until(self._clock.monotonic_ns() + LOOK_NS)
            outcomes = await running
            took_s = (self._clock.monotonic_ns() - began_ns) / NS
            if leg.piloted:
                async with httpx.AsyncClient(timeout=5.0, trust_env=False) as http:
                    actions = int((await http.get(f"{self._pilot_url}/status")).json()["actions"])
        await self._settle()
        counted = {name: self.instruments.count(name) - before[name] for name in COUNTERS}
        totals = EngineTotals(
            preemptions=counted["preemptions_total"],
            recomputed_tokens=counted["recomputed_tokens_total"],
            kv_occupancy_max=self.instruments.extremes.kv_occupancy_max,
            tail_waste_ratio=self.instruments.extremes.tail_waste_ratio,
        )
        judged = score(outcomes, self.slos, r, (0.0, seconds), totals, actions)
        return Result(leg, judged, counted, took_s, actions)

    @contextlib.asynccontextmanager
    async def _hand(self, leg: Leg) -> AsyncIterator[None]:
        """Whoever holds the knobs in this leg."""
        if leg.piloted:
            arguments = ["kvpilot", "run", "--config", str(self._folder / "kvpilot.yaml")]
            pilot = Process("pilot", arguments, self._folder / "pilot.log")
            try:
                await pilot.wait_until_answers(f"{self._pilot_url}/healthz", self._clock, within_s=30)
                yield
            finally:
                await pilot.stop()
        elif leg.knobs or leg.shed:
            with Hold(self._place) as hold:
                hold.set(**leg.knobs)
                if leg.shed:
                    hold.set(Scope("class_at_most", 0), shed_fraction=leg.shed)
                await self._until(leg.knobs)
                yield
        else:
            yield

    async def _until(self, knobs: Mapping[str, float]) -> None:
        """Wait until the engine echoes these values; small requests make it step, so that it tells."""
        deadline_ns = self._clock.monotonic_ns() + round(SETTLE_S * NS)
        async with httpx.AsyncClient(timeout=SETTLE_S, trust_env=False) as http:
            while self._clock.monotonic_ns() < deadline_ns:
                self.instruments.poll()
                if self.instruments.idle() or self.instruments.latest is None:
                    if self.instruments.latest is not None and self.instruments.moved_knobs() == knobs:
                        return
                    body = {"model": self._model, "prompt": [5], "max_tokens": 1}
                    await http.post(f"{self._url}/v1/completions", json=body)
                await self._clock.sleep_until(self._clock.monotonic_ns() + LOOK_NS)
        latest = self.instruments.latest
        busy = f"{latest['running']} running, {latest['waiting']} waiting" if latest else "no step seen"
        raise RuntimeError(
            f"the engine did not come to {dict(knobs)} within {SETTLE_S:g} s: it has "
            f"{self.instruments.moved_knobs()}, {busy}"
        )

    async def _settle(self) -> None:
        await self._until({})
