"""What somebody asks to be simulated, made into arrivals and a scene: traces by file, scenarios by name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from kvpilot.simulate.deployment import USUAL_PROMISES
from kvpilot.simulate.fleet import Fleet
from kvpilot.simulate.legs import Leg, Scene, deployment_on
from kvpilot.simulate.plants.fitted import Fitted, read
from kvpilot.simulate.plants.named import Machine
from kvpilot.simulate.plants.pace import pace
from kvpilot.simulate.replica import plain_prompt
from kvpilot.simulate.scenarios import Scenario
from kvpilot.simulate.staging import leg, promises
from kvpilot.simulate.suite import CLASSES, Settings
from kvpilot.workload.arrival import Arrival, Speed
from kvpilot.workload.formats import parse_slice, read_trace
from kvpilot.workload.prompt import token_ids
from kvpilot.workload.trace import TraceError, arrivals, oversized, spliced

NOISE = 0.05


@dataclass(frozen=True, slots=True)
class Asked:
    """`oversized`: requests that this engine refuses, longer than the model or the pool. A scenario may be of
    several ranks behind a balancer.
    """

    name: str
    scene: Scene
    legs: tuple[Leg, ...]
    arrivals: Sequence[Arrival]
    window_s: float
    ranks: int = 1
    balancer: str = "round_robin"

    def fleet(self, replicas: int | None, balancer: str | None, processes: int | None) -> Fleet | None:
        """As asked for, otherwise the scenario's ranks; None for one engine. Raises ValueError."""
        if replicas is None and self.ranks == 1:
            if balancer is not None or processes is not None:
                raise ValueError("--balancer and --processes are for a fleet: give --replicas N as well")
            return None
        return Fleet(self.ranks if replicas is None else replicas, balancer or self.balancer, processes)

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
    offered = scenario.workload.arrivals(seed, times(of.speed, scenario.ranks))
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
    seconds = scenario.workload.seconds
    return Asked(scenario.name, scene, legs, offered, seconds, scenario.ranks, scenario.balancer)


def times(speed: Speed, ranks: int) -> Speed:
    """Of so many machines together: a load is the share of all of them."""
    return Speed(ranks * speed.prefill_tokens_per_s, ranks * speed.decode_tokens_per_s)
