"""Legs: the same arrivals over the same machine, with another hand on the knobs each time.

A `Scene` is all that legs share, a `Leg` what sets one apart. Both are plain values that another process can
be given; policies are named by their paths and read where they fly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvpilot.clock import VirtualClock
from kvpilot.policy.rules import PolicySet
from kvpilot.policy_directory import PolicyDirectory
from kvpilot.recordings.recorder import Kept, Rolling
from kvpilot.score import Score, score
from kvpilot.simulate.cockpit import Flown
from kvpilot.simulate.deployment import USUAL_PROMISES, Deployment, Promises
from kvpilot.simulate.faults import Fault
from kvpilot.simulate.plants.acceptance import Acceptance, Fixed
from kvpilot.simulate.plants.named import Machine
from kvpilot.simulate.plants.plant import Plant
from kvpilot.simulate.replica import Replica, plain_prompt
from kvpilot.simulate.stability import Range
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.outcome import Outcome

DRAIN_S = 60.0
RECORDED = Kept(1 << 30, 86_400.0)
"""Of a simulated flight that somebody asks to be recorded."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What every leg of a comparison has in common. `plant` makes a new one for each leg, all alike; with
    `seed=`, one with dice of its own.
    """

    deployment: Deployment
    plant: Callable[..., Plant]
    promises: Promises = USUAL_PROMISES
    acceptance: Acceptance = field(default_factory=lambda: Fixed(0.7))
    prompt: Callable[[Arrival], list[int]] = plain_prompt
    faults: tuple[Fault, ...] = ()
    drain_s: float = DRAIN_S


@dataclass(frozen=True, slots=True)
class Leg:
    """`settings` are fields of `Deployment` that differ from the scene's; `policies` is a directory of them,
    or None where nobody flies. `hands_off`: a pilot without policies, that looks and forecasts.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    policies: Path | None = None
    hands_off: bool = False
    record: Path | None = None
    """A directory in which its flight is recorded, for `kvpilot replay`; needs a pilot."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a leg."""

    leg: Leg
    score: Score
    outcomes: Sequence[Outcome]
    steps: int
    virtual_s: float
    flown: Flown | None
    """What its pilot did; None without one."""
    ranges: Mapping[str, Range]
    """Of the engine's knobs; empty without a pilot."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: name, settings and score, without the requests."""
        return {
            "name": self.leg.name,
            "settings": dict(self.leg.settings),
            "piloted": self.flown is not None,
            "steps": self.steps,
            "virtual_s": self.virtual_s,
            **self.score.as_dict(),
        }


def fly_leg(
    scene: Scene,
    leg: Leg,
    arrivals: Sequence[Arrival],
    window_s: float,
    begun: Callable[[Replica], None] = lambda replica: None,
) -> Result:
    """Fly one leg and score the arrivals of `window_s`. `begun` is given the replica before anybody comes.
    Raises PolicyErrors for policies that cannot fly.
    """
    deployment = replace(scene.deployment, **leg.settings)
    policies = None if leg.policies is None else load_policies(leg.policies, deployment.classes)
    if leg.hands_off:
        policies = PolicySet(())
    rolling = None if leg.record is None else _rolling(leg.record, deployment, scene.promises)
    replica = Replica(
        *(deployment, scene.plant(), scene.promises, policies, scene.acceptance, scene.prompt),
        faults=scene.faults,
        record=None if rolling is None else rolling.add,
    )
    begun(replica)
    outcomes = replica.fly(arrivals, scene.drain_s)
    if rolling is not None:
        rolling.flush(replica.clock.monotonic_ns())
        rolling.close_file()
    judged = score(
        outcomes, scene.promises.slos, scene.promises.r, (0.0, window_s), replica.totals, replica.actions
    )
    steps: int = replica.engine.core.totals.steps
    flown = replica.cockpit.flown if replica.cockpit is not None else None
    return Result(leg, judged, outcomes, steps, replica.now_s, flown, replica.knob_ranges)


def _rolling(directory: Path, deployment: Deployment, promises: Promises) -> Rolling:
    slos = ((name, promises.slos[name]) for name in deployment.classes)
    made = [[name, slo.ttft_s, slo.itl_s, slo.ttft_s_per_prompt_token] for name, slo in slos]
    return Rolling(directory, {"engine": deployment.name, "promises": made}, RECORDED)


def load_policies(directory: Path, classes: Sequence[str]) -> PolicySet:
    """As the pilot loads them. Raises PolicyErrors."""
    return PolicyDirectory(directory, classes, VirtualClock()).load()


def deployment_on(machine: Machine, **changes: Any) -> Deployment:
    """The engine that this machine would run: its memory as the planner divides it. Raises kvengine's
    ConfigError.
    """
    from kvpilot.simulate.plants.named import model_named

    memory, shape = machine.memory(), model_named(machine.model)
    token_bytes = shape.activation_bytes(1_025, 1, shape.compute_dtype, machine.tp)
    token_bytes -= shape.activation_bytes(1, 1, shape.compute_dtype, machine.tp)
    sizes = {
        "name": machine.model,
        "blocks": memory.plan.blocks,
        "block_size": machine.block_size,
        "max_model_len": shape.max_positions,
        "step_token_budget": machine.chunk_tokens,
        "prefill_chunk_tokens": machine.chunk_tokens,
        "max_running": machine.max_running,
        "memory_bytes": memory.plan.memory_bytes,
        "block_bytes": memory.plan.block_bytes,
        "activation_bytes_per_token": token_bytes // 1_024,
        "headroom_bytes": memory.plan.headroom_bytes,
    }
    return Deployment(**{**sizes, **changes})
