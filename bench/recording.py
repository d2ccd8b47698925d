"""What does the rolling recording cost a pilot? `python bench/recording.py`, half a minute.

A simulated engine of a few hundred steps a second is flown by the shipped policies, with the real recorder:
its queue, its thread, its files. Each tick's own part is timed: reading the requests that have ended and what
valves have counted, and handing them over. Ticks follow one another 5 ms apart, 20 times as fast as in a
flight, so the thread packs and writes in their way more often than it ever would.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from frame import Bar, run

from kvpilot.policy_directory import shipped
from kvpilot.recordings.recorder import Kept, Moment, Recorder, Rolling, segments_in
from kvpilot.simulate.deployment import USUAL_PROMISES, Deployment
from kvpilot.simulate.legs import load_policies
from kvpilot.simulate.plants.plant import StepFeatures
from kvpilot.simulate.replica import Replica
from kvpilot.workload.arrival import Arrival

DEPLOYMENT = Deployment(blocks=2_000, max_model_len=4_096, max_running=64)
PER_S = 10.0
PAUSE_S = 0.005


class Steady:
    """About 3 ms a step, so that a tick sees all the steps that a look has room for."""

    def step_seconds(self, features: StepFeatures) -> float:
        return 0.0025 + 20e-6 * features.prefill_tokens + 50e-6 * features.decode_sequences

    def activation_bytes(self, features: StepFeatures) -> int | None:
        return None


def arrivals(seconds: float) -> list[Arrival]:
    dice, made, at_s = random.Random(1), list[Arrival](), 0.0
    while (at_s := at_s + dice.expovariate(PER_S)) < seconds:
        klass = dice.choice(DEPLOYMENT.classes)
        prompt, output = dice.randrange(16, 800), dice.randrange(1, 120)
        made.append(Arrival(at_s, prompt, output, klass, "acme", "", dice.getrandbits(31)))
    return made


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    seconds = 60.0 if arguments.quick else 240.0
    moments: list[Moment] = []
    policies = load_policies(shipped(), DEPLOYMENT.classes)
    replica = Replica(DEPLOYMENT, Steady(), USUAL_PROMISES, policies, record=moments.append)
    replica.fly(arrivals(seconds), 30.0)
    assert replica.cockpit is not None
    engine = replica.cockpit.pilot.engine
    with tempfile.TemporaryDirectory(prefix="kvpilot-recording-") as folder:
        recorder = Recorder(Rolling(Path(folder) / "recording", {"promises": []}, Kept(1 << 30, 86_400.0)))
        recorder.start()
        took_ms = []
        began_ns = time.process_time_ns()
        for moment in moments:
            begin_ns = time.perf_counter_ns()
            engine.ended_requests()
            recorder.take(Moment(moment.tick, moment.requests, engine.valve_rows()))
            took_ms.append((time.perf_counter_ns() - begin_ns) / 1e6)
            time.sleep(PAUSE_S)
        recorder.close(30.0)
        cpu_ms = (time.process_time_ns() - began_ns) / 1e6 / len(moments)
        written = sum(path.stat().st_size for path in segments_in(Path(folder) / "recording"))
    flown_s = len(moments) / 10
    results = {
        "ticks": len(moments),
        "lost": recorder.lost,
        "tick_ms_p99": statistics.quantiles(took_ms, n=100)[98],
        "cpu_ms_a_tick_thread_included": cpu_ms,
        "mb_an_hour": written / flown_s * 3600 / 1e6,
        "steps_a_second": replica.engine.core.totals.steps / flown_s,
    }
    bars = [Bar("tick_ms", statistics.median(took_ms), at_most=0.1), Bar("lost", recorder.lost, at_most=0)]
    return {"seconds": seconds, "requests_a_second": PER_S}, results, bars


if __name__ == "__main__":
    run("recording", 1, measure, __doc__ or "")
