"""What the outside sees: metrics that parse and leave out what is missing, status, health; read-only."""

import asyncio
import io
import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
from pilot_world import MemoryValve, World, policy
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from rich.console import Console

from kvpilot.alerts.outbox import Outbox
from kvpilot.api.http import HttpError, build_app, listen
from kvpilot.clock import NS
from kvpilot.flight import Flight
from kvpilot.journal.records import format_scope
from kvpilot.journal.store import JournalStore
from kvpilot.journal.writer import JournalWriter
from kvpilot.link.controls import Scope
from kvpilot.policy_directory import PolicyDirectory
from kvpilot.publish.buckets import distribution
from kvpilot.publish.families import metric_name
from kvpilot.publish.prometheus import MetricsPage
from kvpilot.publish.status import StatusPage, status
from kvpilot.publish.terminal import render
from kvpilot.signals import SIGNALS


def flight(world: World, folder: Path, rank: int = 0) -> Flight:
    return Flight(
        "lab",
        world.pilot,
        PolicyDirectory(folder, ["batch"], world.clock),
        Outbox({}, "http://pilot"),
        JournalWriter(JournalStore(folder / "journal.sqlite")),
        rank,
    )


def get(world: World, folder: Path, path: str, accept: str = "", method: str = "GET") -> httpx.Response:
    async def ask() -> httpx.Response:
        app = build_app(flight(world, folder), world.clock)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://pilot") as client:
            return await client.request(method, path, headers={"Accept": accept})

    return asyncio.run(ask())


def samples(world: World, folder: Path) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = get(world, folder, "/metrics").text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(({"engine": "lab", "rank": "0"} | labels).items())


@pytest.fixture
def flown() -> World:
    world = World(policy())
    world.start_engine()
    valve = MemoryValve(world)
    valve.writer.shed(0, "", 10)
    assert world.hook is not None
    for milliseconds in (4, 4, 40):
        world.hook.itl[1].record(milliseconds * 1_000_000)
    world.ticks(1, waiting=11, running=1, preemptions_total=7)
    return world


def test_metrics_show_signals_by_their_catalogue_names(flown: World, tmp_path: Path) -> None:
    found = samples(flown, tmp_path)
    assert found[key("kvpilot_preemptions_total", engine="lab")] == 7
    assert found[key("kvpilot_kv_used_ratio", engine="lab")] == 0
    assert found[key("kvpilot_shed_total", engine="lab", **{"class": "batch"})] == 1
    itl = {"engine": "lab", "class": "interactive"}
    assert found[key("kvpilot_inter_token_latency_seconds_count", **itl)] == 3
    assert found[key("kvpilot_inter_token_latency_seconds_bucket", le="0.005", **itl)] == 2
    assert found[key("kvpilot_inter_token_latency_seconds_sum", **itl)] == pytest.approx(0.048)


def test_metrics_show_what_the_pilot_does(flown: World, tmp_path: Path) -> None:
    found = samples(flown, tmp_path)
    knob = {"engine": "lab", "knob": "prefill_chunk_tokens"}
    assert found[key("kvpilot_knob_value", **knob)] == 64
    assert found[key("kvpilot_knob_baseline", **knob)] == 512
    assert found[key("kvpilot_lease_remaining_seconds", scope="all", **knob)] == 14.9
    assert found[key("kvpilot_rule_state", policy="guard", rule="act", state="active")] == 1
    assert found[key("kvpilot_engine_state", engine="lab", state="live")] == 1
    decided = {"policy": "guard", "rule": "act", "knob": "prefill_chunk_tokens", "verdict": "applied"}
    assert found[key("kvpilot_control_decisions_total", **decided)] == 1
    assert found[key("kvpilot_control_ticks_total")] == 10


def test_metrics_show_what_changes_did_beside_what_was_expected(tmp_path: Path) -> None:
    world = World(policy(rule="verify: {input: x, falls: 10%, within: 500ms}"))
    world.start_engine()
    whose = {"policy": "guard", "rule": "act"}
    for waiting, then, realised, came in ((20, 15, -0.25, 1), (20, 25, 0.25, 1)):
        world.ticks(2, waiting=0)
        world.ticks(0.3, waiting=waiting)
        world.ticks(1, waiting=then)
        found = samples(world, tmp_path)
        assert found[key("kvpilot_control_effect_expected_ratio", input="x", **whose)] == -0.1
        assert found[key("kvpilot_control_effect_realised_ratio", input="x", **whose)] == realised
        assert found[key("kvpilot_control_effects_total", outcome="came", **whose)] == came
    assert found[key("kvpilot_control_effects_total", outcome="did_not_come", **whose)] == 1


def test_a_missing_signal_is_absent_and_never_zero(flown: World, tmp_path: Path) -> None:
    names = {name for name, _ in samples(flown, tmp_path)}
    absent = ("oom", "kv_shared_blocks", "spec_acceptance_ratio")
    assert not {f"kvpilot_{name}" for name in absent} & names
    assert "kvpilot_oom_total" not in names
    valueless = World(policy())
    assert not {name for name, _ in samples(valueless, tmp_path) if "kv_" in name}


def test_the_page_is_valid_in_both_formats_with_a_meaning_for_each_metric(
    flown: World, tmp_path: Path
) -> None:
    answer = get(flown, tmp_path, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert all(family.documentation for family in parse(answer.text))
    answer = get(flown, tmp_path, "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = list(parse_openmetrics(answer.text))
    assert len({family.name for family in families}) == len(families)


def test_names_keep_the_rules() -> None:
    names = [metric_name(signal) for signal in SIGNALS.values()]
    assert len(set(names)) == len(names)
    for signal in SIGNALS.values():
        name = metric_name(signal)
        assert name.replace("_", "").isalnum()
        assert name.startswith("kvpilot_")
        assert not name.endswith("_total")
        if signal.unit in ("seconds", "bytes", "ratio"):
            assert name.endswith(f"_{signal.unit}")


def test_exported_buckets_hold_what_lies_below_them() -> None:
    from kvpilot.link.histogram import BUCKETS, HistogramSnapshot, bucket_index

    durations = [0.0004, 0.0022, 0.026, 0.048, 0.3, 7.0, 500.0]
    counts = [0] * BUCKETS
    for duration_s in durations:
        counts[bucket_index(round(duration_s * NS))] += 1
    exported = distribution(HistogramSnapshot(counts, 0))
    for bound, count in zip(exported.bounds, exported.counts, strict=False):
        assert count == sum(duration_s <= bound for duration_s in durations)
    assert exported.counts[-1] == len(durations)


def test_every_series_carries_engine_and_rank(flown: World, tmp_path: Path) -> None:
    page, _ = asyncio.run(MetricsPage(flight(flown, tmp_path, rank=3)).answer(""))
    labels = [sample.labels for family in parse(page.decode()) for sample in family.samples]
    assert len(labels) > 100
    assert all((each["engine"], each["rank"]) == ("lab", "3") for each in labels)
    assert all(dict(labels)["rank"] == "0" for _, labels in samples(flown, tmp_path))
    described = status(flight(flown, tmp_path, rank=3))
    assert "lab rank 3: live" in rendered(described)


def test_an_engine_in_trouble_is_seen_everywhere(flown: World, tmp_path: Path) -> None:
    flown.pages.engines[-1].alive = False
    for _ in range(30):
        flown.only_tick()
    found = samples(flown, tmp_path)
    assert found[key("kvpilot_engine_state", engine="lab", state="dead")] == 1
    assert found[key("kvpilot_engine_restarts_total", engine="lab")] == 0
    alert = {"engine": "lab", "alertname": "KvpilotEngineDead", "severity": "critical"}
    assert found[key("kvpilot_alert_firing", **alert)] == 1
    assert found[key("kvpilot_valve_processes", engine="lab", state="silent")] == 1
    assert found[key("kvpilot_valve_processes", engine="lab", state="writing")] == 0
    described = status(flight(flown, tmp_path))
    assert described["engine"]["ended"].startswith("vanished without a word")
    assert [each["name"] for each in described["alerts"]] == ["KvpilotEngineDead"]
    shown = rendered(described)
    assert "lab: dead" in shown
    assert "KvpilotEngineDead for " in shown
    assert "1 of 1 valves do not write their page" in shown
    flown.start_engine()
    flown.ticks(1, running=1)
    found = samples(flown, tmp_path)
    assert found[key("kvpilot_engine_restarts_total", engine="lab")] == 1
    assert key("kvpilot_alert_firing", **alert) not in found


def rendered(described: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(described))
    return console.export_text()


def test_infinity_is_a_number_in_metrics_and_text_in_json(tmp_path: Path) -> None:
    world = World(policy())
    world.start_engine()
    world.ticks(3, running=1)
    assert math.isinf(samples(world, tmp_path)[key("kvpilot_kv_time_to_exhaustion_seconds", engine="lab")])
    described: dict[str, Any] = get(world, tmp_path, "/status").json()
    assert described["signals"]["forecast.kv_exhaustion_seconds"]["value"] == "+Inf"


def test_people_are_shown_how_far_a_forecast_may_be_off(tmp_path: Path) -> None:
    world = World()
    world.start_engine()
    for step in range(20):
        world.tick(running=1, kv_blocks_free=90 - 2 * step - step % 3)
    signals = status(flight(world, tmp_path))["signals"]
    forecast = signals["forecast.kv_exhaustion_seconds"]
    assert 0 < forecast["p10"] < forecast["value"] < forecast["p90"]
    assert "p10" not in signals["kv_occupancy"], "what is measured has no band"
    assert "p10" not in signals["forecast.step_seconds"], "nor has what is missing"


def test_health_is_the_turning_of_the_loop(flown: World, tmp_path: Path) -> None:
    assert get(World(), tmp_path, "/healthz").status_code == 200
    assert get(flown, tmp_path, "/healthz").json()["status"] == "ok"
    flown.clock.advance(10)
    assert get(flown, tmp_path, "/healthz").status_code == 503


@pytest.mark.parametrize("path", ["/metrics", "/status", "/healthz", "/"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_http_cannot_operate(flown: World, tmp_path: Path, path: str, method: str) -> None:
    before = dict(flown.values)
    assert get(flown, tmp_path, path, method=method).status_code in (404, 405)
    assert flown.values == before


def test_a_port_that_is_taken_is_one_clear_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HttpError) as caught:
            listen("127.0.0.1", port)
    assert str(caught.value) == (
        f"http 127.0.0.1:{port}: Address already in use: write another address as `api: {{port: N}}`"
    )


def test_what_valves_turn_away_and_why_and_what_is_left(tmp_path: Path) -> None:
    world = World()
    world.start_engine()
    valve = MemoryValve(world)
    order = world.pilot.orders.override
    order("admission_credits", Scope("class_at_most", 0), 100.0, 600, "test", "me", None)
    for _ in range(3):
        world.tick(running=1)
        valve.look()
    valve.writer.shed(0, "acme", 400, "credits", 100)
    valve.law.admit(0, "", 120, world.clock.monotonic_ns())
    valve.look()
    world.ticks(1.5)
    found = samples(world, tmp_path)
    shed = {"engine": "lab", "class": "batch"}
    assert found[key("kvpilot_valve_shed_total", **shed, reason="credits")] == 1
    assert found[key("kvpilot_valve_shed_total", **shed, reason="fraction")] == 0
    assert found[key("kvpilot_valve_credits_left_tokens", **shed)] == 70
    assert key("kvpilot_valve_credits_left_tokens", engine="lab", **{"class": "interactive"}) not in found
    lease = {"engine": "lab", "knob": "admission_credits", "scope": format_scope(Scope("class_at_most", 0))}
    assert found[key("kvpilot_valve_lease_value", **lease)] == 100
    assert found[key("kvpilot_offered_prompt_tokens_total", **shed)] == 100
    assert status(flight(world, tmp_path))["engine"]["credits_left"] == {"batch": 70}


def test_the_status_of_one_tick_is_made_once(flown: World, tmp_path: Path) -> None:
    page = StatusPage(flight(flown, tmp_path))
    body = page.body()
    assert json.loads(body) == json.loads(json.dumps(status(flight(flown, tmp_path))))
    assert page.body() is body
    flown.tick()
    assert page.body() is not body
    body = page.body()
    flown.pilot.board.failures += 1
    assert json.loads(page.body())["pilot"]["failed_ticks"] == 1
