"""Hundreds of replicas behind a balancer, each flown by a pilot of its own: `python bench/fleet.py`.

256 replicas of the suite's machine at 1 request/s each for ten simulated minutes (chat: 1,155 prompt and 211
output tokens in the mean, log-normal, Poisson, one stream), behind a balancer that sends each request where
KV memory is least used as of a scrape every second; the shipped policies at 10 Hz; one process a core.
`wall_minutes` is of the flight, building and judging included. `uss_mb_per_replica` is what the processes
hold for their replicas at its end and share with nobody. `--quick` flies few replicas for less, and says
what the whole would take at that pace.
"""

import argparse
import os
import random
import resource
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from frame import Bar, run

from kvpilot.policy_directory import shipped as shipped_policies
from kvpilot.simulate.fleet import Fleet, fly_fleet
from kvpilot.simulate.legs import Leg, Scene, deployment_on
from kvpilot.simulate.staging import leg, machine_pace, promises
from kvpilot.simulate.suite import CLASSES, Settings, load, shipped
from kvpilot.workload.arrival import Arrival

REPLICAS, SECONDS = 256, 600.0
PER_S = 1.0
PROMPT_TOKENS, OUTPUT_TOKENS, SIGMA = 1_155, 211, 0.6
_SHOWN = (
    *("offered", "finished", "shed", "goodput_work", "goodput_work_worst", "goodput_work_best"),
    *("ttft_p95_s_worst", "offered_least", "offered_most", "steps"),
)


def arrivals(replicas: int, seconds: float, seed: int = 1) -> list[Arrival]:
    dice, made, at_s = random.Random(f"fleet/{seed}"), list[Arrival](), 0.0
    mu = -SIGMA * SIGMA / 2
    while (at_s := at_s + dice.expovariate(PER_S * replicas)) < seconds:
        prompt = max(1, round(PROMPT_TOKENS * dice.lognormvariate(mu, SIGMA)))
        output = max(1, round(OUTPUT_TOKENS * dice.lognormvariate(mu, SIGMA)))
        klass = "interactive" if dice.random() < 0.7 else "batch"
        tenant = f"tenant-{dice.randrange(8)}"
        made.append(Arrival(at_s, prompt, output, klass, tenant, "prose", dice.getrandbits(31)))
    return made


def scene(settings: Settings) -> Scene:
    machine = settings.machine.machine
    return Scene(
        deployment_on(machine, classes=CLASSES),
        partial(machine.plant, settings.machine.noise, seed=1),
        promises(settings, machine_pace(settings)),
        settings.acceptance.process,
        drain_s=60.0,
    )


def flown(settings: Settings, arguments: argparse.Namespace) -> Leg:
    policies = None if arguments.unpiloted else shipped_policies()
    return leg(settings.pilot, "unpiloted" if arguments.unpiloted else "pilot", policies)


def cpu_s() -> float:
    """CPU seconds of this process and of those that it started and that have ended: a busy machine makes the
    wall's time longer, and hardly this.
    """
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in usages)


def measure(arguments: argparse.Namespace) -> tuple[Mapping[str, Any], Mapping[str, Any], list[Bar]]:
    settings = load(shipped())
    replicas = arguments.replicas or (8 if arguments.quick else REPLICAS)
    seconds = arguments.seconds or (30.0 if arguments.quick else SECONDS)
    fleet = Fleet(replicas, arguments.balancer, arguments.processes or os.cpu_count())
    coming, where = arrivals(replicas, seconds), scene(settings)
    began_s, cpu_before_s = time.perf_counter(), cpu_s()
    result = fly_fleet(where, flown(settings, arguments), coming, seconds, fleet)
    wall_s, spent_s = time.perf_counter() - began_s, cpu_s() - cpu_before_s
    virtual_s = sum(each.virtual_s for each in result.landed)
    said = result.as_dict()
    share = REPLICAS * SECONDS / (replicas * seconds)
    results = {
        "times_real_time": virtual_s / wall_s,
        "times_real_time_a_core": virtual_s / spent_s,
        "measured_wall_s": wall_s,
        **{name: said[name] for name in _SHOWN},
    }
    about = {
        "machine": f"{settings.machine.device}, {settings.machine.model}",
        "replicas": replicas,
        "seconds": seconds,
        "requests_per_s": PER_S,
        "balancer": fleet.balancer,
        "processes": len(fleet.crews),
        "piloted": not arguments.unpiloted,
    }
    # A short flight says what the whole would take; only the whole says how many can be flown.
    bars = [Bar("wall_minutes", wall_s / 60 * share, at_most=15)]
    if share <= 1:
        bars.insert(0, Bar("replicas", replicas, at_least=REPLICAS))
    if result.uss_bytes is not None:
        results["uss_mb"] = result.uss_bytes / 1e6
        bars.append(Bar("uss_mb_per_replica", result.uss_bytes / 1e6 / replicas, at_most=32))
    return about, results, bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--seconds", type=float, help="of simulated time")
    parser.add_argument("--balancer", default="least_kv")
    parser.add_argument("--processes", type=int, help="one a core if left out")
    parser.add_argument("--unpiloted", action="store_true", help="engines alone, at the pilot's setting")


if __name__ == "__main__":
    run("fleet", 1, measure, __doc__ or "", add_arguments)
