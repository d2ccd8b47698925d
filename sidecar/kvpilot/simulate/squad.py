"""Some replicas of a fleet, in one process: given requests and a time to fly to, they say how full they are.

A replica knows nothing of the others. Each has a plant with dice of its own, by its number in the fleet, so
that the same fleet flies the same way over however many processes.
"""

import gc
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvpilot.score import Score, score
from kvpilot.simulate.legs import Leg, Scene, load_policies
from kvpilot.simulate.replica import Replica
from kvpilot.simulate.stability import reversals
from kvpilot.workload.arrival import Arrival

PLANT_SEEDS = 100_003
"""Apart, so that a replica's dice are not another fleet's next replica's."""
COLLECT_AFTER = 100_000
"""Objects that come to be between two looks of the garbage collector: it finds hardly any."""


@dataclass(frozen=True, slots=True)
class Landed:
    """What became of one replica. `work` is what its arrivals asked for, in prompt tokens."""

    number: int
    score: Score
    work: float
    steps: int
    virtual_s: float
    reversals: int


@dataclass(frozen=True, slots=True)
class Squad:
    """The replicas of one process, and what it held before there were any."""

    numbers: Sequence[int]
    replicas: Sequence[Replica]
    uss_before: int | None

    def advance(self, offered: Sequence[Sequence[Arrival]], until_s: float) -> list[float]:
        """Arrivals of each replica, in order of time, none later than `until_s`, which all of them fly to.
        The KV occupancy of each then.
        """
        for replica, arrivals in zip(self.replicas, offered, strict=True):
            for arrival in arrivals:
                # One ahead of time is enough.
                replica.fly_to(arrival.at_s - 0.1)
                replica.offer(arrival)
            replica.fly_to(until_s)
        return [_occupancy(replica) for replica in self.replicas]

    def land(self, scene: Scene, until_s: float, window_s: float) -> "list[Landed]":
        """Drain, end, judge."""
        return [
            _landed(number, replica, scene, until_s, window_s)
            for number, replica in zip(self.numbers, self.replicas, strict=True)
        ]

    @property
    def uss_bytes(self) -> int | None:
        """What the process holds for its replicas and nobody shares; None where the system does not say."""
        now = _uss()
        return None if now is None or self.uss_before is None else now - self.uss_before


def muster(scene: Scene, leg: Leg, numbers: Sequence[int]) -> Squad:
    """Raises PolicyErrors for policies that cannot fly, kvengine's ConfigError for engines that cannot."""
    deployment = replace(scene.deployment, **leg.settings)
    policies = None if leg.policies is None else load_policies(leg.policies, deployment.classes)
    gc.collect()
    before = _uss()
    replicas = [
        Replica(
            *(deployment, scene.plant(seed=PLANT_SEEDS + number), scene.promises, policies),
            *(scene.acceptance, scene.prompt, scene.faults),
            journalled=False,
        )
        for number in numbers
    ]
    return Squad(numbers, replicas, before)


def _landed(number: int, replica: Replica, scene: Scene, until_s: float, window_s: float) -> Landed:
    replica.drain(until_s)
    outcomes = replica.land()
    promises = scene.promises
    judged = score(outcomes, promises.slos, promises.r, (0.0, window_s), replica.totals, replica.actions)
    work = sum(one.arrival.work(promises.r) for one in outcomes if one.arrival.at_s < window_s)
    steps: int = replica.engine.core.totals.steps
    back = reversals(replica.cockpit.flown.leases, replica.knob_ranges) if replica.cockpit else 0
    return Landed(number, judged, work, steps, replica.now_s, back)


def _occupancy(replica: Replica) -> float:
    pool = replica.engine.core.scheduler.pool
    held: int = pool.referenced
    return held / replica.deployment.blocks


def _uss() -> int | None:
    """Bytes of this process alone."""
    try:
        text = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        return None
    return sum(int(kib) * 1024 for kib in re.findall(r"^Private_(?:Clean|Dirty): *(\d+) kB", text, re.M))


# In a process of its own

_HERE: list[tuple[Scene, Squad]] = []


def muster_here(scene: Scene, leg: Leg, numbers: Sequence[int]) -> None:
    """This process's squad, from here on."""
    _HERE[:] = [(scene, muster(scene, leg, numbers))]
    # Replicas are many small objects that live to the end: no use to look through them again and again.
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 20, 100)


def advance_here(offered: Sequence[Sequence[Arrival]], until_s: float) -> list[float]:
    return _HERE[0][1].advance(offered, until_s)


def land_here(until_s: float, window_s: float) -> tuple[list[Landed], int | None]:
    """And what the process held at the end of the flight, in bytes, for its replicas."""
    scene, squad = _HERE[0]
    held = squad.uss_bytes
    return squad.land(scene, until_s, window_s), held


def as_row(landed: Landed) -> dict[str, Any]:
    """One replica for `--json`: its number, and its score without its tenants."""
    said = landed.score.as_dict()
    for name in ("tenants", "slo"):
        del said[name]
    return {"replica": landed.number, **said}
