"""What a tick's thinking costs: `python bench/policy_tick.py`.

- decide: 50 rules over 40 inputs through the one `evaluate` that flies, every kind of rule, about half
  of them active; models that answer at once; values that move every tick and go missing now and then;
- forecast: one tick of the forecast stage beside an engine that runs 256 requests: all step records that a
  tick reads, the queues of two classes, and the questions that `solve` and `choose` ask. CPU time, for the
  stage waits for nothing; beside it what the engine pays to predict what its 256 requests will hold;
- the tools: `kvpilot check` and `kvpilot test` over all shipped policies, each as a process started cold.

Each part is a function that returns (settings, results, bars); `PARTS` lists them.
"""

import argparse
import gc
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from frame import Bar, median_bar, run

from kvpilot.adapters.engine import MOST_RECORDS
from kvpilot.clock import NS
from kvpilot.forecast.forecaster import Forecaster
from kvpilot.inside.lengths import LengthPredictor
from kvpilot.link.controls import Scope
from kvpilot.link.fields import HORIZONS, QUANTILES, STEP_FIELDS
from kvpilot.link.manifest import Manifest, ManifestKnob
from kvpilot.link.records import StepRecord
from kvpilot.link.telemetry_page import ClassRow
from kvpilot.policy.context import Context, Forecasts
from kvpilot.policy.evaluate import evaluate
from kvpilot.policy.load import load_text
from kvpilot.policy.rules import Policy
from kvpilot.policy.state import State
from kvpilot.signals import Missing

Part = tuple[Mapping[str, Any], Mapping[str, Any], list[Bar]]

POLICIES, RULES, INPUTS = 5, 10, 8
"""Policies; rules and inputs in each."""
TICK_NS = NS // 10
SHIPPED = Path(__file__).parent.parent / "policies"

KNOBS = {
    knob.name: knob
    for knob in (
        ManifestKnob("prefill_chunk_tokens", "tokens", 16, 4096, 2048, 16, "per step"),
        ManifestKnob("max_running", "requests", 1, 256, 64, 1, "drains"),
        ManifestKnob("admission_watermark", "ratio", 0.05, 1.0, 1.0, 0.01, "at admission"),
        ManifestKnob("speculative_tokens", "tokens", 0, 8, 4, 1, "per sequence"),
        ManifestKnob("shed_fraction", "ratio", 0.0, 1.0, 0.0, 0.01, "valve"),
        ManifestKnob("admission_credits", "tokens", 0, 2**30, 2**30, 1, "valve"),
    )
}
ACTIONS = (
    "{knob: prefill_chunk_tokens, multiply: 0.5, min: 64, step: 16}",
    "{knob: max_running, add: -4, min: 8}",
    "{knob: admission_watermark, set: 1.0 - 0.05 * i3, min: 0.1, step: 0.05}",
    "{knob: shed_fraction, set: 0.1 * i4, max: 100%, step: 5%, scope: {classAtMost: 0}}",
    "{knob: prefill_chunk_tokens, solve: {stepTime: 0.8 * slo.itl}, min: 64, step: 16}",
    "{knob: admission_credits, solve: {ttft: 0.9 * slo.ttft, class: lowest}, scope: {classAtMost: 0}}",
    "{knob: shed_fraction, add: 0.1, scope: {tenant: top}}",
)
RUNNING = 256
CLASSES = ("batch", "interactive")
INDEX = {name: position for position, name in enumerate(STEP_FIELDS)}
ENGINE_KNOBS = (
    ManifestKnob("prefill_chunk_tokens", "tokens", 16, 8192, 2048, 16, "per step"),
    ManifestKnob("speculative_tokens", "tokens", 0, 8, 4, 1, "per step"),
)
RECOVER = {
    0: "{knob: prefill_chunk_tokens, add: 64, every: 1s}",
    1: "{knob: max_running, add: 1, every: 500ms}",
}


CHOOSE = """
    - name: drafts
      choose:
        knob: speculative_tokens
        candidates: [0, 1, 2, 4]
        minimise: forecast.seconds_per_token
        unless: i0 > 8
        probe: {candidate: 1, for: 100ms, every: 2s}
"""


def decide(arguments: argparse.Namespace) -> Part:
    """Time of one `evaluate`, in ms: of this thread alone, which waits for nothing."""
    ticks, repeats = (1_000, 3) if arguments.quick else (5_000, 5)
    policies = [policy(number) for number in range(POLICIES)]
    # As the pilot does once it flies.
    gc.collect()
    gc.freeze()
    p99s, p50s, active = [], [], []
    for seed in range(repeats):
        took_ms, share = fly(policies, ticks, random.Random(seed))
        p99s.append(took_ms[int(0.99 * len(took_ms))])
        p50s.append(statistics.median(took_ms))
        active.append(share)
    settings = {"rules": POLICIES * RULES, "inputs": POLICIES * INPUTS, "ticks": ticks, "repeats": repeats}
    results = {"decide_p50_ms": statistics.median(p50s), "rules_active_share": statistics.median(active)}
    return settings, results, [median_bar("decide_p99_ms", p99s, at_most=2)]


def fly(policies: list[Policy], ticks: int, dice: random.Random) -> tuple[list[float], float]:
    """(sorted times of each tick in ms, share of rules that were active)."""
    state, values, took_ms, active = State(), dict[tuple[str, Scope], float](), [], 0
    names = [(each.name, name) for each in policies for name in each.inputs]
    levels = dict.fromkeys(names, 5.0)
    for tick in range(ticks):
        for name in names:
            levels[name] = min(10.0, max(0.0, levels[name] + dice.gauss(0, 0.7)))
        inputs = {
            name: Missing("too_few_samples") if dice.random() < 0.01 else level
            for name, level in levels.items()
        }
        forecasts = Forecasts(
            chunk_for=lambda step_s: 10_000 * step_s,
            credits=lambda name, ttft_s: 5_000 * ttft_s,
            seconds_per_token={drafts: 1 + dice.random() for drafts in (0, 1, 2, 4)},
        )
        context = Context(
            tick * TICK_NS, KNOBS, values, {"itl": 0.05, "ttft": 2.0}, forecasts=forecasts, top_tenant="acme"
        )
        began_ns = time.thread_time_ns()
        outcome = evaluate(policies, state, inputs, context)
        took_ms.append((time.thread_time_ns() - began_ns) / 1e6)
        state = outcome.state
        values = {(lease.knob, lease.scope): lease.value for lease in outcome.leases}
        active += sum(rule.phase == "active" for rule in state.rules.values())
    return sorted(took_ms), active / ticks / (POLICIES * RULES)


def policy(number: int) -> Policy:
    inputs = "\n".join(f"    i{i}: {{signal: requests_waiting}}" for i in range(INPUTS))
    rules = CHOOSE + "\n".join(rule(index) for index in range(RULES - 1))
    return load_text(
        f"apiVersion: kvpilot.dev/v1alpha1\nkind: Policy\nmetadata: {{name: p{number}}}\n"
        f"spec:\n  priority: {100 + number}\n  onMissing: hold\n  holdFor: 1s\n"
        f"  limits: {{maxChanges: 40, per: 60s}}\n  inputs:\n{inputs}\n  rules:\n{rules}\n"
    )


def rule(index: int) -> str:
    kind = index % len(ACTIONS)
    recover = f"\n      recover: [{RECOVER[kind]}]" if kind in RECOVER else ""
    first, second = f"i{index % INPUTS}", f"i{(index + 3) % INPUTS}"
    return (
        f"    - name: rule-{index}\n"
        f"      when: {first} > 5 && ({second} > 2 || {first} > 100 * slo.itl)\n"
        f"      until: {first} < 3\n      for: 200ms\n      keepFor: 500ms\n      cooldown: 1s\n"
        f"      do: [{ACTIONS[kind]}]{recover}\n"
        f"      verify: {{input: {first}, falls: 10%, within: 2s}}"
    )


def forecast(arguments: argparse.Namespace) -> Part:
    """Time of one tick of the forecast stage, in ms."""
    ticks, repeats = (600, 3) if arguments.quick else (3_000, 5)
    wall, cpu = [], []
    for seed in range(repeats):
        wall_ms, cpu_ms = foresee(ticks, random.Random(seed))
        wall.append(wall_ms[int(0.99 * len(wall_ms))])
        cpu.append(cpu_ms[int(0.99 * len(cpu_ms))])
    settings = {"running": RUNNING, "records_a_tick": MOST_RECORDS, "forecast_ticks": ticks}
    results = {"forecast_wall_ms_p99": statistics.median(wall), "engine_demand_ms": demand_ms()}
    return settings, results, [median_bar("forecast_ms_p99", cpu, at_most=5)]


def foresee(ticks: int, dice: random.Random) -> tuple[list[float], list[float]]:
    """Sorted (wall, CPU) times of each tick in ms."""
    described = Manifest(
        "bench", "0", "none", 16, 100_000, 1, 8192, "gpu", ENGINE_KNOBS, tuple(STEP_FIELDS.values()), CLASSES
    )
    slo = {"ttft": 1.0, "itl": 0.05, **{name: {"ttft": 1.0, "itl": 0.05} for name in CLASSES}}
    forecaster, wall_ms, cpu_ms = Forecaster(slo), list[float](), list[float]()
    forecaster.begin(described)
    counts = dict.fromkeys(STEP_FIELDS, 0.0) | {"running": RUNNING, "waiting": 40, "kv_blocks_free": 20_000}
    for tick in range(ticks):
        records = [step(counts, dice) for _ in range(MOST_RECORDS)]
        rows = [ClassRow(name, 20, int(dice.uniform(2_000, 20_000))) for name in CLASSES]
        counts["waiting_prompt_tokens"] = sum(row.waiting_prompt_tokens for row in rows)
        began_ns, began_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        forecaster.observe(tick * TICK_NS, records, rows, dict.fromkeys(CLASSES, 3.0 * tick))
        forecasts = forecaster.look().forecasts
        forecasts.chunk_for(0.04)
        for name in CLASSES:
            forecasts.credits(name, 1.0)
        cpu_ms.append((time.thread_time_ns() - began_cpu_ns) / 1e6)
        wall_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    return sorted(wall_ms), sorted(cpu_ms)


def step(counts: dict[str, float], dice: random.Random) -> StepRecord:
    """The next record of an engine that decodes for everybody and computes prompts in half of its steps."""
    chunk = dice.choice((0, dice.randrange(1, 2048)))
    drafts = RUNNING * dice.randrange(5)
    seconds = (0.012 + 30e-6 * (chunk + drafts)) * dice.lognormvariate(0, 0.1)
    counts["steps_total"] += 1
    counts["duration_ns"] = seconds * NS
    counts["time_ns"] += seconds * NS
    for name, grows in (
        ("prefill_tokens", chunk),
        ("decode_sequences", RUNNING),
        ("decode_tokens", 2 * RUNNING),
        ("context_tokens", RUNNING * 1500 + drafts),
        ("chunk_positions", chunk * dice.uniform(chunk, 8192)),
        ("drafted_tokens", drafts),
        ("accepted_tokens", drafts // 2),
        ("rejected_rounds", RUNNING // 2),
        ("finished", dice.random() < 0.3),
    ):
        counts[f"{name}_total"] += grows
    for horizon in HORIZONS:
        for share, q in enumerate(QUANTILES):
            counts[f"demand_{horizon}_{q}_blocks"] = 80_000 + 10 * horizon * share
    counts["demand_step"] = counts["steps_total"] - dice.randrange(16)
    return StepRecord(int(counts["steps_total"]), tuple(counts.values()), INDEX)


def demand_ms() -> float:
    """CPU time of one `demand` over 256 running requests, at its best: what a scan costs in the engine."""
    dice = random.Random(1)
    lengths = LengthPredictor(8192)
    tenants = [f"tenant-{number}" for number in range(8)]
    for number in range(2_000):
        lengths.observe(dice.randrange(1, 4000), tenants[number % len(tenants)])
    running = [(dice.randrange(4000), dice.randrange(2000), dice.choice(tenants)) for _ in range(RUNNING)]
    best_ns = 10**12
    for _ in range(20):
        began_ns = time.thread_time_ns()
        lengths.demand(running, 16)
        best_ns = min(best_ns, time.thread_time_ns() - began_ns)
    return best_ns / 1e6


def tools(arguments: argparse.Namespace) -> Part:
    """Seconds from nothing to an answer of `kvpilot check` and `kvpilot test`."""
    repeats = 3 if arguments.quick else 9
    bars = [
        median_bar("check_cold_s", [cold_s("check") for _ in range(repeats)], at_most=1),
        median_bar("test_cold_s", [cold_s("test") for _ in range(repeats)], at_most=3),
    ]
    return {"shipped_policies": len(list(SHIPPED.glob("*.yaml")))}, {}, bars


def cold_s(command: str) -> float:
    began_ns = time.perf_counter_ns()
    line = [sys.executable, "-m", "kvpilot", command, str(SHIPPED)]
    subprocess.run(line, check=True, capture_output=True)
    return (time.perf_counter_ns() - began_ns) / NS


PARTS: tuple[Callable[[argparse.Namespace], Part], ...] = (decide, forecast, tools)


def measure(arguments: argparse.Namespace) -> Part:
    settings, results, bars = dict[str, Any](), dict[str, Any](), list[Bar]()
    for part in PARTS:
        one = part(arguments)
        settings |= one[0]
        results |= one[1]
        bars += one[2]
    return settings, results, bars


if __name__ == "__main__":
    run("policy_tick", 1, measure, __doc__ or "")
