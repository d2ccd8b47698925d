"""A real vLLM's engine core dies: its last steps, every decision and the cause as far as known remain."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from flights import NGRAM
from pilot_process import PilotProcess, eventually
from vllm_lab.server import SERVED_MODEL, VllmServer

from kvpilot.adapters.capabilities import RankSeen, differences, ranks_seen
from kvpilot.adapters.known_engines import KNOWN
from kvpilot.incident.kept import KeptPage, kept_pages

if TYPE_CHECKING:
    from conftest import Hangar

SECRET = "nobody-may-read-this-prompt"
POLICY = """\
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: cap}
spec:
  mode: enforce
  inputs:
    steps: {signal: requests_running, agg: last, maxAge: 30s}
  onMissing: hold
  rules:
    - name: hold-three
      when: steps >= 0
      lease: 2s
      do: [{knob: max_running, set: 3}]
"""
FAULT = """
import vllm.v1.core.sched.scheduler as scheduler
def register():
    wrapped, steps = scheduler.Scheduler.update_from_output, [0]
    def update_from_output(self, scheduler_output, *more):
        steps[0] += bool(scheduler_output.num_scheduled_tokens)
        if steps[0] > 1000:
            raise LookupError(f"nobody-may-read-this-prompt {list(self.requests.values())}")
        return wrapped(self, scheduler_output, *more)
    scheduler.Scheduler.update_from_output = update_from_output
"""


class Crash:
    """A server under load with a pilot that holds a knob, and what is read once its engine core is gone."""

    def __init__(self, server: VllmServer, pilot: PilotProcess) -> None:
        self.server = server
        self.pilot = pilot
        self._over = threading.Event()
        self._clients = [threading.Thread(target=self._client, args=(n,)) for n in range(4)]

    def _client(self, number: int) -> None:
        body = {"model": SERVED_MODEL, "max_tokens": 100 + 17 * number, "ignore_eos": True, "user": SECRET}
        asked = 0
        while not self._over.is_set():
            asked += 1
            body["prompt"] = f"{SECRET} {number} {asked} {SECRET}"
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(f"{self.server.url}/v1/completions", json=body, timeout=10, trust_env=False)

    def fly(self) -> None:
        for client in self._clients:
            client.start()
        eventually(lambda: (self.page().steps or 0) > 150)
        eventually(lambda: self.rank().in_force.get("max_running") == 3)

    def page(self) -> KeptPage:
        place = self.server.place
        return kept_pages(place.telemetry_directory(0), place.uids)[0]

    def rank(self) -> RankSeen:
        ranks, problems = ranks_seen(self.server.place)
        assert not problems
        return ranks[0]

    def until_gone(self) -> dict[str, Any]:
        """As JSON, once the pilot has seen it too."""
        eventually(lambda: not self.page().alive)
        eventually(lambda: self.pilot.status().get("engine", {}).get("state") == "dead")
        self.over()
        done = self.pilot.command("incident", "show", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def over(self) -> None:
        self._over.set()
        for client in self._clients:
            if client.ident is not None:
                client.join(30)


@pytest.fixture
def crash(hangar: "Hangar", tmp_path: Path) -> Iterator[Callable[..., Crash]]:
    with contextlib.ExitStack() as stack:

        def start(fault: bool = False) -> Crash:
            folder = tmp_path / "fault"
            about = folder / "fault-0.dist-info"
            about.mkdir(parents=True)
            (folder / "recorder_fault.py").write_text(FAULT)
            (about / "METADATA").write_text("Metadata-Version: 2.1\nName: recorder_fault\nVersion: 0\n")
            (about / "entry_points.txt").write_text(
                "[vllm.general_plugins]\nfault = recorder_fault:register\n"
            )
            settings = replace(NGRAM, python_path=(folder,)) if fault else NGRAM
            hangar.close()
            server = hangar.server(settings)
            stack.callback(hangar.close)
            pilot = PilotProcess(tmp_path, server.link_environ)
            pilot.configure(classes=[{"name": n, "ttft": 1.0, "itl": 0.05} for n in ("batch", "interactive")])
            (pilot.policies / "cap.yaml").write_text(POLICY)
            stack.callback(pilot.close)
            pilot.flying()
            crash = Crash(server, pilot)
            stack.callback(crash.over)
            return crash

        yield start


def check_what_is_left(crash: Crash, told: dict[str, Any]) -> None:
    """Steps without a gap, ending under load; the decision that held the knob; and no prompt anywhere."""
    names = [field["name"] for field in told["fields"]]
    sequences = [step[0] for step in told["steps"]]
    assert sequences == list(range(sequences[0], sequences[0] + len(sequences)))
    assert len(sequences) > 100
    last = [dict(zip(names, step, strict=True)) for step in told["steps"][-50:]]
    assert max(step["running"] for step in last) > 0
    assert last[-1]["knob.max_running"] == 3
    held = [row for row in told["decisions"] if row["knob"] == "max_running" and row["after"] == 3]
    assert held
    assert {row["engine_nonce"] for row in told["decisions"]} == {told["start"]}
    assert told["gone_wall_ns"] is not None
    shown = crash.pilot.command("incident", "show").stdout
    assert "cap/hold-three: max_running" in " ".join(shown.split())
    assert SECRET not in shown
    assert SECRET not in json.dumps(told)
    for page in crash.server.place.telemetry.rglob("*.kvp"):
        assert SECRET.encode() not in page.read_bytes()


def test_an_engine_core_that_is_killed(crash: Callable[..., Crash]) -> None:
    flown = crash()
    flown.fly()
    assert differences(KNOWN["vllm"], flown.rank().manifest) == []
    flown.server.engine_core().kill()
    told = flown.until_gone()
    assert (told["how"], told["ending"]) == ("vanished", None)
    assert told["headline"].startswith("vanished without a word")
    check_what_is_left(flown, told)


def test_an_exception_inside_the_engine_core(crash: Callable[..., Crash]) -> None:
    flown = crash(fault=True)
    flown.fly()
    told = flown.until_gone()
    assert told["how"] == "exception"
    assert told["ending"]["what"][0] == "LookupError"
    assert told["ending"]["what"][1].startswith("recorder_fault.py:register.<locals>.update_from_output:")
    assert "recorder_fault.py line" in told["headline"]
    check_what_is_left(flown, told)


def test_a_worker_that_is_killed_under_the_engine_core(crash: Callable[..., Crash]) -> None:
    """As by the out-of-memory killer: the engine core finds out, and dies of an exception of its own."""
    flown = crash()
    flown.fly()
    for worker in flown.server.processes("Worker"):
        worker.kill()
    told = flown.until_gone()
    assert told["how"] == "exception"
    assert told["ending"]["what"][0].endswith("Error")
    check_what_is_left(flown, told)
