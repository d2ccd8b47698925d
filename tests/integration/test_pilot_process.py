"""`kvpilot run` as people run it: real processes, files and signals, and an engine that only steps.

The engine is the real hook on real pages, stepped by a thread of this test as fast as engines step.
"""

import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pilot_lab import POLICY, STEP_S, Lab
from pilot_process import PATIENCE_S, Webhook, ended, eventually

from kvpilot.clock import NS, SystemClock


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
