"""What somebody asks to be simulated, made into arrivals and a scene: traces by file, scenarios by name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from kvpilot.simulate.deployment import USUAL_PROMISES
from kvpilot.simulate.legs import Leg, Scene, deployment_on
from kvpilot.simulate.plants.fitted import Fitted, read
from kvpilot.simulate.plants.named import Machine
from kvpilot.simulate.plants.pace import pace
from kvpilot.simulate.replica import plain_prompt
from kvpilot.simulate.scenarios import Scenario
from kvpilot.simulate.staging import leg, promises
from kvpilot.simulate.suite import CLASSES, Settings
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.formats import parse_slice, read_trace
from kvpilot.workload.prompt import token_ids
from kvpilot.workload.trace import TraceError, arrivals, oversized, spliced

NOISE = 0.05


@dataclass(frozen=True, slots=True)
class Asked:
    """`oversized`: requests that this engine refuses, longer than the model or the pool. `left_out`: what of
    a scenario is not simulated.
    """

    name: str
    scene: Scene
    legs: tuple[Leg, ...]
    arrivals: Sequence[Arrival]
    window_s: float
    left_out: tuple[str, ...] = ()

    @property
    def oversized(self) -> int:
        deployment = self.scene.deployment
        return oversized(self.arrivals, deployment.max_model_len, deployment.pool_tokens)


def of_traces(
    paths: Sequence[Path],
    machine: Machine,
    policies: Path,
    slice_: str | None,
    seconds: float,
    speed: float,
    seed: int,
    drafts: int = 0,
    plant: Path | None = None,
) -> Asked:
    """Traces one after another: of each the slice, or its first `seconds`, played `speed` times as fast.

    Raises TraceError, PlantError, kvengine's ConfigError.
    """
    if not (seconds > 0 and speed > 0):
        raise TraceError(f"--seconds {seconds:g}, --speed {speed:g}: both must be above 0")
    start_s, end_s = (0.0, seconds) if slice_ is None else parse_slice(slice_)
    parts = [read_trace(path, start_s, end_s, speed, seed) for path in paths]
    trace = spliced(parts)
    offered = arrivals(trace, seed)
    window_s = max(trace.rows[-1].at_s + 1e-9, len(parts) * ((end_s or 0.0) - start_s) / speed)
    shared = any(one.prefix for one in offered)
    scene = Scene(
        deployment_on(machine, speculative_tokens=drafts, prefix_cache=shared),
        partial(machine.plant, NOISE, seed=seed)
        if plant is None
        else partial(Fitted, read(plant), seed=seed),
        USUAL_PROMISES,
        prompt=token_ids if shared else plain_prompt,
    )
    legs = (Leg("defaults"), Leg("pilot", policies=policies))
    return Asked(trace.name, scene, legs, offered, window_s)


def of_scenario(scenario: Scenario, machine: Machine, policies: Path, settings: Settings, seed: int) -> Asked:
    """On this machine, with the suite's promises, defaults and pilot's setting. Raises ConfigError."""
    score_bytes = sum(fault.value for fault in scenario.faults if fault.kind == "score_memory")
    of = pace(machine.plant())
    offered = scenario.workload.arrivals(seed, of.speed)
    shared = any(one.prefix for one in offered)
    deployment = deployment_on(machine, classes=CLASSES, prefix_cache=shared)
    if scenario.kv_tokens is not None:
        deployment = replace(deployment, blocks=scenario.kv_tokens // machine.block_size)
    made = promises(settings, of)
    if scenario.answer_s is not None:
        patience = {name: replace(each, answer_s=scenario.answer_s) for name, each in made.patience.items()}
        made = replace(made, patience=patience)
    scene = Scene(
        deployment,
        partial(machine.plant, settings.machine.noise, seed=seed, score_bytes=score_bytes),
        made,
        scenario.acceptance or settings.acceptance.process,
        token_ids if shared else plain_prompt,
        scenario.faults,
        settings.budget.drain_s,
    )
    flown = leg(settings.pilot, "pilot", policies)
    legs = (
        leg(settings.defaults, "defaults"),
        replace(flown, settings={**flown.settings, **scenario.engine}),
    )
    left_out = (f"{scenario.ranks} ranks",) if scenario.ranks > 1 else ()
    return Asked(scenario.name, scene, legs, offered, scenario.workload.seconds, left_out)
