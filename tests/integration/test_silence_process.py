"""Engines that fall silent beside a pilot process, and what a person hears of it; two ranks, two pilots."""

import signal

import pytest
from pilot_lab import Lab
from pilot_process import Webhook, ended, eventually

from kvpilot.link.ending import Ending
from kvpilot.link.locks import is_locked

SHED = """\
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: shed}
spec:
  inputs:
    waiting: {signal: requests_waiting}
  rules:
    - name: turn-away
      when: waiting > 10.0
      until: waiting < 2.0
      do: [{knob: shed_fraction, set: 0.5}]
"""


@pytest.fixture
def told(lab: Lab, webhook: Webhook) -> Webhook:
    """A receiver that this lab's pilot tells."""
    lab.configure(receivers=[{"name": "oncall", "url": f"http://127.0.0.1:{webhook.server_address[1]}/hook"}])
    return webhook


def test_an_engine_that_stalls_dies_and_comes_again_is_told_step_by_step(lab: Lab, told: Webhook) -> None:
    engine = lab.engine()
    lab.flying()
    eventually(lambda: lab.status()["engine"]["state"] == "live")
    engine.frozen.set()
    eventually(lambda: lab.status()["engine"]["state"] == "stalled", within_s=4)
    eventually(lambda: told.alerts() == [("KvpilotEngineStalled", "firing")], within_s=5)
    engine.stop(Ending("exception", 1, 1, "RuntimeError\ncore.py:step:10"))
    eventually(lambda: ("KvpilotEngineDead", "firing") in told.alerts(), within_s=5)
    body = next(body for body in told.bodies if body["commonLabels"]["alertname"] == "KvpilotEngineDead")
    assert body["commonLabels"] == {"alertname": "KvpilotEngineDead", "engine": "lab", "severity": "critical"}
    assert body["commonAnnotations"]["summary"].endswith("died of RuntimeError in step, core.py line 10")
    assert "Restart the server" in body["commonAnnotations"]["description"]
    assert "KvpilotEngineDead" in lab.command("status").stdout
    lab.engine()
    eventually(lambda: ("KvpilotEngineRestarted", "firing") in told.alerts())
    eventually(lambda: ("KvpilotEngineDead", "resolved") in told.alerts())
    eventually(lambda: lab.status()["engine"]["state"] == "live")
    assert lab.metric("kvpilot_engine_restarts") == [1]
    firing = [name for name, status in told.alerts() if status == "firing"]
    assert firing == ["KvpilotEngineStalled", "KvpilotEngineDead", "KvpilotEngineRestarted"]


def test_a_restart_under_load_begins_at_baseline_and_is_flown_again(lab: Lab, told: Webhook) -> None:
    engine = lab.engine()
    engine.fields["waiting"] = 11
    lab.flying()
    eventually(lambda: engine.chunk == 64)
    engine.stop()
    again = lab.engine()
    again.fields["waiting"] = 5
    eventually(lambda: lab.metric("kvpilot_engine_restarts") == [1])
    begun = len(again.seen)
    eventually(lambda: len(again.seen) > begun + 200)
    assert set(again.seen) == {512}
    again.fields["waiting"] = 11
    eventually(lambda: again.chunk == 64)


def test_two_pilots_fly_two_ranks_and_one_of_them_the_valves(lab: Lab, webhook: Webhook) -> None:
    (lab.policies / "shed.yaml").write_text(SHED)
    receivers = [{"name": "oncall", "url": f"http://127.0.0.1:{webhook.server_address[1]}/hook"}]
    engines = [lab.engine(rank, ranks=2) for rank in (0, 1)]
    first, second = lab, lab.beside(rank=1, receivers=receivers)
    first.flying(), second.flying()
    for pilot in (first, second):
        eventually(lambda pilot=pilot: pilot.status()["engine"]["state"] == "live")
    engines[1].fields["waiting"] = 11
    eventually(lambda: engines[1].chunk == 64)
    assert engines[0].chunk == 512
    assert (first.status()["pilot"]["rank"], first.status()["pilot"]["flies_valves"]) == (0, True)
    assert (second.status()["pilot"]["rank"], second.status()["pilot"]["flies_valves"]) == (1, False)
    assert "the valves are another pilot's" in second.command("status").stdout
    assert 'kvpilot_control_armed{engine="lab",rank="1"} 1.0' in second.get("/metrics").text  # type: ignore[union-attr]
    assert 'rank="1"' not in first.get("/metrics").text, "that rank has a pilot of its own"  # type: ignore[union-attr]
    eventually(lambda: webhook.bodies)
    assert webhook.bodies[0]["commonLabels"]["rank"] == "1"
    with (lab.folder / "c/lab/valve.kvp").open("rb") as page:
        assert is_locked(page.fileno())
    third = lab.beside(rank=1)
    code, err = ended(third.pilot())
    assert code == 1
    assert "c/lab-1/controls.kvp: held by another pilot" in err
    for child in second.children:
        child.send_signal(signal.SIGTERM)
        assert ended(child)[0] == 0
    eventually(lambda: engines[1].chunk == 512)
    code, err = ended(lab.beside(rank=1, valve=True).pilot())
    assert code == 1
    assert "c/lab/valve.kvp: held by another pilot" in err
