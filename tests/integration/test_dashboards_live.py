"""Every query of every committed dashboard, over a real Prometheus that scrapes a live engine and pilot.

The GPU is a recorded one, at NVML's boundary. Nothing may be NaN, and only what the load may or may not bring
about (a change that was judged, say) may be empty.
"""

import asyncio
import contextlib
from pathlib import Path

import pytest

from kvboards import check
from kvboards.generate import BOARDS
from kvboards.lab import Lab, flying
from kvpilot.clock import NS

MOST_S, LOAD = 60.0, 1.2
LOOK_EVERY_S = 5.0
"""A slow machine needs longer until every class and tenant was served; most need one look."""


async def fly(folder: Path) -> dict[str, list[str]]:
    async with flying(folder) as lab:
        begin_s = lab.clock.wall_ns() / NS
        driving = asyncio.create_task(lab.drive(lab.arrivals(MOST_S, LOAD)))
        said = {"load": ["none"]}
        while any(said.values()) and not driving.done():
            await lab.clock.sleep_until(lab.clock.monotonic_ns() + round(LOOK_EVERY_S * NS))
            end_s = lab.clock.wall_ns() / NS
            said = {board.name: await check.verdict(lab, board, begin_s, end_s) for board in BOARDS}
        said["that can fail"] = await spoilt(lab, end_s)
        said["rules"] = await unhealthy(lab)
        driving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await driving
        return said


async def spoilt(lab: Lab, end_s: float) -> list[str]:
    """Three queries that are wrong in the three ways that must be noticed."""
    wrong = {
        "no data": check.Target("x", "x", "A", "kvpilot_no_such_metric", "", (), "", "", False),
        "no label 'klass'": check.Target(
            "x", "x", "A", "kvpilot_offered_total", "{{klass}}", (), "", "", False
        ),
        "not a number": check.Target("x", "x", "A", "0 * kvpilot_steps_total / 0", "", (), "", "", False),
    }
    missed = []
    for sign, target in wrong.items():
        answer = await lab.query("query_range", query=target.expr, start=end_s - 2, end=end_s, step=1)
        if not any(sign in fault for fault in check.faults(target, answer)):
            missed.append(f"{target.expr} passed")
    return missed


async def unhealthy(lab: Lab) -> list[str]:
    """Rules that Prometheus cannot evaluate over real series."""
    groups = (await lab.query("rules"))["data"]["groups"]
    return [
        f"{rule['name']}: {rule['lastError']}"
        for group in groups
        for rule in group["rules"]
        if rule["health"] == "err"
    ]


@pytest.mark.needs_program("prometheus")
def test_every_panel_shows_what_it_says_over_a_live_engine(tmp_path: Path) -> None:
    said = asyncio.run(asyncio.wait_for(fly(tmp_path), timeout=110))
    faults = [fault for found in said.values() for fault in found]
    assert not faults, "\n".join(faults)
