"""What vLLM is without us, it is with us: no thread, no socket, and it outlives whatever goes wrong in us."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from flights import DRAFT, Flight
from vllm_lab import valves
from vllm_lab.leases import Hold, until
from vllm_lab.load import Ask, prompt, run
from vllm_lab.server import VllmServer

if TYPE_CHECKING:
    from conftest import Hangar

ENVIRON_FAULT = "KVPILOT_TEST_FAULT"
OURS = replace(DRAFT, speculation="none")
STOCK = replace(OURS, valve=False, link=False, drop_in=False)
FAULT = '''
"""Makes kvpilot's hook fail from the moment when a file appears."""
import os

def register():
    from kvpilot.inside.vllm.recorder import Recorder
    scheduled, trigger = Recorder.scheduled, os.environ["KVPILOT_TEST_FAULT"]

    def failing(self, *args, **kwargs):
        if os.path.exists(trigger):
            raise RuntimeError("injected by a test")
        return scheduled(self, *args, **kwargs)

    Recorder.scheduled = failing
'''


@dataclass
class Footprint:
    """What one process holds open."""

    threads: Counter[str]
    sockets: int
    files: set[str]


def footprint(process: psutil.Process) -> Footprint:
    """By what the kernel says of it."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    targets = []
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            targets.append(os.readlink(link))
    return Footprint(
        Counter((task / "comm").read_text().strip() for task in tasks),
        sum(target.startswith("socket:") for target in targets),
        {target for target in targets if target.startswith("/")},
    )


def footprints(server: VllmServer) -> dict[str, Footprint]:
    """After some work, at rest, by kind of process."""
    assert all(answer.ok for answer in run(server.url, [Ask(prompt(50, n), 20) for n in range(8)]))
    time.sleep(7)  # Idle connections of clients are closed by then.
    kinds = ("APIServer", "EngineCore", "Worker")
    return {kind: footprint(server.processes(kind)[0]) for kind in kinds}


@pytest.mark.slow
def test_no_thread_and_no_socket_of_ours(hangar: "Hangar") -> None:
    stock = footprints(hangar.server(STOCK))
    server = hangar.server(OURS)
    ours = footprints(server)
    for kind in stock:
        assert ours[kind].threads == stock[kind].threads, kind
        assert ours[kind].sockets == stock[kind].sockets, kind
    link = str(server.folder)
    opened = {kind: {Path(file).name for file in ours[kind].files if file.startswith(link)} for kind in ours}
    mapped = [entry.path for entry in server.engine_core().memory_maps() if entry.path.startswith(link)]
    assert [Path(path).suffix for path in mapped] == [".kvp"]
    assert any(name.startswith("telemetry-") for name in opened["EngineCore"])
    assert any(name.startswith("valve-") for name in opened["APIServer"])
    assert not any(name.endswith(".kvp") for name in opened["Worker"])


@pytest.fixture
def faulty(hangar: "Hangar", tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Flight, Path]]:
    """A server whose hook fails once the file exists."""
    folder = tmp_path_factory.mktemp("fault")
    about = folder / "kvpilot_fault-0.dist-info"
    about.mkdir()
    (folder / "kvpilot_fault.py").write_text(FAULT)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpilot_fault\nVersion: 0\n")
    (about / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nkvpilot_fault = kvpilot_fault:register\n"
    )
    trigger = folder / "now"
    server = hangar.server(replace(OURS, environ={ENVIRON_FAULT: str(trigger)}, python_path=(folder,)))
    with Hold(server.place) as hold:
        yield Flight(server, hold), trigger


def test_a_hook_that_fails_under_load_is_off_and_nobody_notices(faulty: tuple[Flight, Path]) -> None:
    flight, trigger = faulty
    with flight.crowd(clients=8, prompt_tokens=300, max_tokens=40):
        flight.put(max_running=2, step_token_budget=100)
        held = flight.watch()
        trigger.touch()
        until(lambda: "injected by a test" in flight.server.log_text(), 5, "the failure is logged")
        time.sleep(0.5)
        flight.iterations()
        flight.records.poll()
        time.sleep(1.5)
        after = flight.iterations()
    assert max(step.requests for step in held.iterations) == 2
    assert max(step.tokens for step in held.iterations) <= 100
    assert max(step.requests for step in after) > 2
    assert max(step.tokens for step in after) > 100
    assert flight.server.log_text().count("baselines are in force") == 1
    assert flight.server.log_text().count("Traceback") == 1
    assert flight.records.poll() == []
    # The valve lives in another process and goes on.
    flight.hold.set(shed_fraction=1.0)
    until(lambda: valves.shedding(flight.server.place) == 1.0, 5, "the valve sheds")
    assert run(flight.server.url, [Ask(prompt(9), 2)])[0].shed


@pytest.mark.slow
def test_a_telemetry_directory_that_cannot_be_written(hangar: "Hangar") -> None:
    """Not even root writes there."""
    server = hangar.server(replace(OURS, environ={"KVPILOT_TELEMETRY": "/proc/self"}))
    answers = run(server.url, [Ask(prompt(50, n), 20) for n in range(8)])
    assert all(answer.ok for answer in answers)
    log = server.log_text()
    assert log.count("running without telemetry") == 1
    assert log.count("the valve runs without the link") == 1
    assert "Traceback" not in log
