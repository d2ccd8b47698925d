"""Many replicas behind a balancer, over processes, with one stream of arrivals.

Where the balancer looks at how full replicas are, all fly together from scrape to scrape: at each it learns
their occupancies, and sends the requests of the time until the next with what it knows then. Where it does
not look, they fly on their own to the end. What becomes of a fleet depends on its arrivals, its balancer and
its replicas' numbers, not on the processes.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from statistics import fmean
from typing import Any, TypeVar

from kvpilot.simulate.balancers import Balancer, balancer_named
from kvpilot.simulate.legs import Leg, Scene
from kvpilot.simulate.squad import Landed, advance_here, as_row, land_here, muster, muster_here
from kvpilot.workload.arrival import Arrival

SCRAPE_S = 1.0
T = TypeVar("T")
_SUMMED = (
    *("offered", "finished", "shed", "failed", "abandoned", "unfinished", "good"),
    *("oom", "preemptions", "recomputed_tokens", "tokens_per_s", "goodput_rps", "actions"),
)


@dataclass(frozen=True, slots=True)
class Fleet:
    """How many, behind what, over how many processes; None: one a core."""

    replicas: int
    balancer: str = "round_robin"
    processes: int | None = None
    scrape_s: float = SCRAPE_S

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"--replicas {self.replicas}: must be at least 1")
        if not self.scrape_s > 0:
            raise ValueError(f"scrape_s={self.scrape_s:g}: must be above 0")

    @property
    def crews(self) -> list[range]:
        """Numbers of the replicas of each process."""
        processes = min(self.replicas, self.processes or os.cpu_count() or 1)
        return [range(first, self.replicas, processes) for first in range(processes)]


@dataclass(frozen=True, slots=True)
class FleetResult:
    """What became of a fleet's leg."""

    leg: Leg
    fleet: Fleet
    landed: Sequence[Landed] = field(repr=False)
    """In order of their numbers."""
    uss_bytes: int | None
    """What all processes held for the replicas when the last request had come."""

    @property
    def goodput_work(self) -> float | None:
        """Of all replicas' work."""
        work = sum(each.work for each in self.landed)
        good = sum(each.work * (each.score.goodput_work or 0.0) for each in self.landed)
        return good / work if work else None

    @property
    def reversals_per_min(self) -> float:
        """Of the replica with the most."""
        return max(each.reversals / each.virtual_s * 60 for each in self.landed)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: sums over the fleet, how replicas differ, and each of them."""
        scores = [each.score for each in self.landed]
        shares = [each.goodput_work for each in scores if each.goodput_work is not None]
        tails = [each.ttft_p95_s for each in scores if each.ttft_p95_s is not None]
        fullest = [each.kv_occupancy_max for each in scores if each.kv_occupancy_max is not None]
        offered = [each.offered for each in scores]
        return {
            "name": self.leg.name,
            "settings": dict(self.leg.settings),
            "piloted": self.leg.policies is not None,
            "replicas": self.fleet.replicas,
            "balancer": self.fleet.balancer,
            **{name: sum(getattr(each, name) for each in scores) for name in _SUMMED},
            "goodput_work": self.goodput_work,
            "goodput_work_mean": fmean(shares) if shares else None,
            "goodput_work_worst": min(shares, default=None),
            "goodput_work_best": max(shares, default=None),
            "ttft_p95_s_mean": fmean(tails) if tails else None,
            "ttft_p95_s_worst": max(tails, default=None),
            "kv_occupancy_max_least": min(fullest, default=None),
            "kv_occupancy_max_most": max(fullest, default=None),
            "offered_least": min(offered),
            "offered_most": max(offered),
            "reversals_per_min_worst": self.reversals_per_min,
            "steps": sum(each.steps for each in self.landed),
            "each": [as_row(each) for each in self.landed],
        }


def fly_fleet(
    scene: Scene, leg: Leg, arrivals: Sequence[Arrival], window_s: float, fleet: Fleet
) -> FleetResult:
    """Fly one leg: `arrivals`, in order of time, over the whole fleet. One process is this one.

    Raises PolicyErrors and ConfigError as `fly_leg` does, ValueError for a balancer that is none.
    """
    deployment = scene.deployment
    balancer = balancer_named(fleet.balancer, fleet.replicas, deployment.pool_tokens)
    crews = fleet.crews
    last_s = arrivals[-1].at_s if arrivals else 0.0
    epoch_s = fleet.scrape_s if balancer.needs_scrapes else max(window_s, last_s)
    with ExitStack() as stack:
        hands = _hands(scene, leg, crews, stack)
        for until_s, asked in _epochs(arrivals, max(window_s, last_s), epoch_s):
            sent = _sent(balancer, asked, fleet.replicas)
            flying = [
                (crew, hand.advance([sent[number] for number in crew], until_s))
                for crew, hand in zip(crews, hands, strict=True)
            ]
            occupancies = [0.0] * fleet.replicas
            for crew, told in flying:
                for number, occupancy in zip(crew, told.result(), strict=True):
                    occupancies[number] = occupancy
            balancer.scraped(occupancies)
        ended = [hand.land(last_s + scene.drain_s, window_s) for hand in hands]
        landed = [one for answer in ended for one in answer.result()[0]]
        held = [answer.result()[1] for answer in ended]
    known = [each for each in held if each is not None]
    uss = sum(known) if len(known) == len(held) else None
    return FleetResult(leg, fleet, sorted(landed, key=lambda each: each.number), uss)


def _epochs(
    arrivals: Sequence[Arrival], end_s: float, epoch_s: float
) -> Iterator[tuple[float, list[Arrival]]]:
    """(end, arrivals until then), until nothing more comes."""
    begin, number, until_s = 0, 0, 0.0
    while until_s < end_s:
        number += 1
        until_s = min(number * epoch_s, end_s)
        end = begin
        while end < len(arrivals) and arrivals[end].at_s <= until_s:
            end += 1
        yield until_s, list(arrivals[begin:end])
        begin = end


def _sent(balancer: Balancer, arrivals: Sequence[Arrival], replicas: int) -> list[list[Arrival]]:
    """Arrivals by replica, each with exactly one of them."""
    sent: list[list[Arrival]] = [[] for _ in range(replicas)]
    for arrival in arrivals:
        sent[balancer.choose(arrival)].append(arrival)
    return sent


class _Away:
    """A squad in a process of its own."""

    def __init__(self, scene: Scene, leg: Leg, crew: range, stack: ExitStack) -> None:
        self._pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
        self.mustered = self._pool.submit(muster_here, scene, leg, crew)

    def advance(self, offered: Sequence[Sequence[Arrival]], until_s: float) -> "Future[list[float]]":
        return self._pool.submit(advance_here, offered, until_s)

    def land(self, until_s: float, window_s: float) -> "Future[tuple[list[Landed], int | None]]":
        return self._pool.submit(land_here, until_s, window_s)


class _Here:
    """A squad in this process."""

    def __init__(self, scene: Scene, leg: Leg, crew: range) -> None:
        self._scene = scene
        self._squad = muster(scene, leg, crew)

    def advance(self, offered: Sequence[Sequence[Arrival]], until_s: float) -> "Future[list[float]]":
        return _done(self._squad.advance(offered, until_s))

    def land(self, until_s: float, window_s: float) -> "Future[tuple[list[Landed], int | None]]":
        held = self._squad.uss_bytes
        return _done((self._squad.land(self._scene, until_s, window_s), held))


def _hands(scene: Scene, leg: Leg, crews: Sequence[range], stack: ExitStack) -> Sequence[_Away | _Here]:
    if len(crews) == 1:
        return [_Here(scene, leg, crews[0])]
    away = [_Away(scene, leg, crew, stack) for crew in crews]
    for each in away:
        each.mustered.result()
    return away


def _done(value: T) -> "Future[T]":
    future: Future[T] = Future()
    future.set_result(value)
    return future
