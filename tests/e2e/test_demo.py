"""`kvpilot demo` as a newcomer runs it: real engine, pilot and clients. Whether bars hold is for `bench/`."""

import json
import subprocess
import sys
from typing import Any

import pytest

FIELDS = [
    "offered",
    "finished",
    "shed",
    "failed",
    "oom",
    "preemptions",
    "recomputed_tokens",
    "ttft_p50_s",
    "ttft_p95_s",
    "itl_p50_s",
    "itl_p95_s",
    "tokens_per_s",
    "goodput_work",
    "goodput_rps",
    "goodput_per_offered",
    "slo",
    "actions",
    "kv_occupancy_max",
    "tail_waste_ratio",
]


def demo(*options: str) -> dict[str, Any]:
    """The JSON object that the demo prints on stdout, and nothing else."""
    command = [sys.executable, "-m", "kvpilot", "demo", "--seconds", "5", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.slow
@pytest.mark.timeout(220)
def test_oversubscribed_the_engine_runs_out_of_memory_and_the_pilot_does_not() -> None:
    report = demo("--scenario", "oversubscribed")
    for leg in ("off", "static", "on"):
        assert set(FIELDS) <= set(report[leg]), leg
        result = report[leg]
        parts = ("finished", "shed", "failed", "abandoned", "unfinished")
        assert sum(result[part] for part in parts) == result["offered"] > 0
        assert 0 <= result["goodput_work"] <= 1
    assert report["off"]["oom"] > 0
    assert report["off"]["failed"] > 0
    assert report["on"]["oom"] == report["on"]["failed"] == 0
    assert report["on"]["actions"] > 0
    assert report["off"]["offered"] == report["static"]["offered"] == report["on"]["offered"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seconds", "1"], "at least 5"),
        (["--trace", "no-such-file.csv"], "no-such-file.csv"),
        (["--scenario", "calm"], "calm"),
    ],
)
def test_what_cannot_fly_says_so_in_a_line(options: list[str], says: str) -> None:
    command = [sys.executable, "-m", "kvpilot", "demo", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr
