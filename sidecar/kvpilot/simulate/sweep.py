"""Many legs over all cores: each an order that a process can be given, each a row back.

A process makes a ground's arrivals once and flies the legs over it that come its way.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Protocol

from kvpilot.simulate.legs import Leg, Scene, fly_leg
from kvpilot.simulate.stability import reversals
from kvpilot.simulate.watch import Seen, Watch
from kvpilot.workload.arrival import Arrival

KEPT_STAGES = 4


class Stage(Protocol):
    """What legs are flown over: a machine with its promises, and what arrives there."""

    @property
    def scene(self) -> Scene: ...
    @property
    def arrivals(self) -> Sequence[Arrival]: ...
    @property
    def window_s(self) -> float: ...


class Ground(Protocol):
    """A stage that is yet to be made: small, plain, compared by value, sent to processes."""

    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int: ...
    def stage(self) -> Stage:
        """Raises TraceAbsent, TraceError, PlantError, and kvengine's ConfigError."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """One leg to fly; `watched`: with what there is to see on the way, beside the score; `burst`: the (start,
    end) of one, in seconds of the run, for those who watch how long recovery takes.
    """

    ground: Ground
    leg: Leg
    watched: bool = False
    burst: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What became of an order. `goodput` is work-weighted, in 0..1."""

    workload: str
    seed: int
    leg: str
    score: dict[str, Any]
    reversals_per_min: float
    actions_per_min: float
    seen: Seen | None = None

    @property
    def goodput(self) -> float:
        return float(self.score["goodput_work"] or 0.0)


def fly_all(
    orders: Sequence[Order],
    workers: int | None = None,
    told: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Rows in the orders' order. `told` hears of each as it lands. One worker flies in this process."""
    workers = min(workers or os.cpu_count() or 1, max(1, len(orders)))
    if workers == 1:
        return [_told(told, fly(order)) for order in orders]
    rows: dict[int, Row] = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), _hush) as pool:
        # Orders of one ground go out together, so that a process keeps its arrivals.
        flying = {pool.submit(fly, order): number for number, order in enumerate(orders)}
        try:
            for landed in as_completed(flying):
                rows[flying[landed]] = _told(told, landed.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [rows[number] for number in range(len(orders))]


def _hush() -> None:
    """Of hundreds of pilots nobody reads what each says of its engine."""
    logging.disable(logging.WARNING)


def _told(told: Callable[[Row], None], row: Row) -> Row:
    told(row)
    return row


def fly(order: Order) -> Row:
    """One order, here. Raises what `Ground.stage` does, and PolicyErrors."""
    staged = _staged(order.ground)
    watch = Watch(order.burst) if order.watched else None
    flown = fly_leg(
        staged.scene,
        order.leg,
        staged.arrivals,
        staged.window_s,
        begun=(lambda replica: None) if watch is None else watch.begin,
    )
    minutes = flown.virtual_s / 60
    back = reversals(flown.flown.leases, flown.ranges) if flown.flown else 0
    return Row(
        order.ground.name,
        order.ground.seed,
        order.leg.name,
        flown.score.as_dict(),
        back / minutes,
        flown.score.actions / minutes,
        None if watch is None else watch.seen(flown, staged.scene, staged.window_s),
    )


_STAGES: list[tuple[Ground, Stage]] = []
"""Of this process, oldest first, a few."""


def _staged(ground: Ground) -> Stage:
    for known, made in _STAGES:
        if known == ground:
            return made
    made = ground.stage()
    del _STAGES[: max(0, len(_STAGES) - KEPT_STAGES + 1)]
    _STAGES.append((ground, made))
    return made
