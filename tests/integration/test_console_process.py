"""The console of a real pilot: its stream, its recordings, and `kvpilot top` beside it."""

import json

import httpx
from pilot_lab import Lab
from pilot_process import eventually

from kvpilot.api.console.follow import frames
from kvpilot.link.ending import Ending


def test_frames_come_twice_a_second_and_end_with_the_pilot(lab: Lab) -> None:
    engine = lab.engine()
    engine.fields["waiting"] = 20
    pilot = lab.flying()
    eventually(lambda: lab.status().get("leases"))
    seen = frames(f"http://127.0.0.1:{lab.port}")
    first, second, third = next(seen), next(seen), next(seen)
    assert first["answers"]["doing"]["title"] == "Holds 1 knob away from baseline"
    apart_s = (third["at_wall_ns"] - second["at_wall_ns"]) / 1e9
    assert 0.2 < apart_s < 3.0, "on a machine that is busy too"
    assert first["operate"]["config"] == str(lab.folder / "kvpilot.yaml")
    pilot.terminate()
    assert pilot.wait(10) == 0, "a viewer does not keep it from landing"
    seen.close()


def test_top_shows_one_frame_or_says_in_one_line_that_nobody_is_there(lab: Lab) -> None:
    none = lab.command("top", "--once")
    assert none.returncode == 1
    (line,) = none.stderr.splitlines()
    assert f"127.0.0.1:{lab.port}" in line
    assert "kvpilot run" in line
    lab.engine()
    lab.flying()
    eventually(lambda: lab.status().get("knobs"))
    done = lab.command("top", "--once")
    assert done.returncode == 0, done.stderr
    assert "prefill_chunk_tokens" in done.stdout


def test_recordings_and_tests_are_read_beside_the_pilot(lab: Lab) -> None:
    engine = lab.engine()
    lab.flying()
    eventually(lambda: (lab.status().get("engine") or {}).get("step"))
    engine.stop(Ending("exception", 1, 1, "RuntimeError"))
    lab._engines.clear()
    answer = lab.get("/console/incidents")
    assert answer is not None
    (start,) = answer.json()
    case = lab.get(f"/console/incidents/{start['nonce']}")
    assert case is not None
    told = case.json()
    assert told["rows"], told
    assert told["columns"][0] == "wall_s"
    assert "RuntimeError" in json.dumps(told)
    tests = lab.get("/console/tests")
    assert tests is not None
    assert tests.json()["errors"] == []
    unknown = lab.get("/console/incidents/0123456789abcdef")
    assert unknown is not None
    assert unknown.status_code == 404
    assert len(unknown.json()["error"].splitlines()) == 1


def test_viewers_that_read_nothing_do_not_hold_up_the_pilot(lab: Lab) -> None:
    lab.engine()
    lab.flying()
    eventually(lambda: lab.status().get("knobs"))
    with httpx.Client(timeout=5, trust_env=False) as client:
        streams = [client.stream("GET", f"http://127.0.0.1:{lab.port}/console/stream") for _ in range(20)]
        for stream in streams:
            stream.__enter__()
        before = lab.status()["pilot"]
        eventually(lambda: lab.status()["pilot"]["ticks"] > before["ticks"] + 5)
        after = lab.status()["pilot"]
        for stream in streams:
            stream.__exit__(None, None, None)
    assert after["failed_ticks"] == 0
