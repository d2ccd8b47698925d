"""Many legs of the suite over all cores: each a plain value that a process can be given, each a row back.

A process makes a workload's arrivals once and flies the legs of it that come its way.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kvpilot.simulate.legs import fly_leg
from kvpilot.simulate.stability import reversals
from kvpilot.simulate.staging import Stage, leg, stage
from kvpilot.simulate.suite import Entry, Setting, Settings

KEPT_STAGES = 4


@dataclass(frozen=True, slots=True)
class Order:
    """One leg to fly: a workload with a seed, a setting, and policies if the pilot flies from there."""

    entry: Entry
    seed: int
    setting: Setting
    policies: Path | None = None

    @property
    def name(self) -> str:
        return "pilot" if self.policies is not None else self.setting.name


@dataclass(frozen=True, slots=True)
class Row:
    """What became of an order. `goodput` is work-weighted, in 0..1."""

    workload: str
    seed: int
    leg: str
    score: dict[str, Any]
    reversals_per_min: float
    actions_per_min: float

    @property
    def goodput(self) -> float:
        return float(self.score["goodput_work"] or 0.0)


@dataclass(frozen=True, slots=True)
class Field:
    """Where all orders of a sweep are flown."""

    settings: Settings
    traces: Path | None


def fly_all(
    field: Field,
    orders: Sequence[Order],
    workers: int | None = None,
    told: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Rows in the orders' order. `told` hears of each as it lands. One worker flies in this process."""
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        return [_told(told, fly(field, order)) for order in orders]
    rows: dict[int, Row] = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), _settle, (field,)) as pool:
        # Orders of one workload go out together, so that a process keeps its arrivals.
        flying = {pool.submit(_fly_settled, order): number for number, order in enumerate(orders)}
        for landed in as_completed(flying):
            rows[flying[landed]] = _told(told, landed.result())
    return [rows[number] for number in range(len(orders))]


def _told(told: Callable[[Row], None], row: Row) -> Row:
    told(row)
    return row


_FIELD: list[Field] = []
"""Of a worker: what every order needs is sent once."""


def _settle(field: Field) -> None:
    _FIELD[:] = [field]


def _fly_settled(order: Order) -> Row:
    return fly(_FIELD[0], order)


def fly(field: Field, order: Order) -> Row:
    """One order, here. Raises TraceAbsent, TraceError, PolicyErrors, kvengine's ConfigError."""
    staged = _stage(field, order)
    flown = fly_leg(
        staged.scene, leg(order.setting, order.name, order.policies), staged.arrivals, staged.window_s
    )
    minutes = flown.virtual_s / 60
    back = reversals(flown.flown.leases, flown.ranges) if flown.flown else 0
    return Row(
        order.entry.name,
        order.seed,
        order.name,
        flown.score.as_dict(),
        back / minutes,
        flown.score.actions / minutes,
    )


_STAGES: dict[tuple[str, int], Stage] = {}
"""Of this process, oldest first, a few."""


def _stage(field: Field, order: Order) -> Stage:
    key = (order.entry.name, order.seed)
    found = _STAGES.get(key)
    if found is None or (found.entry is not order.entry and found.entry != order.entry):
        found = stage(field.settings, order.entry, order.seed, field.traces)
        _STAGES.pop(key, None)
        while len(_STAGES) >= KEPT_STAGES:
            del _STAGES[next(iter(_STAGES))]
        _STAGES[key] = found
    return found
