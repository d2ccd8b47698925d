"""How close is the simulator to a live engine? `python bench/fidelity.py`, about six minutes.

One reference engine, a real process on the CPU. Its capacity is measured; the same arrivals, Poisson, fly
live, several times, at 0.5 and 0.8 of it. For each load a model is calibrated from the step records of its
flights, as `kvpilot replay` does with a recording, and the arrivals fly in virtual time. What is fitted is
how long a step takes; what is judged is what requests saw. A quantile's error is |simulated / live - 1|, live
being the median of its flights; beside it stands the spread of those, (most - least) / median. Nobody can
ask a simulation to be closer to a flight than the next flight is: what is allowed is 10 %, or 1.5 times the
spread where that is more. With `--apart` models are calibrated from other flights, in between: then a machine
whose speed drifts from minute to minute counts as error too.

The full run then flies the pilot too, in bursts at 1.1 of capacity, live and simulated: what the policies
change should have the same sign in both.
"""

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from frame import Bar, run

from kvpilot.clock import SystemClock
from kvpilot.demo.flight import Flight
from kvpilot.demo.screen import Screen
from kvpilot.demo.settings import SCENARIOS
from kvpilot.demo.settings import Leg as LiveLeg
from kvpilot.incident.recording import Recording, read_file
from kvpilot.policy_directory import shipped
from kvpilot.score import Score, score
from kvpilot.simulate.deployment import Promises
from kvpilot.simulate.legs import DRAIN_S, load_policies
from kvpilot.simulate.plants.acceptance import Fixed
from kvpilot.simulate.plants.calibration import calibrated, steps_of
from kvpilot.simulate.plants.fitted import Fitted, Law
from kvpilot.simulate.recalled import acceptance_of, deployment_of
from kvpilot.simulate.replica import Replica
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.generator import BURSTS, generate

LOADS = (0.5, 0.8)
PILOT_LOAD = 1.1
QUANTILES = ("ttft_p50_s", "ttft_p95_s", "itl_p50_s", "itl_p95_s")
SIMULATED_SEEDS = 5
OFF, ON = LiveLeg("engine defaults", "off"), LiveLeg("pilot", "on")


class Bench:
    """One engine, its calibration, and flights of it, live and simulated."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.flight = Flight(SCENARIOS["burst"], folder, Screen(as_json=True), SystemClock())
        self._folder = folder
        self._seconds = seconds
        self.laws: dict[float, Law] = {}
        self._pages: dict[float, Recording] = {}
        self._spans: list[tuple[float, float, float]] = []
        """Loads, and when it flew them to be calibrated, on the engine's clock."""

    async def start(self) -> None:
        from kvengine.model.domains import prompt

        self._prompt = prompt
        await self.flight.start(prompt)
        self._promises = Promises(self.flight.slos, self.flight._patience(), self.flight.calibration.speed.r)

    async def note(self, load: float, flight: Awaitable[Any]) -> Any:
        """Fly, and calibrate from these records."""
        begin_ns = self.flight.instruments.count("time_ns")
        result = await flight
        self._spans.append((load, begin_ns, self.flight.instruments.count("time_ns")))
        return result

    async def fly_apart(self, load: float, seconds: float) -> None:
        """Arrivals that nothing is judged by."""
        await self._fly(OFF, self.arrivals(load, seed=99 + len(self._spans), seconds=seconds), seconds)

    def calibrate(self) -> None:
        (page,) = (self._folder / "telemetry").rglob("telemetry-*.kvp")
        whole = read_file(page)
        for load in {load for load, _, _ in self._spans}:
            spans = [(begin, end) for of, begin, end in self._spans if of == load]
            steps = [
                step for step in whole.steps if any(begin < step["time_ns"] <= end for begin, end in spans)
            ]
            self._pages[load] = replace(whole, steps=tuple(steps))
            self.laws[load] = calibrated(steps_of(self._pages[load]))

    def arrivals(self, load: float, seed: int = 1, seconds: float | None = None) -> list[Arrival]:
        """Poisson, up to capacity; with bursts beyond it, where a pilot has something to do."""
        bursts = BURSTS if load > 1 else ()
        return generate(seed, seconds or self._seconds, load, self.flight.calibration.speed, bursts=bursts)

    async def live(self, load: float, leg: LiveLeg = OFF) -> dict[str, Any]:
        return await self._fly(leg, self.arrivals(load), self._seconds)

    async def _fly(self, leg: LiveLeg, arrivals: Sequence[Arrival], seconds: float) -> dict[str, Any]:
        prompts = {one.seed: self._prompt(one.domain, one.prompt_tokens, one.seed) for one in arrivals}
        return await self.flight.fly(leg, arrivals, prompts, seconds)

    def simulated(self, load: float, seed: int, piloted: bool = False) -> Score:
        page = self._pages[load]
        deployment = deployment_of(page.manifest)
        replica = Replica(
            deployment,
            Fitted(self.laws[load], seed),
            self._promises,
            load_policies(shipped(), deployment.classes) if piloted else None,
            Fixed(acceptance_of(page.steps)),
        )
        arrivals = [replace(one, prefix=()) for one in self.arrivals(load)]
        outcomes = replica.fly(arrivals, DRAIN_S)
        window, promises = (0.0, self._seconds), self._promises
        return score(outcomes, promises.slos, promises.r, window, replica.totals, replica.actions)


def compared(name: str, live: Sequence[float], simulated: Sequence[float]) -> dict[str, float]:
    """One figure: both medians, the error, the spread of the live ones, and what is allowed."""
    truth, made = statistics.median(live), statistics.median(simulated)
    spread = (max(live) - min(live)) / truth
    error = abs(made / truth - 1)
    return {
        "live": truth,
        "simulated": made,
        "error": error,
        "live_spread": spread,
        "allowed": max(0.10, 1.5 * spread),
    }


async def fly(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    seconds, repeats = (4.0, 2) if arguments.quick else (20.0, 4)
    with tempfile.TemporaryDirectory(prefix="kvpilot-fidelity-") as folder:
        bench = Bench(Path(folder), seconds)
        try:
            await bench.start()
            flown: dict[float, list[dict[str, Any]]] = {load: [] for load in LOADS}
            for _ in range(repeats):
                for load in LOADS:
                    if arguments.apart:
                        await bench.note(load, bench.fly_apart(load, seconds))
                        flown[load].append(await bench.live(load))
                    else:
                        flown[load].append(await bench.note(load, bench.live(load)))
            piloted = None
            if not arguments.quick:
                piloted = [
                    (
                        await bench.note(PILOT_LOAD, bench.live(PILOT_LOAD)),
                        await bench.live(PILOT_LOAD, ON),
                    )
                    for _ in range(2)
                ]
            bench.calibrate()
        finally:
            await bench.flight.stop()
    results: dict[str, Any] = {
        "plant_error_median": {f"{load:g}": bench.laws[load].fidelity.held_out.median for load in LOADS},
        "steps": {f"{load:g}": bench.laws[load].fidelity.held_out.steps for load in LOADS},
        "requests": {f"{load:g}": flown[load][0]["offered"] for load in LOADS},
    }
    rows, goodput = {}, []
    for load in LOADS:
        simulated = [bench.simulated(load, seed) for seed in range(SIMULATED_SEEDS)]
        for name in QUANTILES:
            live = [leg[name] for leg in flown[load]]
            rows[f"{load:g} {name}"] = compared(name, live, [getattr(one, name) for one in simulated])
        live = [leg["goodput_work"] for leg in flown[load]]
        made = [one.goodput_work or 0.0 for one in simulated]
        row = compared("goodput", live, made)
        goodput.append(row["error"])
        results[f"{load:g} goodput"] = row
    results |= rows
    worst = max(rows.values(), key=lambda row: row["error"] / row["allowed"])
    bars = [
        Bar("worst_quantile_error", worst["error"], at_most=worst["allowed"]),
        Bar("goodput_error", max(goodput), at_most=0.05),
    ]
    if piloted is not None:
        results |= deltas(bench, piloted)
        product = results["pilot_delta_live"] * results["pilot_delta_simulated"]
        bars.append(Bar("pilot_delta_same_sign", float(product > 0), at_least=1))
    settings = {
        "seconds": seconds,
        "apart": arguments.apart,
        "live_flights": repeats,
        "simulated_seeds": SIMULATED_SEEDS,
    }
    return settings, results, bars


def deltas(bench: Bench, piloted: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, float]:
    """Of work-weighted goodput: the pilot's less the engine defaults'."""
    live = [on["goodput_work"] - off["goodput_work"] for off, on in piloted]
    simulated = [
        (bench.simulated(PILOT_LOAD, seed, piloted=True).goodput_work or 0.0)
        - (bench.simulated(PILOT_LOAD, seed).goodput_work or 0.0)
        for seed in range(SIMULATED_SEEDS)
    ]
    return {
        "pilot_delta_live": statistics.median(live),
        "pilot_delta_live_least": min(live),
        "pilot_delta_live_most": max(live),
        "pilot_delta_simulated": statistics.median(simulated),
    }


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    return asyncio.run(fly(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--apart", action="store_true", help="calibrate from flights of their own")


if __name__ == "__main__":
    run("fidelity", 1, measure, __doc__ or "", add_arguments)
