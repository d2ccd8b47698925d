"""One real vLLM under a bursty load, with and without the pilot: `python bench/vllm_overload.py`.

A tiny Llama with a small KV pool, speculation on (a draft model that is right under greedy sampling and
mostly wrong at temperature 1) and the valve in front. Interactive requests follow the bursts of the Azure
code trace (`--trace`), batch clients ask for long answers, both in a closed loop and with limited patience.
In the second half of each leg requests sample at temperature 1, where drafts miss. Every leg sees the same
arrivals on the same server: vLLM's defaults (no lease), static settings (held by constant leases), the
pilot with the shipped policies. Token times are the engine's own.

`spec_off_recovery` and `spec_on_kept` are output tokens a second of a full batch: the pilot against
speculation held off, on a server whose draft model is never right, and against speculation left on, on one
whose draft model always is.

Needs vLLM's environment (`make vllm`). About twenty minutes; `--quick` flies each leg once.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from frame import Bar, median_bar, run
from vllm_lab import overload
from vllm_lab.flight import CLASSES, Flight, Leg, Result
from vllm_lab.models import VOCABULARY
from vllm_lab.server import SERVED_MODEL, Settings, Speculation, VllmServer
from vllm_lab.times import ENVIRON_TIMES, Times, install

from kvpilot.clock import SystemClock
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.azure import read_azure
from kvpilot.workload.client import Patience

TRACE = Path(__file__).parents[2] / "shared/traces/azure2023_code.csv"

DEFAULTS = Leg("vLLM's defaults")
PILOT = Leg("pilot", piloted=True)
STATICS = (
    Leg("no drafts", {"speculative_tokens": 0}),
    Leg("8 running", {"max_running": 8}),
    Leg("8 running, no drafts", {"max_running": 8, "speculative_tokens": 0}),
    Leg(
        "chunk 128, 12 running, no drafts",
        {"prefill_chunk_tokens": 128, "max_running": 12, "speculative_tokens": 0},
    ),
    Leg("watermark 0.6", {"admission_watermark": 0.6}),
    Leg("shed 30 % of batch, watermark 0.8", {"admission_watermark": 0.8}, shed=0.3),
)
"""What a careful operator might have set by hand."""
SPEC_OFF = Leg("speculation off", {"speculative_tokens": 0})

BLOCKS, BLOCK_TOKENS = 160, 32
SPECULATIVE_TOKENS = 3
SECONDS = 20.0
LOAD = 3.0
ROUNDS = 3
FULL_BATCH = 12
FULL_BATCH_TOKENS = 96


Calibrate = Callable[[], Awaitable[overload.Calibration]]


class Bench:
    """One server, one flight, everything this bench flies on it."""

    def __init__(self, flight: Flight, calibrate: Calibrate, arguments: argparse.Namespace) -> None:
        self.calibrations: list[overload.Calibration] = []
        """As the machine was before each round."""
        self._flight = flight
        self._calibrate = calibrate
        self._arguments = arguments
        self._rounds = 1 if arguments.quick else ROUNDS

    async def _measure_speed(self) -> None:
        self._calibration = await self._calibrate()
        self.calibrations.append(self._calibration)
        self._flight.promise(self._calibration.slos())

    async def overloads(self) -> list[dict[str, Result]]:
        """Rounds of all legs, each round from another leg on and with other arrivals."""
        rows = read_azure(self._arguments.trace)
        legs = [DEFAULTS, *STATICS, PILOT]
        rounds = []
        for number in range(self._rounds):
            # Machines drift: each round's promises and arrivals are made of what this one can do now.
            await self._measure_speed()
            seed = self._arguments.seed + number
            queues = overload.queues(rows, seed, SECONDS, LOAD, self._calibration.speed)
            first = number * 3 % len(legs)
            rounds.append(
                {leg.name: await self._fly(leg, queues, SECONDS) for leg in legs[first:] + legs[:first]}
            )
        return rounds

    async def full_batches(self, other: Leg) -> list[tuple[float, float]]:
        """Output tokens a second of a full batch, greedy, (pilot, `other`), by turns first."""
        pairs = []
        await self._measure_speed()
        for number in range(self._rounds):
            legs = (PILOT, other) if number % 2 else (other, PILOT)
            rates = {leg.name: await self._throughput(leg, number) for leg in legs}
            pairs.append((rates[PILOT.name], rates[other.name]))
        return pairs

    async def _throughput(self, leg: Leg, number: int) -> float:
        seeds = random.Random(f"batch/{number}")
        queues = [
            [
                Arrival(0.0, 48, FULL_BATCH_TOKENS, "batch", "hooli", overload.GREEDY, seeds.getrandbits(31))
                for _ in range(40)
            ]
            for _ in range(FULL_BATCH)
        ]
        result = await self._fly(leg, queues, 0.001, drain_s=SECONDS)
        return result.counted["decode_tokens_total"] / result.seconds

    async def _fly(self, leg: Leg, queues: Any, seconds: float, drain_s: float | None = None) -> Result:
        more = {} if drain_s is None else {"drain_s": drain_s}
        patience = overload.patience(self._flight.slos)
        if drain_s is not None:
            patience = dict.fromkeys(CLASSES, Patience(1000.0))
        result = await self._flight.fly(
            leg, queues, patience, overload.temperature, self._calibration.speed.r, seconds, **more
        )
        if not self._arguments.json:
            print(line(result), file=sys.stderr)
        if self._arguments.legs:
            with self._arguments.legs.open("a") as file:
                file.write(
                    json.dumps({"leg": leg.name, "counted": result.counted, **asdict(result.score)}) + "\n"
                )
        return result


def line(result: Result) -> str:
    score = result.score
    classes = " ".join(f"{name} {row['goodput_work'] or 0:.2f}" for name, row in score.classes.items())
    return (
        f"  {result.leg.name:<34} good {result.goodput:.3f} ({classes})  of {score.offered}: finished "
        f"{score.finished} shed {score.shed} failed {score.failed} abandoned {score.abandoned} unfinished "
        f"{score.unfinished}  preempted {score.preemptions} recomputed {score.recomputed_tokens}  "
        f"ttft p50/p95 {score.ttft_p50_s or 0:.2f}/{score.ttft_p95_s or 0:.2f} s  itl "
        f"{1e3 * (score.itl_p50_s or 0):.0f}/{1e3 * (score.itl_p95_s or 0):.0f} ms  "
        f"{result.counted['decode_tokens_total'] / result.seconds:.0f} tokens/s  {result.actions} actions"
    )


@contextlib.asynccontextmanager
async def aboard(
    speculation: Speculation, arguments: argparse.Namespace, folder: Path
) -> AsyncIterator[Bench]:
    """A server with that draft model."""
    folder.mkdir()
    path = folder / "times.jsonl"
    times = Times(path)
    settings = Settings(
        speculation=speculation,
        speculative_tokens=SPECULATIVE_TOKENS,
        blocks=BLOCKS,
        block_size=BLOCK_TOKENS,
        max_model_len=1024,
        max_num_seqs=32,
        valve=True,
        callers={
            "classes": CLASSES,
            "default": "batch",
            "header": "x-kvpilot-caller",
            "tenants": ["acme", "hooli"],
        },
        environ={ENVIRON_TIMES: str(path)},
        python_path=(install(folder / "plugin"),),
    )
    with VllmServer(settings, folder) as server:
        flight = Flight(
            server.url, SERVED_MODEL, server.link_environ, times, VOCABULARY, folder, SystemClock()
        )
        yield Bench(
            flight, lambda: overload.calibrate(server.url, SERVED_MODEL, times, VOCABULARY), arguments
        )


async def fly(
    arguments: argparse.Namespace, folder: Path
) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    rounds, miss, hit = [], [], []
    async with aboard("draft_hit", arguments, folder / "hit") as bench:
        calibrations = bench.calibrations
        if arguments.only in (None, "overload"):
            rounds = await bench.overloads()
        if arguments.only in (None, "spec"):
            hit = await bench.full_batches(DEFAULTS)
    if arguments.only in (None, "spec"):
        async with aboard("draft_miss", arguments, folder / "miss") as bench:
            miss = await bench.full_batches(SPEC_OFF)
    return report(calibrations, rounds, miss, hit)


def report(
    calibrations: list[overload.Calibration],
    rounds: list[dict[str, Result]],
    miss: list[tuple[float, float]],
    hit: list[tuple[float, float]],
) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    results: dict[str, Any] = {}
    bars: list[Bar] = []
    if rounds:
        names = list(rounds[0])
        for name in sorted(names, key=[DEFAULTS.name, *(leg.name for leg in STATICS), PILOT.name].index):
            results[name] = _summed([each[name] for each in rounds])
        best = max((leg.name for leg in STATICS), key=lambda name: results[name]["goodput"])
        results["best static"] = best
        pilots = [each[PILOT.name] for each in rounds]
        defaults = [each[DEFAULTS.name] for each in rounds]
        bars += [
            median_bar(
                "goodput_vs_default",
                [p.goodput / max(d.goodput, 1e-9) for p, d in zip(pilots, defaults, strict=True)],
                at_least=1.3,
            ),
            median_bar(
                "goodput_vs_best_static",
                [each[PILOT.name].goodput / max(each[best].goodput, 1e-9) for each in rounds],
                at_least=0.97,
            ),
            Bar(
                "preemptions_ratio",
                sum(p.score.preemptions for p in pilots) / max(sum(d.score.preemptions for d in defaults), 1),
                at_most=0.1,
            ),
            Bar("failed", sum(p.score.failed for p in pilots), at_most=0),
        ]
    if miss:
        bars.append(median_bar("spec_off_recovery", [a / b for a, b in miss], at_least=0.95))
        results["tokens_per_s_missing (pilot, off)"] = " ".join(f"{a:.0f}/{b:.0f}" for a, b in miss)
    if hit:
        bars.append(median_bar("spec_on_kept", [a / b for a, b in hit], at_least=0.95))
        results["tokens_per_s_hitting (pilot, on)"] = " ".join(f"{a:.0f}/{b:.0f}" for a, b in hit)
    settings = {
        "vllm": "0.32.0, CPU, eager",
        "kv_tokens": BLOCKS * BLOCK_TOKENS,
        "speculative_tokens": SPECULATIVE_TOKENS,
        "load": LOAD,
        "seconds": SECONDS,
        "rounds": len(rounds),
        "prefill_tokens_per_s": [round(each.speed.prefill_tokens_per_s) for each in calibrations],
        "decode_tokens_per_s": [round(each.speed.decode_tokens_per_s) for each in calibrations],
        "slo": [{name: asdict(slo) for name, slo in each.slos().items()} for each in calibrations],
    }
    return settings, results, bars


def _summed(results: list[Result]) -> dict[str, Any]:
    """One leg over its rounds: medians of rates, sums of counts."""
    scores = [result.score for result in results]

    def median(name: str) -> float:
        return statistics.median(getattr(score, name) or 0.0 for score in scores)

    counts = (
        "offered",
        "finished",
        "shed",
        "failed",
        "abandoned",
        "unfinished",
        "preemptions",
        "recomputed_tokens",
    )
    return {
        "goodput": statistics.median(result.goodput for result in results),
        **{name: median(name) for name in ("ttft_p50_s", "ttft_p95_s", "itl_p50_s", "itl_p95_s")},
        **{name: sum(getattr(score, name) for score in scores) for name in counts},
    }


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    with tempfile.TemporaryDirectory(prefix="kvpilot-bench-") as folder:
        return asyncio.run(fly(arguments, Path(folder)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, default=TRACE, help="an Azure-format trace")
    parser.add_argument("--seed", type=int, default=1, help="of the first round's arrivals")
    parser.add_argument("--only", choices=("overload", "spec"), help="one half of the bench")
    parser.add_argument("--legs", type=Path, help="append each leg's whole score to this file, as JSON lines")


if __name__ == "__main__":
    run("vllm_overload", 1, measure, __doc__ or "", add_arguments)
