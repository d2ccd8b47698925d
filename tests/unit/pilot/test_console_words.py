"""What console and `kvpilot top` say: the three answers, KV memory by tenant, and a frame in a terminal."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
from pilot_world import World, policy
from rich.console import Console
from test_publish import flight

from kvpilot.api.console.answers import answers
from kvpilot.api.console.frame import frame
from kvpilot.api.console.memory import MOST_LETTERS, MOST_TENANTS, memory
from kvpilot.api.console.terminal import render
from kvpilot.link.controls import Scope
from kvpilot.link.telemetry import TenantRow

SLO = {"batch": {"ttft": 1.0, "itl": 0.05}, "interactive": {"ttft": 0.5, "itl": 0.02}}
INF = "+Inf"


def calm(tmp_path: Path, **fields: float) -> dict[str, Any]:
    world = World(policy())
    world.start_engine()
    world.ticks(1, **{"waiting": 0, "running": 1, "kv_blocks_free": 40, **fields})
    return frame(flight(world, tmp_path))


def said(shown: dict[str, Any]) -> dict[str, Any]:
    return answers(shown, SLO)


def forecast(shown: dict[str, Any], p10: Any, p50: Any, p90: Any) -> None:
    for part, value in (("_p10", p10), ("", p50), ("_p90", p90)):
        shown["signals"][f"forecast.kv_exhaustion{part}_seconds"] = {"value": value}


def test_without_an_engine_nothing_is_claimed(tmp_path: Path) -> None:
    world = World()
    world.only_tick()
    told = frame(flight(world, tmp_path))["answers"]
    assert {answer["level"] for answer in told.values()} == {"quiet"}
    assert told["state"]["title"] == "No engine yet"


def test_a_promise_that_is_broken_comes_first_and_the_worst_before_others(tmp_path: Path) -> None:
    shown = calm(tmp_path)
    signals = shown["signals"]
    signals["itl_seconds"]["classes"] = {"batch": {"value": 0.06}, "interactive": {"value": 0.06}}
    told = said(shown)["state"]
    assert told["level"] == "bad"
    assert told["title"] == "ITL p95 of interactive is 60 ms, its target 20 ms"
    assert told["lines"][0].startswith("ITL p95 of batch")
    signals["itl_seconds"]["classes"] = {"batch": {"value": 0.05}, "interactive": {"missing": "no_samples"}}
    assert said(shown)["state"]["level"] != "bad", "at the target is kept, and missing is not late"


@pytest.mark.parametrize("state", ["dead", "stalled", "wedged"])
def test_an_engine_that_is_silent_is_bad_whatever_it_last_said(tmp_path: Path, state: str) -> None:
    shown = calm(tmp_path)
    shown["engine"]["state"] = state
    assert said(shown)["state"]["level"] == "bad"


def test_what_is_held_is_named_with_its_baseline_and_why(tmp_path: Path) -> None:
    told = calm(tmp_path, waiting=11)["answers"]["doing"]
    assert told["title"] == "Holds 1 knob away from baseline"
    assert told["level"] == "acts", "no cause for alarm by itself"
    (line,) = told["lines"]
    assert line.startswith("prefill_chunk_tokens 512 → 64")
    assert "guard/act" in line


def test_at_baseline_off_and_orders_are_told_apart(tmp_path: Path) -> None:
    world = World(policy())
    world.start_engine()
    world.ticks(1, waiting=0)
    shown = flight(world, tmp_path)
    assert frame(shown)["answers"]["doing"]["level"] == "good"
    limits = world.pilot.board.tick.context.knobs["speculative_tokens"]  # type: ignore[union-attr]
    world.pilot.orders.override("speculative_tokens", Scope(), 0, 600, "drafts miss", "ada", limits)
    world.ticks(0.2)
    told = frame(shown)["answers"]["doing"]
    assert told["title"] == "A person holds 1 knob"
    assert "drafts miss (ada)" in told["lines"][0]
    world.pilot.orders.turn(True, "maintenance", "ada")
    world.ticks(0.2)
    assert frame(shown)["answers"]["doing"]["title"] == "Off: nothing is moved"


@pytest.mark.parametrize(
    ("p10", "p50", "p90", "level", "words"),
    [
        (4.0, 12.0, 40.0, "bad", ("in 12 s", "between 4.0 s and 40 s")),
        (60.0, 200.0, INF, "caution", ("in 3 min", "may also last")),
        (0.2, 0.4, 0.9, "bad", ("within a second",)),
        (20.0, INF, INF, "caution", ("may run out in 20 s", "likelier it lasts")),
        (INF, INF, INF, "good", ("KV memory lasts",)),
    ],
)
def test_what_comes_next_has_its_interval(
    tmp_path: Path, p10: Any, p50: Any, p90: Any, level: str, words: tuple[str, ...]
) -> None:
    shown = calm(tmp_path)
    forecast(shown, p10, p50, p90)
    told = said(shown)["next"]
    assert told["level"] == level
    for word in words:
        assert word in " ".join([told["title"], *told["lines"]])


def test_a_forecast_that_is_missing_is_not_a_forecast(tmp_path: Path) -> None:
    shown = calm(tmp_path)
    shown["signals"]["forecast.kv_exhaustion_seconds"] = {"missing": "too_few_samples"}
    assert said(shown)["next"]["level"] == "quiet"


def test_memory_bounds_names_and_tenants_and_leaves_nothing_out(tmp_path: Path) -> None:
    world = World()
    world.start_engine()
    world.ticks(0.5, kv_blocks_free=10, kv_blocks_cached=5)
    rows = [TenantRow(f"t{i:03}", 1, 2, i, 0, 0) for i in range(40)]
    rows.append(TenantRow("\x1b[31m\u202e" + "x" * 500, 1, 0, 100, 0, 0))
    told = memory(world.sight(), rows)
    assert told["held"] + told["cached"] + told["free"] == told["blocks"]
    assert len(told["tenants"]) == MOST_TENANTS + 1
    assert sum(row["blocks"] for row in told["tenants"]) == sum(row.kv_blocks for row in rows)
    assert all(row["name"].isprintable() and len(row["name"]) <= MOST_LETTERS for row in told["tenants"])


def test_memory_that_is_not_reported_is_missing(tmp_path: Path) -> None:
    world = World()
    world.only_tick()
    assert "missing" in memory(world.sight(), ())


def text_of(shown: dict[str, Any], silent_s: float | None = None, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(render(shown, silent_s))
    return out.getvalue()


def test_top_shows_a_frame_at_a_glance(tmp_path: Path) -> None:
    told = text_of(calm(tmp_path, waiting=11))
    for words in ("lab", "Holds 1 knob", "60% held, 40% free", "prefill_chunk_tokens", "guard/act", "→ 64"):
        assert words in told, told


def test_top_says_that_a_pilot_has_gone_and_what_that_means(tmp_path: Path) -> None:
    shown = calm(tmp_path, waiting=11)
    assert "Leases run out in 12 s" in text_of(shown, silent_s=3.0)
    assert "have run out: baseline" in text_of(shown, silent_s=30.0)


def test_top_prints_no_control_character_of_a_name(tmp_path: Path) -> None:
    shown = copy.deepcopy(calm(tmp_path, waiting=11))
    shown["decisions"][0]["reason"] = "\x1b[2J[bold]gone"
    shown["alerts"] = [
        {"name": "n", "severity": "critical", "summary": "\x1b[2J", "description": "", "for_s": 1.0}
    ]
    shown["answers"] = said(shown)
    told = text_of(shown)
    assert "\x1b" not in told
    assert "[bold]gone" in told, "and takes no markup from it"


@pytest.mark.parametrize("width", [60, 200])
def test_top_fits_the_terminal(tmp_path: Path, width: int) -> None:
    assert max(len(line) for line in text_of(calm(tmp_path), width=width).splitlines()) <= width
