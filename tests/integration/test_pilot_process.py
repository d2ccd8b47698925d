"""`kvpilot run` as people run it: real processes, files and signals, and an engine that only steps.

The engine is the real hook on real pages, stepped by a thread of this test as fast as engines step.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvpilot.clock import NS, SystemClock
from kvpilot.inside.hook import StepHook
from kvpilot.link.fields import STEP_FIELDS
from kvpilot.link.manifest import Manifest, ManifestKnob

PATIENCE_S = 30.0
STEP_S = 0.005
FIELDS = (
    *("time_ns", "duration_ns", "steps_total", "running", "waiting", "finished_total"),
    *("kv_blocks_free", "kv_blocks_cached"),
)
POLICY = """\
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: guard}
spec:
  inputs:
    waiting: {signal: requests_waiting}
  rules:
    - name: act
      when: waiting > 10.0
      until: waiting < 2.0
      lease: 5s
      do: [{knob: prefill_chunk_tokens, set: 64}]
      notify: {receiver: oncall, severity: warning, summary: too many wait}
"""


def eventually(predicate: Callable[[], Any], within_s: float = PATIENCE_S) -> Any:
    """What `predicate` gives once it is true; fails if it never is."""
    wait = threading.Event()
    for _ in range(round(within_s / 0.01)):
        if found := predicate():
            return found
        wait.wait(0.01)
    raise AssertionError("it never came about")


class Engine:
    """Steps in a thread; `fields` is what its steps report, `seen` each chunk that a step had in force."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.fields = dict.fromkeys(FIELDS, 0) | {"running": 1, "kv_blocks_free": 100}
        self.seen: list[float] = []
        manifest = Manifest(
            engine="test",
            engine_version="1",
            model="tiny",
            block_size=16,
            blocks=100,
            bytes_per_block=1,
            max_model_len=2048,
            device="cpu",
            knobs=(ManifestKnob("prefill_chunk_tokens", "tokens", 16, 2048, 512, 16, "per step"),),
            fields=tuple(STEP_FIELDS[name] for name in FIELDS),
            classes=("default",),
        )
        self._clock = SystemClock()
        self._stopping = threading.Event()
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(manifest, environ), daemon=True)
        self._thread.start()
        assert self._opened.wait(PATIENCE_S)

    def _run(self, manifest: Manifest, environ: Mapping[str, str]) -> None:
        hook = StepHook.open(manifest, environ)
        assert hook.enabled
        self._opened.set()
        while not self._stopping.wait(STEP_S):
            now_ns = self._clock.monotonic_ns()
            self.seen.append(hook.begin_step(now_ns)["prefill_chunk_tokens"])
            self.fields["steps_total"] += 1
            self.fields["time_ns"] = now_ns
            hook.end_step(tuple(self.fields[name] for name in FIELDS))
        hook.close()

    @property
    def chunk(self) -> float:
        return self.seen[-1] if self.seen else 512

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()


class Lab:
    """A folder with link directories, a configuration and a policy, and the processes started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policies = folder / "policies"
        for name in ("t", "c", "policies"):
            (folder / name).mkdir(mode=0o750)
        (self.policies / "guard.yaml").write_text(POLICY)
        self.environ = {
            "KVPILOT_TELEMETRY": str(folder / "t"),
            "KVPILOT_CONTROLS": str(folder / "c"),
            "KVPILOT_ENGINE": "lab",
        }
        self.configure()
        self._children: list[subprocess.Popen[str]] = []
        self._engines: list[Engine] = []

    def configure(self, **changes: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = {
            "classes": [{"name": "default", "ttft": 1.0, "itl": 0.05}],
            "policies": "policies",
            "arm": {"after": 0, "finished": 0},
            "api": {"port": self.port},
            "journal": "journal.sqlite",
            "socket": "pilot.sock",
            **changes,
        }
        (self.folder / "kvpilot.yaml").write_text(json.dumps(config))

    def engine(self) -> Engine:
        self._engines.append(Engine(self.environ))
        return self._engines[-1]

    def pilot(self, **environ: str) -> subprocess.Popen[str]:
        self._children.append(
            subprocess.Popen(
                [sys.executable, "-m", "kvpilot", "run", "--config", str(self.folder / "kvpilot.yaml")],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **self.environ, **environ},
            )
        )
        return self._children[-1]

    def flying(self) -> subprocess.Popen[str]:
        child = self.pilot()
        eventually(lambda: child.poll() is not None or self.get("/healthz"))
        assert child.poll() is None, child.communicate()[1]
        return child

    def get(self, path: str) -> httpx.Response | None:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=5, trust_env=False)
        except httpx.HTTPError:
            return None

    def status(self) -> dict[str, Any]:
        answer = self.get("/status")
        return answer.json() if answer is not None else {}

    def metric(self, name: str) -> list[float]:
        answer = self.get("/metrics")
        families = text_string_to_metric_families(answer.text) if answer is not None else ()
        return [sample.value for family in families if family.name == name for sample in family.samples]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kvpilot", *arguments, "--config", str(self.folder / "kvpilot.yaml")],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env={**os.environ, **self.environ},
            check=False,
        )

    def close(self) -> None:
        for engine in self._engines:
            engine.stop()
        for child in self._children:
            child.kill()
            child.wait()
            if child.stderr is not None:
                child.stderr.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def ended(child: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = child.communicate(timeout=PATIENCE_S)
    return child.returncode, err


def test_it_waits_for_the_engine_moves_its_knob_and_leaves_it_at_baseline_on_sigterm(lab: Lab) -> None:
    child = lab.flying()
    assert lab.status()["engine"]["state"] == "waiting"
    engine = lab.engine()
    eventually(lambda: lab.status()["engine"]["state"] == "live")
    assert engine.chunk == 512
    engine.fields["waiting"] = 11
    eventually(lambda: engine.chunk == 64)
    eventually(lambda: lab.metric("kvpilot_knob_value") == [64])
    child.send_signal(signal.SIGTERM)
    code, err = ended(child)
    assert code == 0
    eventually(lambda: engine.chunk == 512, within_s=1)
    assert [line.split(" ", 2)[2] for line in err.splitlines() if "waiting" in line] == [
        f"WARNING waiting: no engine writes to {lab.folder}/t/lab-0"
    ]
    assert "Traceback" not in err


def test_a_second_pilot_refuses_to_start_and_names_the_holder(lab: Lab) -> None:
    first = lab.flying()
    lab.configure(journal="other.sqlite", socket="other.sock")
    code, err = ended(lab.pilot())
    assert code == 1
    (line,) = err.splitlines()[-1:]
    assert "held by another pilot" in line
    assert f"pid {first.pid}" in line
    assert socket.gethostname() in line
    assert first.poll() is None


def test_a_killed_pilots_leases_are_adopted_by_the_next_without_a_gap(lab: Lab) -> None:
    engine = lab.engine()
    engine.fields["waiting"] = 11
    child = lab.flying()
    eventually(lambda: engine.chunk == 64)
    # Not enough to begin, not little enough to end: only a pilot that takes over goes on.
    engine.fields["waiting"] = 5
    held_from = len(engine.seen)
    child.kill()
    child.wait()
    lab.flying()
    eventually(lambda: lab.status().get("leases"))
    taken_over = len(engine.seen)
    eventually(lambda: len(engine.seen) > taken_over + 6 / STEP_S / 2)
    assert set(engine.seen[held_from:]) == {64}
    assert lab.status()["leases"][0]["rule"] == "act"


def test_a_killed_pilots_leases_run_out_in_the_engine(lab: Lab) -> None:
    engine = lab.engine()
    engine.fields["waiting"] = 11
    child = lab.flying()
    eventually(lambda: engine.chunk == 64)
    began_ns = SystemClock().monotonic_ns()
    child.kill()
    eventually(lambda: engine.chunk == 512, within_s=8)
    assert (SystemClock().monotonic_ns() - began_ns) / NS == pytest.approx(5, abs=1)


def test_orders_by_command_outlive_the_pilot_that_took_them(lab: Lab) -> None:
    engine = lab.engine()
    child = lab.flying()
    eventually(lambda: lab.status()["engine"]["state"] == "live")
    done = lab.command("override", "prefill_chunk_tokens=128", "--for", "10m", "--why", "test")
    assert (done.returncode, done.stdout) == (0, "prefill_chunk_tokens held at 128 for 10m\n")
    eventually(lambda: engine.chunk == 128, within_s=2)
    child.terminate()
    assert ended(child)[0] == 0
    eventually(lambda: engine.chunk == 512)
    lab.flying()
    eventually(lambda: engine.chunk == 128)
    assert lab.command("off", "--why", "test").returncode == 0
    eventually(lambda: engine.chunk == 512, within_s=2)
    assert "OFF: test" in lab.command("status").stdout
    assert lab.command("on").returncode == 0
    eventually(lambda: engine.chunk == 128, within_s=2)
    assert lab.command("override", "prefill_chunk_tokens=none").returncode == 0
    eventually(lambda: engine.chunk == 512, within_s=2)
    refused = lab.command("override", "prefill_chunk_tokens=4", "--why", "test")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "kvpilot: prefill_chunk_tokens=4: this engine takes 16 to 2048\n"


def test_an_engine_that_starts_again_is_met_again(lab: Lab) -> None:
    engine = lab.engine()
    engine.fields["waiting"] = 11
    lab.flying()
    eventually(lambda: engine.chunk == 64)
    first = lab.status()["engine"]["nonce"]
    engine.stop()
    eventually(lambda: lab.status()["engine"]["state"] == "dead")
    again = lab.engine()
    eventually(lambda: lab.status()["engine"]["nonce"] != first)
    assert again.chunk == 512
    again.fields["waiting"] = 11
    eventually(lambda: again.chunk == 64)


class Webhook(ThreadingHTTPServer):
    """Keeps the bodies it is sent."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def alerts(self) -> list[tuple[str, str]]:
        return [(body["alerts"][0]["labels"]["alertname"], body["status"]) for body in self.bodies]


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    hook = Webhook()
    thread = threading.Thread(target=hook.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hook
    hook.shutdown()
    thread.join()
    hook.server_close()


def test_policies_are_reloaded_whole_or_not_at_all_and_receivers_are_told(lab: Lab, webhook: Webhook) -> None:
    lab.configure(receivers=[{"name": "oncall", "url": f"http://127.0.0.1:{webhook.server_address[1]}/hook"}])
    engine = lab.engine()
    engine.fields["waiting"] = 11
    child = lab.flying()
    eventually(lambda: engine.chunk == 64)
    eventually(lambda: webhook.alerts() == [("KvpilotAct", "firing")])
    (lab.policies / "guard.yaml").write_text(POLICY.replace("waiting >", "wating >"))
    eventually(lambda: ("KvpilotPoliciesRejected", "firing") in webhook.alerts())
    assert "did you mean 'waiting'" in webhook.bodies[-1]["commonAnnotations"]["summary"]
    assert engine.chunk == 64
    (lab.policies / "guard.yaml").write_text(POLICY.replace("set: 64", "set: 32"))
    eventually(lambda: engine.chunk == 32)
    eventually(lambda: ("KvpilotPoliciesRejected", "resolved") in webhook.alerts())
    (lab.policies / "off").touch()
    eventually(lambda: engine.chunk == 512, within_s=2)
    eventually(lambda: ("KvpilotAct", "resolved") in webhook.alerts())
    child.terminate()
    assert ended(child)[0] == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"arms": {}}, "kvpilot.yaml:1:"),
        ({"classes": []}, "kvpilot.yaml:1:"),
        ({"policies": "nowhere"}, "is not a directory"),
        ({"engine": {"controls": "nowhere/c"}}, "does not exist: create it or mount it"),
        ({"engine": {"name": "../x"}}, "not a name"),
        ({"journal": "policies"}, "journal "),
        ({"socket": "x" * 300}, "write another as `socket: FILE`"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_clear_line(
    lab: Lab, change: dict[str, Any], expected: str
) -> None:
    lab.configure(**change)
    code, err = ended(lab.pilot())
    errors = [line for line in err.splitlines() if " INFO " not in line]
    assert code == 1
    assert len(errors) == 1, err
    assert expected in errors[0]


def test_a_malformed_policy_is_named_with_its_place(lab: Lab) -> None:
    (lab.policies / "guard.yaml").write_text(POLICY.replace("set: 64", "sett: 64"))
    code, err = ended(lab.pilot())
    assert code == 1
    assert f"{lab.policies}/guard.yaml:12:41: unknown key 'sett'" in err
    assert "Traceback" not in err


def test_a_port_that_is_taken_is_one_clear_line(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        lab.configure(api={"port": taken.getsockname()[1]})
        code, err = ended(lab.pilot())
    assert code == 1
    assert "Address already in use: write another address as `api: {port: N}`" in err
    assert len(err.splitlines()) == 1


def test_without_a_configuration_it_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvpilot", "run"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "kvpilot.yaml: No such file or directory: "
        "name the configuration with --config, or write kvpilot.yaml here\n"
    )


@pytest.mark.needs_program("promtool")
def test_promtool_finds_nothing_wrong_with_the_metrics(lab: Lab) -> None:
    engine = lab.engine()
    engine.fields["waiting"] = 11
    lab.flying()
    eventually(lambda: engine.chunk == 64)
    text = eventually(lambda: lab.get("/metrics")).text
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
