"""From settings to what a leg flies: one workload of the suite on its machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvpilot.simulate.deployment import Promises
from kvpilot.simulate.legs import Leg, Scene, deployment_on
from kvpilot.simulate.plants.pace import Pace, pace
from kvpilot.simulate.replica import plain_prompt
from kvpilot.simulate.suite import CLASSES, Entry, Setting, Settings
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.prompt import token_ids


@dataclass(frozen=True, slots=True)
class Stage:
    """One workload, ready to fly. `leg` makes a leg of a setting."""

    entry: Entry
    scene: Scene
    arrivals: Sequence[Arrival]

    @property
    def window_s(self) -> float:
        return self.entry.workload.seconds


def machine_pace(settings: Settings) -> Pace:
    """Of the settings' machine, without noise. Raises kvengine's ConfigError for names that it lacks."""
    return pace(settings.machine.machine.plant())


def promises(settings: Settings, of: Pace, entry: Entry | None = None) -> Promises:
    """In seconds, on a machine of that pace; `entry` may have clients of its own."""
    clients = {**settings.clients, **(entry.clients if entry else {})}
    return Promises(
        {name: slo.on(of) for name, slo in settings.slos.items()},
        {name: client.patience for name, client in clients.items()},
        of.speed.r,
    )


def stage(settings: Settings, entry: Entry, seed: int, traces: Path | None = None) -> Stage:
    """Raises TraceAbsent, TraceError, and kvengine's ConfigError."""
    machine, of = settings.machine.machine, machine_pace(settings)
    arrivals = entry.workload.arrivals(seed, of.speed, traces)
    shared = any(one.prefix for one in arrivals)
    deployment = deployment_on(machine, classes=CLASSES, prefix_cache=shared)
    if entry.kv_tokens is not None:
        deployment = deployment_on(
            machine,
            classes=CLASSES,
            prefix_cache=shared,
            blocks=entry.kv_tokens // machine.block_size,
        )
    scene = Scene(
        deployment,
        partial(machine.plant, settings.machine.noise, seed=seed),
        promises(settings, of, entry),
        (entry.acceptance or settings.acceptance).process,
        prompt=token_ids if shared else plain_prompt,
        drain_s=settings.budget.drain_s,
    )
    return Stage(entry, scene, arrivals)


def leg(setting: Setting, name: str | None = None, policies: Path | None = None) -> Leg:
    """A setting as a leg; with `policies`, the pilot flies from there."""
    return Leg(name or setting.name, setting.engine, policies)
