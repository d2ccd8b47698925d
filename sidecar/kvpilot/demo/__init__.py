"""`kvpilot demo`: a real engine, a real bursty load, with and without the pilot, in about two minutes.

One engine process flies the same arrivals leg after leg: its own defaults, four static settings that a
careful operator might have chosen, and the pilot. The scoreboard says what came of it; `--json` gives it as
one object.
"""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from kvpilot.clock import SystemClock
from kvpilot.demo.flight import Flight
from kvpilot.demo.processes import DemoError
from kvpilot.demo.screen import Screen, fail, scoreboard
from kvpilot.demo.settings import LEGS, SCENARIOS, Leg, ScenarioName
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.azure import TraceError, read_azure, scale
from kvpilot.workload.generator import generate

SECONDS = 15.0
TRACE_TOKENS = 1_600
"""Prompt plus output of a trace's request, at most: longer ones are scaled down to it."""


def main(
    seconds: float = SECONDS,
    seed: int = 1,
    scenario: ScenarioName = "burst",
    trace: Path | None = None,
    serve: bool = False,
    as_json: bool = False,
) -> None:
    """Run the demo. Exits with one line on stderr where it cannot."""
    if not seconds >= 5:
        fail(f"--seconds {seconds:g}: at least 5, or there is nothing to compare")
    try:
        asyncio.run(_demo(seconds, seed, scenario, trace, serve, as_json))
    except (DemoError, TraceError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


async def _demo(
    seconds: float, seed: int, scenario: ScenarioName, trace: Path | None, serve: bool, as_json: bool
) -> None:
    # Lazily: the rest of kvpilot does not know the engine.
    from kvengine.model.domains import prompt

    rows = None if trace is None else read_azure(trace)
    screen = Screen(as_json)
    with tempfile.TemporaryDirectory(prefix="kvpilot-demo-") as folder:
        flight = Flight(SCENARIOS[scenario], Path(folder), screen, SystemClock())
        screen.say(f"Scenario {scenario}: {SCENARIOS[scenario].summary}. Starting the engine ...")
        if seconds < SECONDS:
            screen.say(f"Legs of {seconds:g} s show little but the first reaction; try {SECONDS:g}.")
        try:
            await flight.start(prompt)
            arrivals = _arrivals(rows, seed, seconds, scenario, flight)
            _describe(screen, flight, arrivals)
            prompts = {one.seed: prompt(one.domain, one.prompt_tokens, one.seed) for one in arrivals}
            results = [(leg, await flight.fly(leg, arrivals, prompts, seconds)) for leg in LEGS]
            _report(screen, results, scenario, seed, as_json)
            if serve:
                screen.say(f"The engine goes on at {flight.url}/v1; stop with Ctrl-C.")
                await asyncio.Event().wait()
        finally:
            await flight.stop()


def _arrivals(rows: Any, seed: int, seconds: float, scenario: ScenarioName, flight: Flight) -> list[Arrival]:
    load, speed = SCENARIOS[scenario].load, flight.calibration.speed
    if rows is None:
        return generate(seed, seconds, load, speed)
    return scale(rows, seed, seconds, load, speed, TRACE_TOKENS)


def _describe(screen: Screen, flight: Flight, arrivals: list[Arrival]) -> None:
    speed, manifest = flight.calibration.speed, flight.instruments.manifest
    screen.say(
        f"This machine: {speed.prefill_tokens_per_s:,.0f} prompt tokens/s alone, "
        f"{speed.decode_tokens_per_s:,.0f} output tokens/s in a full batch. "
        f"KV: {manifest.blocks} blocks of {manifest.block_size} tokens. {len(arrivals)} requests a leg."
    )
    for name, slo in flight.slos.items():
        screen.say(
            f"  {name}: first token within {slo.ttft_s:.2f} s + {slo.ttft_s_per_prompt_token * 1000:.2f} ms "
            f"a prompt token, then a token every {slo.itl_s * 1000:.0f} ms"
        )


def _report(
    screen: Screen, results: list[tuple[Leg, dict[str, Any]]], scenario: str, seed: int, as_json: bool
) -> None:
    off = next(result for leg, result in results if leg.kind == "off")
    on = next(result for leg, result in results if leg.kind == "on")
    statics = [result for leg, result in results if leg.kind == "static"]
    static = max(statics, key=lambda result: result["goodput_work"] or 0.0)
    best = max((result for _, result in results), key=lambda result: result["goodput_work"] or 0.0)
    scoreboard(screen.console, [(leg.name, result) for leg, result in results], best["name"])
    screen.say(
        f"Good work done: pilot {on['goodput_work']:.3f}, engine defaults {off['goodput_work']:.3f}, "
        f"best static ({static['name']}) {static['goodput_work']:.3f}."
    )
    if as_json:
        print(
            json.dumps(
                {
                    "off": off,
                    "static": static,
                    "on": on,
                    "statics": statics,
                    "scenario": scenario,
                    "seed": seed,
                }
            )
        )
