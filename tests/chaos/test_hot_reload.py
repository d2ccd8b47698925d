"""A ConfigMap is swapped under a pilot that flies a loaded engine: whole or not at all, and no tick late."""

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from pilot_process import PilotProcess, Webhook, eventually
from prometheus_client.parser import text_string_to_metric_families

from kvpilot.clock import NS, SystemClock
from kvpilot.demo.processes import Process, free_port
from kvpilot.link.following import newest_telemetry
from kvpilot.link.place import LinkPlace
from kvpilot.link.telemetry import TelemetryReader

KEPT = {"prefill_chunk_tokens": 64, "admission_watermark": 0.5, "speculative_tokens": 0}
"""Held by a policy that no version changes."""
LEAST_RUNNING, LEAST_BUDGET = 4, 100
BULK = 12
"""Policies that are off and cost time to load: loading must take many ticks."""
TAKEN_WITHIN_S = 10.0
HEAD = """\
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: NAME}
spec:
  mode: enforce
  inputs:
    running: {signal: requests_running, maxAge: 30s}
  onMissing: hold
  rules:
    - name: hold
      when: running >= 0
      do:
"""
FULL = (Path(__file__).parents[1] / "unit/policy/every_clause.yaml").read_text().replace("batch", "default")


def holding(name: str, **knobs: float) -> str:
    actions = "".join(f"        - {{knob: {knob}, set: {value}}}\n" for knob, value in knobs.items())
    return HEAD.replace("NAME", name) + actions


def version(number: int) -> dict[str, str]:
    """Two files that belong together: what they set moves by the same step."""
    files = {
        "keeper.yaml": holding("keeper", **KEPT),
        "left.yaml": holding("left", max_running=LEAST_RUNNING + number),
        "right.yaml": holding("right", step_token_budget=LEAST_BUDGET + number),
    }
    for i in range(BULK):
        text = FULL.replace("name: every-clause", f"name: bulk-{i}").replace("mode: enforce", "mode: off")
        files[f"bulk-{i}.yaml"] = text
    if number % 2:
        files["odd.yaml"] = holding("odd", max_running=1).replace("mode: enforce", "mode: off")
    return files


class ConfigMap:
    """A directory as Kubernetes mounts it: swapped by one rename, the names beside it mended after."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = 0

    def swap(self, files: dict[str, str]) -> None:
        self._count += 1
        fresh, old = self._path / f"..{self._count}", self._path / "..data"
        before = Path(os.path.realpath(old))
        fresh.mkdir()
        for name, text in files.items():
            (fresh / name).write_text(text)
        (self._path / "..data_tmp").symlink_to(fresh.name)
        (self._path / "..data_tmp").rename(old)
        for name in files:
            if not (self._path / name).is_symlink():
                (self._path / name).symlink_to(f"..data/{name}")
        for link in self._path.glob("*.yaml"):
            if link.name not in files:
                link.unlink()
        if before.name != "..data":
            shutil.rmtree(before)


class Onlooker:
    """Reads every step record: which values the engine ever had in force."""

    def __init__(self, place: LinkPlace) -> None:
        page = newest_telemetry(place.telemetry_directory(0), place.uids)
        assert page is not None
        self._reader = TelemetryReader(page.read_at)
        self.seen: list[dict[str, float]] = []
        self._last = 0

    def look(self) -> dict[str, float]:
        for record in self._reader.poll(limit=16_000):
            assert not self._last or record.sequence == self._last + 1, "records were lost: look more often"
            self._last = record.sequence
            self.seen.append({key[5:]: value for key, value in dict(record).items() if key[:5] == "knob."})
        return self.seen[-1] if self.seen else {}

    def forget(self) -> None:
        self.look()
        self.seen.clear()

    def number(self) -> int | None:
        """The version in force; None while there is none yet."""
        now = self.look()
        return int(now["max_running"]) - LEAST_RUNNING if KEPT.items() <= now.items() else None

    def check(self) -> None:
        """No lease was ever dropped, no set half taken."""
        self.look()
        assert self.seen
        for values in self.seen:
            assert KEPT.items() <= values.items()
            assert values["max_running"] - LEAST_RUNNING == values["step_token_budget"] - LEAST_BUDGET


class World:
    """A reference engine under load, and a pilot whose policies are a ConfigMap."""

    def __init__(self, folder: Path, webhook: Webhook) -> None:
        environ = {
            "KVPILOT_TELEMETRY": str(folder / "telemetry"),
            "KVPILOT_CONTROLS": str(folder / "controls"),
            "KVPILOT_ENGINE": "reload",
        }
        for name in ("telemetry", "controls"):
            (folder / name).mkdir(mode=0o750)
        self.pilot = PilotProcess(folder, environ)
        hook = f"http://127.0.0.1:{webhook.server_address[1]}/"
        self.pilot.configure(receivers=[{"name": "oncall", "url": hook}])
        self.policies = ConfigMap(self.pilot.policies)
        self.webhook = webhook
        self.engine_port = free_port()
        place = LinkPlace.from_environ(environ)
        assert place is not None
        self.place = place

    def missed(self) -> float:
        """Ticks that were missed, and ticks that began later than a tick's time."""
        (missed,) = self.pilot.metric("kvpilot_control_ticks_missed")
        answer = self.pilot.get("/metrics")
        assert answer is not None
        buckets = {
            sample.labels["le"]: sample.value
            for family in text_string_to_metric_families(answer.text)
            if family.name == "kvpilot_control_tick_lateness_seconds"
            for sample in family.samples
            if sample.name.endswith("_bucket")
        }
        return missed + buckets["+Inf"] - buckets["0.1"]


@asynccontextmanager
async def flying(folder: Path, webhook: Webhook) -> AsyncIterator[tuple[World, Onlooker]]:
    world = World(folder, webhook)
    arguments = ["kvengine", "serve", "--port", str(world.engine_port), "--memory", "64MiB"]
    engine = Process("engine", arguments, folder / "engine.log", world.pilot.environ)
    try:
        os.setpriority(os.PRIO_PROCESS, engine.pid, 10)  # The engine's load must not starve its pilot.
        await engine.wait_until_answers(f"http://127.0.0.1:{world.engine_port}/health", SystemClock(), 60)
        yield world, Onlooker(world.place)
    finally:
        world.pilot.close()
        await engine.stop()


async def load(port: int, stop: asyncio.Event) -> set[int]:
    """Six clients, one request after another; which statuses they got."""
    statuses: set[int] = set()
    body = {"model": "kvpilot-tiny", "prompt": "{" * 200, "max_tokens": 40, "ignore_eos": True}

    async def one(http: httpx.AsyncClient) -> None:
        while not stop.is_set():
            answer = await http.post(f"http://127.0.0.1:{port}/v1/completions", json=body)
            statuses.add(answer.status_code)

    async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
        await asyncio.gather(*(one(http) for _ in range(6)))
    return statuses


async def until_flown(onlooker: Onlooker, number: int) -> None:
    deadline_ns = SystemClock().monotonic_ns() + round(TAKEN_WITHIN_S * NS)
    while onlooker.number() != number:
        assert SystemClock().monotonic_ns() < deadline_ns, f"version {number} is not taken"
        await asyncio.sleep(0.02)


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    hook = Webhook()
    thread = threading.Thread(target=hook.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hook
    hook.shutdown()
    thread.join()
    hook.server_close()


@pytest.mark.timeout(240)
def test_a_swap_under_load_is_taken_whole_and_drops_no_lease_and_a_bad_one_changes_nothing(
    tmp_path: Path, webhook: Webhook
) -> None:
    async def scenario() -> None:
        async with flying(tmp_path, webhook) as (world, onlooker):
            stop = asyncio.Event()
            loading = asyncio.create_task(load(world.engine_port, stop))
            world.policies.swap(version(0))
            await asyncio.to_thread(world.pilot.flying)
            await until_flown(onlooker, 0)
            onlooker.forget()
            rounds = [await a_round(world, onlooker, first) for first in (1, 4, 7, 10)]
            assert any(swapping <= quiet for swapping, quiet in rounds), f"ticks missed or late: {rounds}"
            await storm(world, onlooker)
            await bad_set(world, onlooker)
            onlooker.check()
            stop.set()
            assert await asyncio.wait_for(loading, 60) == {200}

    asyncio.run(scenario())


# A defect makes ticks late in every round; a busy machine makes them late with a swap and without.
async def a_round(world: World, onlooker: Onlooker, first: int) -> tuple[float, float]:
    """Two swaps, each awaited, and then as long without any: ticks that were missed or late in either."""
    clock = SystemClock()
    began_ns, before = clock.monotonic_ns(), await asyncio.to_thread(world.missed)
    for number in (first, first + 1):
        world.policies.swap(version(number))
        await until_flown(onlooker, number)
    swapped, took_ns = await asyncio.to_thread(world.missed), clock.monotonic_ns() - began_ns
    while clock.monotonic_ns() < began_ns + 2 * took_ns:
        onlooker.look()
        await asyncio.sleep(0.02)
    after = await asyncio.to_thread(world.missed)
    return swapped - before, after - swapped


async def storm(world: World, onlooker: Onlooker) -> None:
    """Swaps without a pause, so that many come while the pilot reads: whatever it takes is one version."""
    stop = threading.Event()

    def blow() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 1) % 12
            world.policies.swap(version(number))

    blowing = asyncio.create_task(asyncio.to_thread(blow))
    try:
        for _ in range(300):
            onlooker.look()
            await asyncio.sleep(0.02)
    finally:
        stop.set()
        await blowing
    world.policies.swap(version(20))
    await until_flown(onlooker, 20)


async def bad_set(world: World, onlooker: Onlooker) -> None:
    """One good file and one bad one: neither is taken, people are told, and told when it is over."""
    broken = version(21)
    broken["right.yaml"] = broken["right.yaml"].replace("running >=", "runing >=")
    world.policies.swap(broken)
    await asyncio.to_thread(told, world.webhook, "firing")
    summary = world.webhook.bodies[-1]["commonAnnotations"]["summary"]
    assert "right.yaml:11:13: when: undeclared reference to 'runing' (did you mean 'running'?)" in summary
    assert world.pilot.metric("kvpilot_policy_load_success") == [0.0]
    assert onlooker.number() == 20
    world.policies.swap(version(22))
    await until_flown(onlooker, 22)
    await asyncio.to_thread(told, world.webhook, "resolved")


def told(webhook: Webhook, status: str) -> None:
    eventually(lambda: ("KvpilotPoliciesRejected", status) in webhook.alerts())
