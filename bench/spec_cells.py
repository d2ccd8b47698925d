"""Does the pilot draft as well as whoever knows best? `python bench/spec_cells.py`.

A closed loop in virtual time: so many clients, each with one request at a time, on the suite's machine with
its draft model. In every cell of batch x acceptance the shipped `spec-economics` policy, alone, against each
fixed number of drafts from 0 to 5; the figure is output tokens a second, over that of whichever fixed number
is best in that cell. All legs share requests, draft luck and step noise. The first seconds, in which requests
get out of step with one another and the pilot meets the engine, are left out of all legs; what its probes
cost later is not. Beside each cell: the share of time that the pilot had each number of drafts in force.
"""

import argparse
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from multiprocessing import get_context
from typing import Any

from frame import Bar, run

from kvpilot.link.controls import Scope
from kvpilot.policy.load import load_text
from kvpilot.policy.rules import PolicySet
from kvpilot.policy_directory import shipped as shipped_policies
from kvpilot.simulate.deployment import Promises
from kvpilot.simulate.legs import deployment_on
from kvpilot.simulate.plants.acceptance import Fixed
from kvpilot.simulate.replica import Replica
from kvpilot.simulate.staging import machine_pace, promises
from kvpilot.simulate.suite import CLASSES, Settings, load, shipped
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.client import Patience

BATCHES = (1, 4, 16, 64)
ACCEPTANCES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)
DRAFTS = (0, 1, 2, 3, 4, 5)
PILOT = "pilot"
POLICY = "spec-economics.yaml"
PROMPT_TOKENS, OUTPUT_TOKENS, SIGMA = 400, 300, 0.5
SETTLING_S = 10.0


@dataclass(frozen=True)
class Cell:
    batch: int
    acceptance: float

    @property
    def name(self) -> str:
        return f"b{self.batch} a{self.acceptance:g}"


@dataclass(frozen=True)
class Flown:
    """Of one leg: output tokens a second, and the share of ticks at each number of drafts (pilot only)."""

    tokens_per_s: float
    at: Mapping[int, float]


def requests(seed: int) -> Iterator[Arrival]:
    """Without end; who asks next is the next of these, in whatever leg."""
    dice = random.Random(f"spec-cells/{seed}")
    mu = -SIGMA * SIGMA / 2
    for number in count():
        prompt = max(16, round(PROMPT_TOKENS * dice.lognormvariate(mu, SIGMA)))
        output = max(16, round(OUTPUT_TOKENS * dice.lognormvariate(mu, SIGMA)))
        yield Arrival(0.0, prompt, output, "interactive", "acme", "any", number)


def replica(settings: Settings, cell: Cell, drafts: int | None) -> Replica:
    """With a fixed number of drafts, or None for the pilot, which may ask for any of them."""
    machine = settings.machine.machine
    made = promises(settings, machine_pace(settings))
    waiting = Promises(made.slos, dict.fromkeys(CLASSES, Patience(1e6)), made.r)
    policies = None
    if drafts is None:
        policies = PolicySet((load_text((shipped_policies() / POLICY).read_text()),))
    deployment = deployment_on(
        machine,
        classes=CLASSES,
        step_token_budget=settings.pilot.chunk,
        prefill_chunk_tokens=settings.pilot.chunk,
        speculative_tokens=DRAFTS[-1] if drafts is None else drafts,
    )
    plant = partial(machine.plant, settings.machine.noise, 1)()
    return Replica(deployment, plant, waiting, policies, Fixed(cell.acceptance))


def fly(settings: Settings, seconds: float, cell: Cell, drafts: int | None) -> Flown:
    flown, coming = replica(settings, cell, drafts), requests(1)
    at: Counter[int] = Counter()
    if flown.cockpit is not None:
        _watch(flown, at)
    ended = 0
    for _ in range(cell.batch):
        flown.offer(next(coming))
    tokens, since_s = 0, 0.0
    while flown.now_s < SETTLING_S + seconds:
        flown.fly_to(flown.now_s + 1e-9)
        for _ in range(len(flown.outcomes) - ended):
            flown.offer(replace(next(coming), at_s=flown.now_s))
        ended = len(flown.outcomes)
        if not since_s and flown.now_s >= SETTLING_S:
            tokens, since_s = flown.engine.core.totals.decode_tokens, flown.now_s
            at.clear()
    made = flown.engine.core.totals.decode_tokens - tokens
    ticks = at.total() or 1
    return Flown(made / (flown.now_s - since_s), {k: ticks_at / ticks for k, ticks_at in sorted(at.items())})


def _watch(flown: Replica, at: "Counter[int]") -> None:
    """Note the drafts in force at every tick."""
    assert flown.cockpit is not None
    cockpit, tick = flown.cockpit, flown.cockpit.tick

    def noted() -> None:
        tick()
        shown = cockpit.pilot.board.tick
        if shown is not None and shown.context is not None:
            at[round(shown.context.values.get(("speculative_tokens", Scope()), -1))] += 1

    cockpit.tick = noted  # type: ignore[method-assign]


def fly_cell(settings: Settings, seconds: float, cell: Cell) -> dict[int | str, Flown]:
    fixed: dict[int | str, Flown] = {drafts: fly(settings, seconds, cell, drafts) for drafts in DRAFTS}
    return {**fixed, PILOT: fly(settings, seconds, cell, None)}


def measure(arguments: argparse.Namespace) -> tuple[Mapping[str, Any], Mapping[str, Any], list[Bar]]:
    settings = load(shipped())
    seconds = arguments.seconds or (6.0 if arguments.quick else 60.0)
    batches = arguments.batch or ((1, 16) if arguments.quick else BATCHES)
    acceptances = arguments.acceptance or ((0.0, 0.6, 0.95) if arguments.quick else ACCEPTANCES)
    cells = [Cell(batch, acceptance) for batch in batches for acceptance in acceptances]
    # The largest batches take longest: they go first.
    order = sorted(cells, key=lambda cell: -cell.batch)
    with ProcessPoolExecutor(arguments.workers or os.cpu_count(), get_context("spawn")) as pool:
        found = dict(zip(order, pool.map(partial(fly_cell, settings, seconds), order), strict=True))
    ratios, table = {}, {}
    for cell in cells:
        legs = found[cell]
        best = max(DRAFTS, key=lambda drafts: legs[drafts].tokens_per_s)
        pilot = legs[PILOT]
        ratios[cell] = pilot.tokens_per_s / legs[best].tokens_per_s
        shares = " ".join(f"{drafts}:{share:.0%}" for drafts, share in pilot.at.items() if share >= 0.01)
        table[cell.name] = {
            "vs_best": ratios[cell],
            "best_drafts": best,
            "tokens_per_s": pilot.tokens_per_s,
            "vs_off": pilot.tokens_per_s / legs[0].tokens_per_s,
            "pilot_drafts": shares,
        }
    worst = min(ratios, key=lambda cell: ratios[cell])
    about = {
        "machine": f"{settings.machine.device}, {settings.machine.model} with {settings.machine.draft}",
        "cells": len(cells),
        "seconds": seconds,
        "settling_s": SETTLING_S,
    }
    return about, {"worst": worst.name, **table}, [Bar("worst_cell", ratios[worst], at_least=0.97)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="virtual seconds a leg, after settling")
    parser.add_argument("--batch", type=int, action="append", help="one batch size; may be given again")
    parser.add_argument("--acceptance", type=float, action="append", help="one rate; may be given again")
    parser.add_argument("--workers", type=int, help="processes; one a core if left out")


if __name__ == "__main__":
    run("spec_cells", 1, measure, __doc__ or "", add_arguments)
