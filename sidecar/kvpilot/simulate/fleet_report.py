"""`kvpilot simulate --replicas N`: legs of a fleet side by side, for people and for programs."""

from collections.abc import Sequence
from typing import Any

from kvpilot.simulate.asked import Asked
from kvpilot.simulate.fleet import Fleet, FleetResult, fly_fleet

_SHOWN = (
    ("Gw", "goodput_work"),
    ("Gw, worst replica", "goodput_work_worst"),
    ("Gw, best replica", "goodput_work_best"),
    ("TTFT p95 s, mean", "ttft_p95_s_mean"),
    ("TTFT p95 s, worst", "ttft_p95_s_worst"),
    ("tokens/s", "tokens_per_s"),
    ("offered", "offered"),
    ("offered, least", "offered_least"),
    ("offered, most", "offered_most"),
    ("finished", "finished"),
    ("shed", "shed"),
    ("abandoned", "abandoned"),
    ("failed", "failed"),
    ("unfinished", "unfinished"),
    ("KV at most, least", "kv_occupancy_max_least"),
    ("KV at most, most", "kv_occupancy_max_most"),
    ("OOM", "oom"),
    ("preempted", "preemptions"),
    ("actions", "actions"),
)


def fly(asked: Asked, fleet: Fleet) -> list[FleetResult]:
    """Every leg, one after another, each over all processes. Raises as `fly_fleet`."""
    return [fly_fleet(asked.scene, leg, asked.arrivals, asked.window_s, fleet) for leg in asked.legs]


def as_dict(asked: Asked, results: Sequence[FleetResult]) -> dict[str, Any]:
    return {"oversized": asked.oversized, "legs": [result.as_dict() for result in results]}


def show(results: Sequence[FleetResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    fleet = results[0].fleet
    print(f"{fleet.replicas} replicas, {fleet.balancer}")
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for result in results:
        table.add_column(result.leg.name, justify="right")
    said = [result.as_dict() for result in results]
    for title, key in _SHOWN:
        table.add_row(title, *(_cell(each[key]) for each in said))
    Console().print(table)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
