"""A live engine and pilot under load with a real Prometheus beside them: what dashboards are held to.

The shipped model, two classes, four tenants, targets tight enough that rules act on any machine, a rule that
is only shadowed and one that is always judged: so every part of every dashboard has something to show within
seconds.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from kvengine.model.domains import prompt
from kvpilot.clock import NS, SystemClock
from kvpilot.demo.processes import Process, free_port
from kvpilot.link.place import ENVIRON_CONTROLS, ENVIRON_ENGINE, ENVIRON_TELEMETRY
from kvpilot.workload import generator
from kvpilot.workload.arrival import Arrival, Speed
from kvpilot.workload.client import CALLER_HEADER, Clients, Patience

ROOT = Path(__file__).resolve().parents[2]
GPU = "GPU-5f1c9a52-03a6-7f0e-9d7a-2b9f2f5a7c11"
"""Of the recorded readings."""
BESIDE = os.pathsep.join(map(str, (ROOT / "dashboards", ROOT / "tests" / "unit" / "pilot")))
ENGINE, MODEL, CLUSTER = "lab", "kvpilot-tiny", "lab"
CLASSES = {"batch": 0, "interactive": 1}
TENANTS = sorted({tenant for mix in generator.CLASSES for tenant, _ in mix.tenants})
SPEED = Speed(6_000.0, 900.0)
"""Of a small machine; a faster one is offered less than it can do, which shows as much."""
SHADOWED = """\
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: rehearsal}
spec:
  mode: shadow
  inputs:
    running: {signal: requests_running}
  rules:
    - name: smaller-chunk
      when: running > 3.0
      until: running < 2.0
      keepFor: 500ms
      do: [{knob: prefill_chunk_tokens, set: 64}]
"""
JUDGED = """\
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: squeeze}
spec:
  inputs:
    running: {signal: requests_running}
  rules:
    - name: fewer-at-once
      when: running > 9.0
      until: running < 8.0
      do: [{knob: max_running, set: 8}]
      verify: {input: running, falls: 10%, within: 500ms}
"""
"""Its effect is judged soon after each change."""
TARGETS = {"ttft": 1.0, "itl": 0.03}
"""Seconds; no small machine keeps these in a burst, so that the latency rules act."""
FLOWN = (
    "device-headroom",
    "engine-alerts",
    "itl-guard-blind",
    "kv-shedder",
    "thrash-escape",
)
"""Policies that move knobs for a reason, not every tick: else no change can be told from others."""
MEMORY = "56MiB"
"""So little that bursts run out of KV."""


class Lab:
    """Everything that runs; `url` is Prometheus's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = SystemClock()
        self._http = httpx.AsyncClient(timeout=10.0, trust_env=False)
        self.engine_port, self.pilot_port, self.prometheus_port = free_port(), free_port(), free_port()
        self.environ = {
            ENVIRON_TELEMETRY: str(folder / "telemetry"),
            ENVIRON_CONTROLS: str(folder / "controls"),
            ENVIRON_ENGINE: ENGINE,
            "KVPILOT_CALLERS": str(folder / "callers.json"),
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.prometheus_port}"

    @property
    def pilot_url(self) -> str:
        return f"http://127.0.0.1:{self.pilot_port}"

    def write(self) -> None:
        """The configuration of all three."""
        for name in ("telemetry", "controls", "policies"):
            (self.folder / name).mkdir(mode=0o750)
        callers = {"classes": CLASSES, "default": "batch", "header": CALLER_HEADER, "tenants": TENANTS}
        (self.folder / "callers.json").write_text(json.dumps(callers))
        for name in FLOWN:
            (self.folder / "policies" / f"{name}.yaml").write_text(
                (ROOT / f"policies/{name}.yaml").read_text()
            )
        (self.folder / "policies" / "rehearsal.yaml").write_text(SHADOWED)
        (self.folder / "policies" / "squeeze.yaml").write_text(JUDGED)
        pilot = {
            "callers": "callers.json",
            "policies": "policies",
            "classes": [{"name": name, **TARGETS} for name in CLASSES],
            "arm": {"after": 0, "finished": 0},
            "gpu": {"devices": [GPU]},
            "api": {"port": self.pilot_port},
            "journal": "journal.db",
            "socket": "pilot.sock",
        }
        (self.folder / "kvpilot.yaml").write_text(yaml.safe_dump(pilot, sort_keys=False))
        rules = ROOT / "dashboards" / "prometheus"
        prometheus = {
            "global": {
                "scrape_interval": "1s",
                "evaluation_interval": "1s",
                "external_labels": {"cluster": CLUSTER},
            },
            "rule_files": [str(rules / "recording.yml"), str(rules / "alerts.yml")],
            "scrape_configs": [
                {
                    "job_name": "kvpilot",
                    "static_configs": [
                        {"targets": [f"127.0.0.1:{self.pilot_port}"], "labels": {"cluster": CLUSTER}}
                    ],
                }
            ],
        }
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(prometheus, sort_keys=False))

    def processes(self) -> list[tuple[Process, str]]:
        """Started now, each with the address that answers once it is up."""
        folder = self.folder
        engine = ["kvengine", "serve", "--port", str(self.engine_port), "--name", MODEL]
        engine += ["--memory", MEMORY]
        pilot = ["kvboards.recorded_gpu", "run", "--config", str(folder / "kvpilot.yaml")]
        return [
            (
                Process("engine", engine, folder / "engine.log", self.environ),
                f"http://127.0.0.1:{self.engine_port}/health",
            ),
            (
                Process("pilot", pilot, folder / "pilot.log", {**self.environ, "PYTHONPATH": BESIDE}),
                f"{self.pilot_url}/healthz",
            ),
        ]

    def arrivals(self, seconds: float, load: float) -> list[Arrival]:
        """The demo's bursty two-class load."""
        return generator.generate(1, seconds, load, SPEED)

    async def drive(self, arrivals: Sequence[Arrival], drain_s: float = 1.0) -> None:
        """Send every request at its time."""
        prompts = {one.seed: prompt(one.domain, one.prompt_tokens, one.seed % 5) for one in arrivals}
        patience = {name: Patience(15.0, 1) for name in CLASSES}
        url = f"http://127.0.0.1:{self.engine_port}"
        clients = Clients(url, MODEL, lambda arrival: prompts[arrival.seed], patience, self.clock)
        await clients.run(arrivals, drain_s)

    async def query(self, path: str, **parameters: Any) -> dict[str, Any]:
        """One call of Prometheus's HTTP API. Raises httpx.HTTPError; an error answer is returned as it is."""
        answer: dict[str, Any] = (await self._http.get(f"{self.url}/api/v1/{path}", params=parameters)).json()
        return answer

    async def close(self) -> None:
        """Hang up on Prometheus."""
        await self._http.aclose()


@contextlib.asynccontextmanager
async def flying(folder: Path) -> AsyncIterator[Lab]:
    """A lab in `folder`, up and answering. Raises DemoError where something does not start."""
    lab = Lab(folder)
    lab.write()
    started: list[Process] = []
    prometheus: asyncio.subprocess.Process | None = None
    try:
        for process, address in lab.processes():
            started.append(process)
            await process.wait_until_answers(address, lab.clock, within_s=60)
        prometheus = await _prometheus(lab)
        yield lab
    finally:
        await lab.close()
        if prometheus is not None and prometheus.returncode is None:
            prometheus.terminate()
            await prometheus.wait()
        for process in reversed(started):
            await process.stop()


async def _prometheus(lab: Lab) -> asyncio.subprocess.Process:
    child = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={lab.folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={lab.folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{lab.prometheus_port}",
        "--enable-feature=exemplar-storage",
        "--log.level=warn",
        env={**os.environ, "GOMAXPROCS": "1"},
    )
    deadline_ns = lab.clock.monotonic_ns() + 30 * NS
    while lab.clock.monotonic_ns() < deadline_ns:
        if child.returncode is not None:
            raise RuntimeError(f"prometheus ended with {child.returncode}: is its configuration right?")
        with contextlib.suppress(httpx.HTTPError):
            async with httpx.AsyncClient(timeout=2.0, trust_env=False) as http:
                if (await http.get(f"{lab.url}/-/ready")).status_code == 200:
                    return child
        await lab.clock.sleep_until(lab.clock.monotonic_ns() + NS // 10)
    raise RuntimeError("prometheus did not answer within 30 s")
