"""`kvpilot simulate`: traces of any format, slices, splices, scenarios by name; refusals in one line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpilot.commands import app
from kvpilot.simulate.asked import of_scenario
from kvpilot.simulate.fleet import Fleet
from kvpilot.simulate.plants.named import Machine
from kvpilot.simulate.plants.pace import pace
from kvpilot.simulate.scenarios import SCENARIOS
from kvpilot.simulate.suite import load, shipped

POLICIES = Path(__file__).parents[3] / "policies"


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    azure = [f"2023-11-16 18:17:{s:02},{200 + s},{5 + s % 7}" for s in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *azure]) + "\n")
    mooncake = [
        {
            "timestamp": 500 * i,
            "input_length": 9000 if i == 3 else 1500,
            "output_length": 9,
            "hash_ids": [1, 2, i],
        }
        for i in range(10)
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, mooncake)) + "\n")
    return tmp_path


def simulated(*arguments: object) -> dict:
    done = CliRunner().invoke(app, ["simulate", "--json", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_a_slice_at_a_speed(traces: Path) -> None:
    said = simulated("--trace", traces / "a.csv", "--slice", "10:30", "--speed", 2)
    assert said["seconds"] == 10
    assert [leg["name"] for leg in said["legs"]] == ["defaults", "pilot"]
    assert all(leg["offered"] == leg["finished"] == 20 for leg in said["legs"])


def test_a_splice_counts_what_the_engine_refuses(traces: Path) -> None:
    """Llama-3-8B has 8,192 positions: one of these requests is too long for it."""
    said = simulated("--trace", traces / "m.jsonl", "--trace", traces / "a.csv", "--seconds", 20)
    assert said["trace"] == "m.jsonl+a.csv"
    assert said["oversized"] == 1
    for leg in said["legs"]:
        assert leg["offered"] == 30
        assert leg["failed"] == 1


def test_a_calibrated_plant_flies(traces: Path, tmp_path: Path) -> None:
    from test_calibration import law_of, truth_s

    law_of(truth_s, 400).write(tmp_path / "plant.json")
    fitted = simulated("--trace", traces / "a.csv", "--seconds", 10, "--plant", tmp_path / "plant.json")
    roofline = simulated("--trace", traces / "a.csv", "--seconds", 10)
    assert fitted["legs"][0]["itl_p50_s"] != roofline["legs"][0]["itl_p50_s"]


def test_a_scenario_is_made_for_the_machine() -> None:
    settings = load(shipped())
    machine = settings.machine.machine
    asked = of_scenario(SCENARIOS["kv-oversubscription"], machine, POLICIES, settings, 1)
    assert asked.scene.deployment.pool_tokens == 80_000
    assert asked.legs[1].settings["admission_watermark"] == 1.0
    assert asked.scene.promises.patience["interactive"].answer_s == 600
    assert asked.fleet(None, None, None) is None
    slower = of_scenario(SCENARIOS["kv-oversubscription"], Machine("a100"), POLICIES, settings, 1)
    assert len(slower.arrivals) < len(asked.arrivals)
    lost = of_scenario(SCENARIOS["lost-metric"], machine, POLICIES, settings, 1)
    assert lost.scene.faults == SCENARIOS["lost-metric"].faults
    ranks = of_scenario(SCENARIOS["rank-imbalance"], machine, POLICIES, settings, 1)
    assert ranks.fleet(None, None, 1) == Fleet(4, "by_tenant", 1)
    assert ranks.fleet(2, "least_kv", 1) == Fleet(2, "least_kv", 1)
    alone = SCENARIOS["rank-imbalance"].workload.arrivals(1, pace(machine.plant()).speed)
    assert len(ranks.arrivals) > 3 * len(alone), "a load is the share of all ranks together"


def test_a_fleet_shares_one_stream(traces: Path) -> None:
    said = simulated("--trace", traces / "a.csv", "--seconds", 20, "--replicas", 2, "--processes", 1)
    for leg in said["legs"]:
        assert leg["offered"] == leg["finished"] == 20
        assert [each["offered"] for each in leg["each"]] == [10, 10]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Give --trace FILE, or --scenario NAME"),
        (["--trace", "a.csv", "--scenario", "tenant-hog"], "one of them"),
        (["--scenario", "tenant-hogs"], "did you mean tenant-hog"),
        (["--trace", "none.csv"], "No such file"),
        (["--trace", "a.csv", "--slice", "5"], "START:END"),
        (["--trace", "a.csv", "--slice", "500:600"], "no arrivals from 500 to 600 s"),
        (["--trace", "a.csv", "--device", "h900"], "known are"),
        (["--trace", "a.csv", "--plant", "none.json"], "kvpilot calibrate"),
        (["--trace", "a.csv", "--speed", "0"], "above 0"),
        (["--trace", "a.csv", "--replicas", "0"], "--replicas 0: must be at least 1"),
        (["--trace", "a.csv", "--balancer", "least_kv"], "give --replicas N as well"),
        (["--trace", "a.csv", "--replicas", "2", "--balancer", "random"], "--balancer random: known are"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(
    traces: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(traces)
    done = CliRunner().invoke(app, ["simulate", *arguments])
    assert done.exit_code == 1
    assert says in done.output
    assert len(done.output.strip().splitlines()) == 1
