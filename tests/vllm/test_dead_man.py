"""The pilot dies with every knob away from baseline: vLLM flies itself, and no request notices."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from flights import CALLER, CALLERS, DRAFT
from pilot_process import PilotProcess
from vllm_lab import valves
from vllm_lab.leases import Records, until
from vllm_lab.load import Ask, Crowd, prompt, run
from vllm_lab.server import VllmServer

from kvpilot.clock import NS
from kvpilot.link.fields import KNOB_PREFIX
from kvpilot.link.records import StepRecord

if TYPE_CHECKING:
    from conftest import Hangar

KILLS = 20
OPENING_S = 10.0
"""How long a lapsed shed lease takes to open."""
DYING_S = 0.02
"""From the call that kills to the last instruction of the killed."""
ECHO_S = 0.5
"""A valve reads its leases, and says what it does, five times a second at least."""
TTL_S = 2.0
AWAY = {
    "step_token_budget": 256,
    "prefill_chunk_tokens": 64,
    "speculative_tokens": 0,
    "max_running": 4,
    "admission_watermark": 0.5,
}
POLICY = f"""
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {{name: away}}
spec:
  mode: enforce
  inputs:
    running: {{signal: requests_running, agg: last, maxAge: 600s}}
  onMissing: hold
  rules:
    - name: hold-away
      when: running >= 0
      lease: {TTL_S:g}s
      do:
        - {{knob: step_token_budget, set: 256}}
        - {{knob: prefill_chunk_tokens, set: 64}}
        - {{knob: speculative_tokens, set: 0}}
        - {{knob: max_running, set: 4}}
        - {{knob: admission_watermark, set: 50%}}
        - {{knob: shed_fraction, set: 50%, scope: {{classAtMost: 0}}}}
"""


@pytest.fixture
def server(hangar: "Hangar") -> VllmServer:
    return hangar.server(DRAFT)


@pytest.fixture
def pilots(server: VllmServer, tmp_path: Path) -> Iterator[PilotProcess]:
    pilots = PilotProcess(tmp_path, server.link_environ)
    (pilots.policies / "away.yaml").write_text(POLICY)
    yield pilots
    pilots.close()


def start(pilots: PilotProcess, number: int = 0) -> None:
    """One that knows nothing of the one before: each has a journal of its own."""
    classes = [{"name": name, "ttft": "2s", "itl": "50ms"} for name in CALLERS["classes"]]
    pilots.configure(classes=classes, journal=f"journal-{number}.sqlite")
    pilots.pilot()


def kill(pilots: PilotProcess) -> int:
    """SIGKILL; the monotonic time just before, ns."""
    child = pilots.children[-1]
    assert child.poll() is None, child.communicate()[1]
    killed_ns = time.monotonic_ns()
    child.kill()
    child.wait()
    return killed_ns


@pytest.mark.slow
def test_killed_twenty_times_under_load(server: VllmServer, pilots: PilotProcess) -> None:
    """Engine knobs after every kill, within one ttl and one step of the engine's own clock; the valve, which
    opens over ten seconds more, after every tenth.
    """
    records = Records(server.place)
    callers = ("batch", "batch/globex", "interactive/acme")

    def make(number: int) -> Ask:
        return Ask(prompt(150, number), 60, headers={CALLER: callers[number % 3]})

    with Crowd(server.url, 9, make) as crowd:
        for number in range(1, KILLS + 1):
            start(pilots, number)
            until(lambda: records.moved() == AWAY, 30, "all knobs away")
            until(lambda: valves.shedding(server.place) == 0.5, 5, "the valve sheds")
            killed_ns = kill(pilots)
            until(lambda: records.moved() == {}, TTL_S + 5, f"all knobs back, kill {number}")
            check_in_time(records.seen, killed_ns)
            if number % 10 == 0:
                within_s = TTL_S + OPENING_S + ECHO_S - (time.monotonic_ns() - killed_ns) / NS
                until(lambda: valves.shedding(server.place) == 0, within_s, f"the valve open, kill {number}")
            else:
                assert valves.shedding(server.place) > 0, "a shed queue must not return all at once"
        held = [record for record in records.seen if in_force(record, "max_running") == AWAY["max_running"]]
    assert len(held) > 20 * KILLS
    assert crowd.failures == []
    complete = [answer for answer in crowd.answers if answer.ok]
    shed = [answer for answer in crowd.answers if answer.shed]
    assert len(complete) > 100
    assert shed, "the valve never shed"
    assert all(answer.ask.headers[CALLER] != "interactive/acme" for answer in shed)


@pytest.mark.slow
def test_killed_while_idle_a_minute_later_baseline_holds(server: VllmServer, pilots: PilotProcess) -> None:
    records = Records(server.place)
    records.poll()
    assert run(server.url, [Ask(prompt(20, 1), 4)])[0].ok
    start(pilots)
    # An idle engine has no step boundary and says nothing: the table in its controls page is what there is.
    controls = server.place.controls_directory(0) / "controls.kvp"
    until(lambda: b"prefill_chunk_tokens" in controls.read_bytes(), 30, "a lease on a knob")
    time.sleep(1)
    kill(pilots)
    time.sleep(60)
    records.poll()
    answers = run(server.url, [Ask(prompt(300, seed), 40) for seed in range(6)])
    assert all(answer.ok for answer in answers)
    after = records.poll()
    assert len(after) > 5
    assert [record.sequence for record in after if records.knobs_of(record) != records.baselines()] == []


def in_force(record: StepRecord, knob: str) -> float | None:
    return record.get(KNOB_PREFIX + knob)


def check_in_time(seen: list[StepRecord], killed_ns: int) -> None:
    """By the engine's clock: a step's boundary saw the last renewal, and one ttl and one step later no step
    begins with a dead pilot's values any more. That sight itself is at most a step later than the death.
    """
    since = [record for record in seen if record["time_ns"] > killed_ns - NS]
    step_ns = max(record["duration_ns"] for record in since)
    last = [record for record in since if in_force(record, "max_running") == AWAY["max_running"]][-1]
    renewed = next(record for record in since if record["controls_sequence"] == last["controls_sequence"])
    assert began_ns(last) - began_ns(renewed) <= TTL_S * NS + step_ns
    assert began_ns(last) - killed_ns <= TTL_S * NS + 2 * step_ns + DYING_S * NS


def began_ns(record: StepRecord) -> float:
    return record["time_ns"] - record["duration_ns"]
