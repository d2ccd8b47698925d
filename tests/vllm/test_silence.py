"""A pilot process beside a real vLLM that falls silent: what it says, whom it tells, and how soon.

vLLM's health endpoint says 200 with its output wedged; after its engine core dies it takes the whole server
with it. Each is provoked here, and told apart.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from pilot_process import PilotProcess, Webhook, eventually
from vllm_lab.load import Ask, prompt, run
from vllm_lab.server import SERVED_MODEL, Settings, VllmServer

if TYPE_CHECKING:
    from conftest import Hangar

SETTINGS = Settings(
    max_model_len=1024,
    blocks=128,
    valve=True,
    # Opens the endpoints that wedge and pause: for tests alone.
    environ={"VLLM_SERVER_DEV_MODE": "1"},
)
POLICY = """\
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: cap}
spec:
  inputs:
    waiting: {signal: requests_waiting, maxAge: 2s}
  rules:
    - name: act
      when: waiting > 1000.0
      do: [{knob: max_running, set: 1}]
"""
MEASURED_S = 8.0
IDLE_SHARE = 0.05
"""Of one CPU: more than an engine core that waits may take."""


@dataclass
class Beside:
    """A server, the pilot beside it, and whom it tells."""

    server: VllmServer
    pilot: PilotProcess
    webhook: Webhook
    stuck: list[threading.Thread] = field(default_factory=list)

    @property
    def state(self) -> str:
        return str(self.pilot.status().get("engine", {}).get("state"))

    @property
    def well(self) -> bool:
        return self.state in ("idle", "live")

    def firing(self) -> dict[str, Any]:
        """Alerts that the receiver was last told fire: labels and annotations by name."""
        firing: dict[str, Any] = {}
        for body in list(self.webhook.bodies):
            name = body["commonLabels"]["alertname"]
            firing.pop(name, None)
            if body["status"] == "firing":
                firing[name] = {**body["commonLabels"], **body["commonAnnotations"]}
        return firing

    def health(self) -> int:
        return httpx.get(f"{self.server.url}/health", timeout=5, trust_env=False).status_code

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.server.url}{path}", json=body or None, timeout=10, trust_env=False)

    def answer_some(self, count: int = 4) -> None:
        """Requests that are answered."""
        answers = run(self.server.url, [Ask(prompt(50, seed), 8) for seed in range(count)], at_once=4)
        assert all(answer.ok for answer in answers), answers[0].error

    def ask_for_ever(self, count: int, max_tokens: int = 8) -> None:
        """Requests in threads that do not wait for them; not streamed."""
        body = {
            "model": SERVED_MODEL,
            "prompt": list(prompt(50)),
            "max_tokens": max_tokens,
            "ignore_eos": True,
        }

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(f"{self.server.url}/v1/completions", json=body, timeout=120, trust_env=False)

        for _ in range(count):
            self.stuck.append(threading.Thread(target=ask, daemon=True))
            self.stuck[-1].start()

    def wait_for_answers(self) -> None:
        """Until all that was asked for ever is answered after all."""
        for thread in self.stuck:
            thread.join(120)
            assert not thread.is_alive()
        self.stuck.clear()

    def busy_share(self, seconds: float = MEASURED_S) -> float:
        """Of one CPU, what the engine core takes now."""
        core = self.server.engine_core()
        before, began = core.cpu_times(), time.monotonic()
        time.sleep(seconds)
        after, seconds = core.cpu_times(), time.monotonic() - began
        return (after.user + after.system - before.user - before.system) / seconds

    def start_again(self) -> None:
        """Another start of the server in the same place, and its pilot's sight of it."""
        self.server.start()
        self.server.wait_until_ready()
        eventually(lambda: self.well)
        self.answer_some()


@pytest.fixture(scope="module")
def beside(hangar: "Hangar", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    hangar.close()
    folder = tmp_path_factory.mktemp("silence")
    webhook = Webhook()
    serving = threading.Thread(target=webhook.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    with VllmServer(SETTINGS, folder) as server:
        pilot = PilotProcess(folder, server.link_environ)
        (pilot.policies / "cap.yaml").write_text(POLICY)
        url = f"http://127.0.0.1:{webhook.server_address[1]}/hook"
        pilot.configure(receivers=[{"name": "oncall", "url": url}])
        beside = Beside(server, pilot, webhook)
        try:
            pilot.flying()
            eventually(lambda: beside.well)
            yield beside
        finally:
            pilot.close()
            webhook.shutdown()
            serving.join()
            webhook.server_close()


@pytest.fixture
def served(beside: Beside) -> Beside:
    """The server, well; started again where the last test left it otherwise."""
    if not beside.server.alive() or not beside.well:
        beside.server.kill()
        beside.start_again()
    return beside


def test_an_idle_server_is_idle_with_gauges_and_zero_rates(served: Beside) -> None:
    served.answer_some()
    eventually(lambda: served.state == "idle")
    time.sleep(12)  # Longer than any window that the status shows: what is left of it is the idle time.
    status = served.pilot.status()
    assert status["engine"]["state"] == "idle"
    assert (status["engine"]["valves"], status["engine"]["valves_silent"]) == (1, 0)
    signals = status["signals"]
    gauges = ("requests_running", "requests_waiting", "kv_occupancy", "kv_free_blocks", "in_flight")
    assert {name: signals[name].get("value") for name in gauges if name != "kv_free_blocks"} == dict.fromkeys(
        [name for name in gauges if name != "kv_free_blocks"], 0
    )
    assert signals["kv_free_blocks"]["value"] > 0
    assert {name: signals[name]["value"] for name in ("steps", "decode_tokens", "finished", "offered")} == {
        "steps": 0,
        "decode_tokens": 0,
        "finished": 0,
        "offered": 0,
    }
    assert signals["itl_seconds"]["missing"] == "no_samples"
    assert "too_old" not in {signal.get("missing") for signal in signals.values()}
    assert served.firing() == {}


def test_an_engine_core_with_nothing_to_run_does_not_spin_under_leases(served: Beside) -> None:
    """Idle, and with work that may not run: paused by hand, at a running cap of 1."""
    served.ask_for_ever(8, max_tokens=900)
    eventually(lambda: served.state == "live")
    busy = served.busy_share(seconds=2)
    served.wait_for_answers()
    eventually(lambda: served.state == "idle")
    alone = served.busy_share()
    held = served.pilot.command("override", "max_running=1", "--for", "10m", "--why", "test")
    assert held.returncode == 0, held.stderr
    try:
        served.answer_some(1)
        eventually(lambda: served.pilot.status()["leases"])
        leased = served.busy_share()
        assert served.post("/pause?mode=keep").status_code == 200
        served.ask_for_ever(3)
        eventually(lambda: served.pilot.status()["signals"]["in_flight"].get("value") == 3)
        time.sleep(1)
        paused = served.busy_share()
    finally:
        served.pilot.command("override", "max_running=none")
        served.post("/resume")
    served.wait_for_answers()
    print(
        f"engine core's share of a CPU: at work {busy:.3f}, idle {alone:.3f}, leased {leased:.3f}, "
        f"held back {paused:.3f}"
    )
    assert busy > 2 * IDLE_SHARE, "so the share is of the process that works"
    assert alone < IDLE_SHARE
    assert leased < IDLE_SHARE
    assert paused < IDLE_SHARE
    served.answer_some()


def test_wedged_output_is_told_within_seconds_while_health_says_200(served: Beside) -> None:
    served.answer_some()
    # Its answer cannot be packed for the wire: the thread that sends all answers dies of it.
    with pytest.raises(httpx.TimeoutException):
        httpx.post(
            f"{served.server.url}/collective_rpc",
            json={"method": "get_kv_cache_spec"},
            timeout=3,
            trust_env=False,
        )
    served.ask_for_ever(3)
    began = time.monotonic()
    eventually(lambda: "KvpilotOutputWedged" in served.firing())
    seconds = time.monotonic() - began
    print(f"wedge told after {seconds:.1f} s")
    assert seconds < 12
    assert served.state == "wedged"
    assert served.health() == 200
    alert = served.firing()["KvpilotOutputWedged"]
    assert alert["severity"] == "critical"
    assert "3 requests are awaited at its valves, it has 0 running and 0 waiting" in alert["summary"]
    assert "health endpoint may still say 200" in alert["description"]
    assert "KvpilotOutputWedged for" in served.pilot.command("status").stdout
    # As the alert says: SIGTERM may not be enough.
    served.server.kill()
    eventually(lambda: "KvpilotEngineDead" in served.firing())
    assert "vanished without a word" in served.firing()["KvpilotEngineDead"]["summary"]
    served.start_again()
    eventually(lambda: set(served.firing()) == {"KvpilotEngineRestarted"})


def test_a_killed_engine_core_is_told_with_its_ending_and_its_restart(served: Beside) -> None:
    served.answer_some()
    restarts = served.pilot.metric("kvpilot_engine_restarts")[0]
    served.ask_for_ever(16, max_tokens=900)
    eventually(lambda: served.state == "live")
    served.server.engine_core().kill()
    began = time.monotonic()
    eventually(lambda: "KvpilotEngineDead" in served.firing())
    print(f"death told after {time.monotonic() - began:.1f} s")
    alert = served.firing()["KvpilotEngineDead"]
    assert alert["severity"] == "critical"
    assert "vanished without a word, as by SIGKILL" in alert["summary"]
    assert served.pilot.status()["leases"] == []
    eventually(lambda: not served.server.alive())
    served.server.kill()
    served.start_again()
    eventually(lambda: "KvpilotEngineDead" not in served.firing())
    assert "vanished without a word" in served.firing()["KvpilotEngineRestarted"]["summary"]
    assert served.pilot.metric("kvpilot_engine_restarts") == [restarts + 1]
