"""Replay: the same policies give the same flight within the stated error; others are told apart."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from worlds import Linear, small

from kvpilot.clock import NS
from kvpilot.commands import app
from kvpilot.link.requests import EndedRequest
from kvpilot.policy_directory import shipped
from kvpilot.recordings.recorded import Counted, Recorded, read_recording
from kvpilot.recordings.recorder import Kept, Rolling
from kvpilot.score import Slo
from kvpilot.simulate import replay as replays
from kvpilot.simulate.deployment import Promises
from kvpilot.simulate.legs import load_policies
from kvpilot.simulate.recalled import _blocks, _emitted, recall
from kvpilot.simulate.replay import Figure, Replayed, replay
from kvpilot.simulate.replica import START_NS, Replica
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.client import Patience

PROMISES = Promises(
    {"batch": Slo(4.0, 0.1), "interactive": Slo(0.5, 0.03)},
    {"batch": Patience(60.0), "interactive": Patience(60.0)},
)
ABOUT = {"engine": "test", "promises": [["batch", 4.0, 0.1, 0.0], ["interactive", 0.5, 0.03, 0.0]]}
DEPLOYMENT = small(speculative_tokens=0, blocks=300)
SHEDDING = """
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: shed-all}
spec:
  priority: 900
  mode: enforce
  onMissing: hold
  inputs:
    waiting: {signal: requests_waiting, agg: last, maxAge: 5s}
  rules:
    - name: always
      when: waiting >= 0.0
      do: [{knob: shed_fraction, set: 0.6, min: 0.0, max: 0.6}]
"""


def arrivals(seconds: float, per_s: float) -> list[Arrival]:
    dice, made, at_s = random.Random(5), list[Arrival](), 0.0
    while (at_s := at_s + dice.expovariate(per_s)) < seconds:
        klass, tenant = dice.choice(("batch", "interactive")), dice.choice(("acme", "globex"))
        prompt, output = dice.randrange(16, 900), dice.randrange(1, 80)
        made.append(Arrival(at_s, prompt, output, klass, tenant, "", dice.getrandbits(31)))
    return made


def record(directory: Path, seconds: float = 16.0, per_s: float = 9.0) -> Path:
    rolling = Rolling(directory, ABOUT, Kept(1 << 26, 86_400.0))
    policies = load_policies(shipped(), DEPLOYMENT.classes)
    replica = Replica(DEPLOYMENT, Linear(step_s=0.006), PROMISES, policies, record=rolling.add)
    replica.fly(arrivals(seconds, per_s), 30.0)
    rolling.flush(replica.clock.monotonic_ns())
    rolling.close_file()
    return directory


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("flight") / "recording")


@pytest.fixture(scope="module")
def same(recording: Path) -> Replayed:
    return replay(recording, shipped(), seeds=2)


def figure(replayed: Replayed, name: str) -> Figure:
    return next(one for one in replayed.figures if one.name == name)


def test_the_same_policies_change_nothing_beyond_the_error(same: Replayed) -> None:
    for name in ("goodput_work", "goodput_per_offered", "ttft_p50_s", "ttft_p95_s", "itl_p50_s", "finished"):
        one = figure(same, name)
        assert one.verdict == "within error" or abs(one.delta or 0) <= 0.02 * abs(one.recorded or 1), one


def test_the_recorded_decisions_reproduce_the_recorded_flight(same: Replayed) -> None:
    """A quiet plant, exactly known arrivals: what remains is the fit."""
    for name in ("goodput_work", "ttft_p50_s", "itl_p50_s"):
        one = figure(same, name)
        assert one.error is not None
        assert one.error <= 0.05 * (one.recorded or 1), one
    assert figure(same, "actions").flown == pytest.approx(figure(same, "actions").recorded, rel=0.05)
    assert same.judged == len(same.recalled.arrivals) > 100
    assert {one.rule for one in same.did} <= {one.rule for one in same.would}


def test_another_policy_is_told_apart(recording: Path, tmp_path: Path) -> None:
    (tmp_path / "shed.yaml").write_text(SHEDDING)
    other = replay(recording, tmp_path, seeds=1)
    shed = figure(other, "shed")
    assert shed.recorded == shed.flown == 0
    assert shed.verdict == "changed"
    assert (shed.delta or 0) > 30
    assert figure(other, "goodput_work").verdict == "changed"
    assert [one.rule for one in other.would if one.rule == "shed-all/always"]


def test_what_was_shed_is_replayed_as_arrivals(recording: Path) -> None:
    whole = read_recording(recording)
    with_shed = _with(whole, counted=(*whole.counted, Counted(START_NS + NS, 1, "acme", 3, 1, 300, 100)))
    made = recall(with_shed)
    assert len(made.arrivals) == len(recall(whole).arrivals) + 2
    assert sorted(a.prompt_tokens for a in set(made.arrivals) - set(recall(whole).arrivals)) == [100, 100]
    assert any("2 were turned away" in limit for limit in made.limits)


def test_an_engine_that_tells_nothing_is_rebuilt_from_counts_and_said_so(recording: Path) -> None:
    whole = read_recording(recording)
    silent = _with(whole, requests=(), manifest=_silent(whole))
    made = recall(silent)
    came = len(whole.requests)
    assert len(made.arrivals) == came
    assert made.outcomes == ()
    assert any("does not tell" in limit and "valves" in limit for limit in made.limits)
    by_steps = recall(_with(silent, counted=(), has_valve=False))
    assert len(by_steps.arrivals) == pytest.approx(came, rel=0.05)
    total = sum(one.prompt_tokens for one in by_steps.arrivals)
    assert total == pytest.approx(sum(one.prompt_tokens for one in whole.requests), rel=0.1)
    assert any("no valve counted" in limit for limit in by_steps.limits)


def _with(recorded: Recorded, **changes: Any) -> Recorded:
    from dataclasses import replace

    return replace(recorded, **changes)


def _silent(recorded: Recorded) -> Any:
    from dataclasses import replace

    return replace(recorded.manifest, request_columns=(), request_records=0)


def test_what_comes_before_the_stretch_warms_up_and_is_not_judged(recording: Path) -> None:
    whole = read_recording(recording)
    end_s = (whole.end_ns - whole.begin_ns) / NS
    made = replays._judged(recall(whole), whole, 5.0)
    assert made.window_s[0] == pytest.approx(end_s - 5.0)
    assert made.arrivals == recall(whole).arrivals
    assert replays._judged(recall(whole), whole, None) == recall(whole)


def test_a_delta_is_believed_only_beyond_the_error() -> None:
    assert Figure("x", 1.0, 1.2, 1.3, 0.2).verdict == "within error"
    assert Figure("x", 1.0, 1.2, 1.5, 0.2).verdict == "changed"
    assert Figure("x", None, 1.2, 1.5, None).verdict == "unverified"
    assert Figure("x", 1.0, 1.2, None, 0.2).verdict == "unknown"


def test_token_times_follow_the_steps() -> None:
    one = EndedRequest("", 0, 100, 400, 0, 5, 4, "finished", 0)
    assert _emitted(one, [100, 200, 300, 400]) == ((100, 1), (200, 1), (300, 1), (400, 1))
    assert _emitted(one, [400]) == ((100, 1), (400, 3))
    assert _emitted(one._replace(output_tokens=1), [100]) == ((100, 1),)
    assert sum(count for _, count in _emitted(one, [])) == 4


def test_blocks_are_shared_as_far_as_hashes_are() -> None:
    assert _blocks((1, 2, 3)) == (*_blocks((1, 2)), 3 << 12 | 2, 3 << 12 | 3)
    assert len(_blocks((1, 2, 3, 4))) == 8
    assert _blocks((1, 2, 5))[:2] == _blocks((1, 2, 3))[:2]


def said(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["replay", *map(str, arguments)])
    assert result.exit_code == 1
    assert len(str(result.exception).splitlines()) <= 1
    return result.output


def test_bad_input_is_one_line_each(recording: Path, tmp_path: Path) -> None:
    newer = tmp_path / "00000001.kvr"
    newer.write_bytes(b"kvpilot-recording 7\n{}\n")
    assert "version 7" in said(newer, "--policies", shipped())
    newer.write_bytes(next(recording.glob("*.kvr")).read_bytes()[:1500])
    assert "truncated" in said(newer, "--policies", shipped())
    assert "No such file" in said(tmp_path / "none", "--policies", shipped())
    (tmp_path / "gpu.yaml").write_text(SHEDDING.replace("requests_waiting", "gpu_busy_ratio"))
    assert "needs gpu_busy_ratio, which the recording lacks" in said(recording, "--policies", tmp_path)


def test_json_has_the_error_beside_every_delta(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "SEEDS", 1)
    result = CliRunner().invoke(
        app, ["replay", str(recording), "--policies", str(shipped()), "--json", "--seeds", "1"]
    )
    told = json.loads(result.stdout)
    assert {"recorded", "as_flown", "error", "new", "delta", "verdict"} <= told["figures"][0].keys()
    assert all(one["verdict"] in ("changed", "within error", "unknown") for one in told["figures"])
    assert told["requests"] > 100
