"""The demo's claim, over seeds: `python bench/demo_goodput.py`.

Six legs a seed, about two and a half minutes each seed: ten minutes for seeds 1, 2, 3 and the oversubscribed
engine; `--quick` flies seed 1 and that one, five minutes.

`vs_off` and `vs_best_static` are ratios of work-weighted goodput inside one run of `kvpilot demo`: same
arrivals, same engine process, legs one after another.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from frame import Bar, median_bar, run

SEEDS = (1, 2, 3)


def demo(seed: int, scenario: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "kvpilot", "demo", "--json", "--seed", str(seed), "--scenario", scenario]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr[-500:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    reports = [demo(seed, "burst") for seed in seeds]
    oversubscribed = demo(1, "oversubscribed")

    def goods(leg: str) -> list[float]:
        return [report[leg]["goodput_work"] for report in reports]

    results = {
        "goodput_work_off": " ".join(f"{value:.3f}" for value in goods("off")),
        "goodput_work_best_static": " ".join(f"{value:.3f}" for value in goods("static")),
        "best_static": ", ".join(report["static"]["name"] for report in reports),
        "goodput_work_on": " ".join(f"{value:.3f}" for value in goods("on")),
        "preemptions_off": " ".join(str(report["off"]["preemptions"]) for report in reports),
        "preemptions_on": " ".join(str(report["on"]["preemptions"]) for report in reports),
        "oversubscribed_off": f"{oversubscribed['off']['oom']} out of memory, "
        f"{oversubscribed['off']['failed']} of {oversubscribed['off']['offered']} requests failed",
    }
    ratios = zip(goods("on"), goods("off"), goods("static"), strict=True)
    vs_off, vs_static = zip(*((on / off, on / static) for on, off, static in ratios), strict=True)
    everywhere = [*(report["on"] for report in reports), oversubscribed["on"]]
    bars = [
        median_bar("vs_off", list(vs_off), at_least=1.3),
        median_bar("vs_best_static", list(vs_static), at_least=0.97),
        Bar("oom_on", sum(leg["oom"] for leg in everywhere), at_most=0),
        Bar("failed_on", sum(leg["failed"] for leg in everywhere), at_most=0),
        Bar("oversubscribed_oom_off", oversubscribed["off"]["oom"], at_least=1),
    ]
    return {"seeds": list(seeds), "seconds_a_leg": 15}, results, bars


if __name__ == "__main__":
    run("demo_goodput", 1, measure, __doc__ or "")
