"""How much faster than the clock a simulated engine flies: `python bench/simulator_speed.py`.

One replica on one core: an a100 with llama-3-8b by the roofline, 5 requests/s of 1,155 prompt and 211 output
tokens in the mean (lengths log-normal, arrivals Poisson, seeded), the shipped policies at 10 Hz. CPU time of
the whole run, building it left out. Beside it a quiet replica (1 request/s, what a fleet is made of), an
engine without a pilot, and where the time goes (a profile of a run of its own).
"""

import argparse
import cProfile
import gc
import pstats
import random
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from frame import Bar, median_bar, run

from kvpilot.policy_directory import shipped
from kvpilot.simulate.deployment import USUAL_PROMISES
from kvpilot.simulate.legs import deployment_on, load_policies
from kvpilot.simulate.plants.acceptance import Fixed
from kvpilot.simulate.plants.named import Machine
from kvpilot.simulate.replica import Replica
from kvpilot.workload.arrival import Arrival

PROMPT_TOKENS, OUTPUT_TOKENS = 1_155, 211
SIGMA = 0.6
DRAFTS = 0
ROOMS = {
    "plant": ("simulate/plants/",),
    "world": ("simulate/",),
    "scheduler": ("kvengine/sched/", "kvengine/kv/"),
    "core": ("kvengine/",),
    "hook": ("kvpilot/inside/", "kvpilot/link/"),
    "observe": ("kvpilot/adapters/",),
    "forecast": ("kvpilot/forecast/",),
    "decide": ("kvpilot/policy/",),
    "journal": ("kvpilot/journal/", "kvpilot/pilot.py", "kvpilot/publish/", "kvpilot/orders.py"),
}
"""Where code lies, by what it does; the first that fits. Built-in functions count where they are called."""


def arrivals(seed: int, seconds: float, per_s: float) -> list[Arrival]:
    dice, made, at_s = random.Random(seed), list[Arrival](), 0.0
    mu = -SIGMA * SIGMA / 2
    while (at_s := at_s + dice.expovariate(per_s)) < seconds:
        prompt = max(1, round(PROMPT_TOKENS * dice.lognormvariate(mu, SIGMA)))
        output = max(1, round(OUTPUT_TOKENS * dice.lognormvariate(mu, SIGMA)))
        klass = "interactive" if dice.random() < 0.7 else "batch"
        tenant = f"tenant-{dice.randrange(8)}"
        made.append(Arrival(at_s, prompt, output, klass, tenant, "chat", dice.getrandbits(31)))
    return made


def replica(piloted: bool, drafts: int = DRAFTS) -> Replica:
    machine = Machine("a100", "llama-3-8b")
    deployment = deployment_on(machine, speculative_tokens=drafts)
    policies = load_policies(shipped(), deployment.classes) if piloted else None
    plant = partial(machine.plant, sigma=0.05, seed=1)()
    return Replica(deployment, plant, USUAL_PROMISES, policies, Fixed(0.7))


def fly(
    seconds: float, per_s: float, piloted: bool = True, seed: int = 1, drafts: int = DRAFTS
) -> tuple[float, Replica]:
    """(CPU seconds, the replica after it)."""
    flown, coming = replica(piloted, drafts), arrivals(seed, seconds, per_s)
    gc.collect()
    began_s = time.process_time()
    flown.fly(coming, drain_s=30.0)
    return time.process_time() - began_s, flown


def where_time_goes(seconds: float) -> dict[str, float]:
    """Share of each room in a profiled run. A profile taxes small functions, so shares and no times."""
    flown, coming = replica(piloted=True), arrivals(2, seconds, 5.0)
    profile = cProfile.Profile()
    profile.enable()
    flown.fly(coming, drain_s=30.0)
    profile.disable()
    spent = dict.fromkeys((*ROOMS, "other"), 0.0)
    for (file, _, _), (_, _, own_s, _, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if file != "~":
            spent[_room(file)] += own_s
            continue
        for (caller, _, _), (_, _, share_s, _) in callers.items():
            spent[_room(caller)] += share_s
    whole = sum(spent.values())
    return {name: round(own_s / whole, 3) for name, own_s in spent.items()}


def _room(file: str) -> str:
    return next((name for name, parts in ROOMS.items() if any(part in file for part in parts)), "other")


def measure(arguments: argparse.Namespace) -> tuple[Mapping[str, Any], Mapping[str, Any], list[Bar]]:
    seconds, repeats = (60.0, 3) if arguments.quick else (300.0, 5)
    fly(5.0, 5.0)  # Everything imported, every expression compiled.
    times, steps, us = [], [], []
    for seed in range(1, repeats + 1):
        cpu_s, flown = fly(seconds, 5.0, seed=seed)
        count = flown.engine.core.totals.steps
        times.append(flown.now_s / cpu_s)
        steps.append(count / cpu_s)
        us.append(cpu_s / count * 1e6)
    alone_s, alone = fly(seconds, 5.0, piloted=False)
    quiet_s, quiet = fly(seconds, 1.0)
    drafting_s, drafting = fly(seconds, 5.0, drafts=4)
    results = {
        "steps_per_s": sorted(steps)[repeats // 2],
        "us_per_step": sorted(us)[repeats // 2],
        "steps_per_virtual_s": flown.engine.core.totals.steps / flown.now_s,
        "times_real_time_unpiloted": alone.now_s / alone_s,
        "times_real_time_quiet": quiet.now_s / quiet_s,
        "times_real_time_drafting": drafting.now_s / drafting_s,
        "where": where_time_goes(min(seconds, 60.0)),
    }
    settings = {
        "device": "a100",
        "model": "llama-3-8b",
        "requests_per_s": 5,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "policy_hz": 10,
        "seconds": seconds,
        "repeats": repeats,
    }
    return settings, results, [median_bar("times_real_time", times, at_least=60)]


if __name__ == "__main__":
    run("simulator_speed", 1, measure, __doc__ or "")
