"""Real engines that end in every way, and what can be read of them afterwards. Never a prompt."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvpilot.incident.kept import KeptPage, kept_pages

SECRET = "nobody-may-read-this-prompt"
MODEL = "kvpilot-tiny"
START_S = 60

FAIL_LATER = """
import kvengine.core
step, count = kvengine.core.Core.step, 0
def failing(self, knobs):
    global count
    count += 1
    if count > 40:
        raise LookupError(f"could not step {[request.tokens for request in self.scheduler.running]} {SECRET}")
    return step(self, knobs)
kvengine.core.Core.step = failing
"""


class Engine:
    """`kvengine serve` in a session of its own, with the link."""

    def __init__(self, folder: Path, sitecustomize: str | None = None) -> None:
        self.folder = folder
        for name in ("telemetry", "controls"):
            (folder / name).mkdir(mode=0o750, exist_ok=True)
        environ = os.environ | {
            "KVPILOT_TELEMETRY": str(folder / "telemetry"),
            "KVPILOT_CONTROLS": str(folder / "controls"),
            "KVPILOT_ENGINE": "tiny",
        }
        if sitecustomize is not None:
            (folder / "sitecustomize.py").write_text(f"SECRET = {SECRET!r}\n{sitecustomize}")
            environ["PYTHONPATH"] = str(folder)
        with (folder / "engine.log").open("ab") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "kvengine", "serve", "--port", "0", "--memory", "32MiB"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environ,
                start_new_session=True,
            )
        killer = threading.Timer(START_S, self.child.kill)
        killer.start()
        assert self.child.stdout is not None
        self.url = self.child.stdout.readline().partition(" on ")[2].partition(": ")[0]
        killer.cancel()
        assert self.url, (folder / "engine.log").read_text()

    def core_pid(self) -> int:
        (pid,) = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split()
        return int(pid)

    def ask(self) -> None:
        """One request whose prompt is secret; what becomes of it does not matter."""
        body = {"model": MODEL, "prompt": f"{SECRET} {SECRET}", "max_tokens": 200, "user": SECRET}
        with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as http:
            try:
                http.post("/v1/completions", json=body)
            except httpx.HTTPError:
                return

    @contextmanager
    def under_load(self) -> Iterator[None]:
        """Four clients that ask again and again."""
        done = threading.Event()

        def client() -> None:
            while not done.is_set():
                self.ask()

        clients = [threading.Thread(target=client) for _ in range(4)]
        for each in clients:
            each.start()
        try:
            yield
        finally:
            done.set()
            os.killpg(self.child.pid, signal.SIGKILL)
            for each in clients:
                each.join(30)

    def stop(self) -> None:
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.communicate(timeout=30)

    def page(self) -> KeptPage:
        """The newest."""
        return kept_pages(self.folder / "telemetry/tiny-0", frozenset({os.geteuid()}))[0]

    def incident(self, *options: str) -> str:
        command = [sys.executable, "-m", "kvpilot", "incident", "show", *options]
        command += ["--telemetry", str(self.folder / "telemetry"), "--engine", "tiny"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def told(self) -> dict[str, Any]:
        return json.loads(self.incident("--json"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    with ExitStack() as stack:

        def one(sitecustomize: str | None = None) -> Engine:
            engine = Engine(tmp_path, sitecustomize)
            stack.callback(engine.stop)
            return engine

        yield one


def eventually(condition: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(3000):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("it never came about")


def nothing_is_secret(engine: Engine, *outputs: str) -> None:
    """Neither in any page nor in what is shown; the prompt's tokens are not kept either."""
    for path in (engine.folder / "telemetry").rglob("*.kvp"):
        assert SECRET.encode() not in path.read_bytes(), path
    for output in outputs:
        assert SECRET not in output


def test_an_engine_core_killed_under_load_leaves_its_last_steps(start: Callable[..., Engine]) -> None:
    engine = start()
    with engine.under_load():
        eventually(lambda: (engine.page().steps or 0) > 50)
        os.kill(engine.core_pid(), signal.SIGKILL)
        eventually(lambda: not engine.page().alive)
    told = engine.told()
    assert told["how"] == "vanished"
    assert told["ending"] is None
    assert told["why"].startswith("killed from outside (SIGKILL, the out-of-memory killer, loss of power)")
    names = [field["name"] for field in told["fields"]]
    sequences = [step[0] for step in told["steps"]]
    assert sequences == list(range(1, len(sequences) + 1))
    last = dict(zip(names, told["steps"][-1], strict=True))
    assert last["running"] > 0
    (work,) = [finding for finding in told["evidence"] if finding["topic"] == "work"]
    assert f"{last['running']} requests ran" in work["text"]
    shown = engine.incident()
    assert shown.startswith("the engine vanished without a word")
    nothing_is_secret(engine, json.dumps(told), shown)


def test_an_exception_in_the_engine_core_is_named_without_its_message(start: Callable[..., Engine]) -> None:
    engine = start(FAIL_LATER)
    with engine.under_load():
        eventually(lambda: not engine.page().alive)
    told = engine.told()
    assert told["how"] == "exception"
    assert told["ending"]["what"][0] == "LookupError"
    assert told["ending"]["what"][1].startswith("sitecustomize.py:failing:")
    assert any(line.startswith("loop.py:EngineLoop.turn:") for line in told["ending"]["what"])
    assert len(told["steps"]) >= 40
    shown = engine.incident()
    assert shown.startswith("the engine died of LookupError in failing, sitecustomize.py line ")
    nothing_is_secret(engine, json.dumps(told), shown)


def test_an_engine_that_is_told_to_stop_closes_in_order(start: Callable[..., Engine]) -> None:
    engine = start()
    engine.ask()
    assert engine.incident("--live").startswith("LIVE: the engine lives")
    engine.child.terminate()
    engine.child.wait(30)
    told = engine.told()
    assert (told["how"], told["ending"]["what"]) == ("closed", [])
    nothing_is_secret(engine, json.dumps(told))


def test_of_several_starts_the_newest_that_ended_is_shown(start: Callable[..., Engine]) -> None:
    first = start()
    first.child.terminate()
    first.child.wait(30)
    second = start()
    assert first.told()["how"] == "closed"
    os.killpg(second.child.pid, signal.SIGKILL)
    second.child.wait(30)
    eventually(lambda: not second.page().alive)
    assert second.told()["how"] == "vanished"
