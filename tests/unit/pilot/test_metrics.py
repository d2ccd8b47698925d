"""The metrics page: the table and its documentation, what is missing, exemplars, tenants, many scrapers."""

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilot_world import MemoryValve, World, policy
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from test_publish import flight, get, key, samples

from kvpilot.clock import NS, VirtualClock
from kvpilot.link.telemetry import TenantRow
from kvpilot.pilot import TICK_NS
from kvpilot.publish.collected import Collected
from kvpilot.publish.collector import Collector
from kvpilot.publish.exposition import CONTENT_TYPES, Exposition, Format, negotiated
from kvpilot.publish.families import COMMON, FAMILIES, SIGNAL_FAMILIES
from kvpilot.publish.metrics_page import metrics_page
from kvpilot.publish.prometheus import OLDEST_NS, TURN_NS, MetricsPage, Turns
from kvpilot.publish.rank_metrics import TenantMetrics
from kvpilot.publish.sheet import Sheet
from kvpilot.publish.tenant_names import MOST_TENANTS, OTHER, Counted, TenantNames, tenant_label
from kvpilot.publish.traces import trace_id
from kvpilot.signals import SIGNALS

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_in_docs_is_current() -> None:
    assert (DOCS / "metrics.md").read_text() == metrics_page(), "make docs"


def test_every_signal_is_a_family_and_names_keep_the_rules() -> None:
    assert set(SIGNAL_FAMILIES) == set(SIGNALS)
    for family in FAMILIES.values():
        assert family.name.startswith("kvpilot_")
        assert family.name.replace("_", "").isalnum(), "no colon: these are recording rules'"
        assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert family.labels[:2] == COMMON
        assert len(set(family.labels)) == len(family.labels)
        assert family.meaning.endswith(".")


def world_with_decision() -> World:
    world = World(policy())
    world.start_engine()
    assert world.hook is not None
    world.ticks(1, running=1)
    world.hook.itl[1].record(4_000_000)
    world.ticks(1, running=1, waiting=11)
    return world


def test_a_missing_signal_has_no_sample_but_says_why(tmp_path: Path) -> None:
    found = samples(world_with_decision(), tmp_path)
    assert key("kvpilot_oom_total") not in found
    assert found[key("kvpilot_signal_available", signal="oom")] == 0
    assert found[key("kvpilot_signal_missing", signal="oom", reason="not_provided")] == 1
    assert found[key("kvpilot_signal_available", signal="kv_occupancy")] == 1
    assert found[key("kvpilot_signal_age_seconds", signal="kv_occupancy")] == pytest.approx(0, abs=0.5)
    told = {dict(labels)["signal"] for name, labels in found if name == "kvpilot_signal_available"}
    assert told == set(SIGNALS), "of every signal, whether it is there"
    available = {
        dict(labels)["signal"]
        for (name, labels), value in found.items()
        if name == "kvpilot_signal_available" and value
    }
    shown = {name.removesuffix("_total").removesuffix("_bucket") for name, _ in found}
    for signal in SIGNALS:
        assert (SIGNAL_FAMILIES[signal].name in shown) == (signal in available), signal


def test_a_signal_that_grows_old_goes_and_tells_its_age(tmp_path: Path) -> None:
    world = world_with_decision()
    world.pages.engines[-1].alive = False
    for _ in range(80):
        world.only_tick()
    found = samples(world, tmp_path)
    assert key("kvpilot_requests_running") not in found
    assert found[key("kvpilot_signal_missing", signal="requests_running", reason="too_old")] == 1
    assert found[key("kvpilot_signal_age_seconds", signal="requests_running")] > 5


def exemplars(text: str) -> dict[str, tuple[dict[str, str], float]]:
    return {
        sample.labels["le"]: (sample.exemplar.labels, sample.exemplar.value)
        for family in parse_openmetrics(text)
        for sample in family.samples
        if sample.exemplar is not None
    }


def test_a_latency_bucket_names_the_decision_made_while_it_grew(tmp_path: Path) -> None:
    world = world_with_decision()
    accept = "application/openmetrics-text; version=1.0.0"
    told = exemplars(get(world, tmp_path, "/metrics", accept=accept).text)
    labels, value = told["0.005"]
    assert labels == {"decision": "1"}
    assert value == pytest.approx(0.004, rel=0.032)
    assert "# {" not in get(world, tmp_path, "/metrics").text, "the older format has none"
    traced = flight(world, tmp_path)
    page = MetricsPage(traced, Collector(traced, traced=True))
    labels, _ = exemplars(asyncio.run(page.answer(accept))[0].decode())["0.005"]
    assert labels["trace_id"] == f"{trace_id('lab', 0, world.sight().nonce, 1):032x}"


def test_without_a_decision_no_bucket_names_one(tmp_path: Path) -> None:
    world = World(policy())
    world.start_engine()
    assert world.hook is not None
    for _ in range(5):
        world.hook.itl[0].record(4_000_000)
        world.ticks(0.5, running=1)
    accept = "application/openmetrics-text; version=1.0.0"
    assert exemplars(get(world, tmp_path, "/metrics", accept=accept).text) == {}


def test_scrapers_of_one_state_share_one_page(tmp_path: Path) -> None:
    world = world_with_decision()
    page = MetricsPage(flight(world, tmp_path))

    async def scrape(times: int) -> set[bytes]:
        return {body for body, _ in await asyncio.gather(*(page.answer("") for _ in range(times)))}

    bodies = asyncio.run(scrape(10))
    assert (len(bodies), page.renders) == (1, 1)
    world.ticks(0.4, running=2)
    assert (asyncio.run(scrape(10)), page.renders) == (bodies, 1)
    world.ticks(0.6, running=2)
    assert not asyncio.run(scrape(10)) & bodies
    assert page.renders == 2


def test_nobody_waits_for_the_successor_of_a_page_that_will_do(tmp_path: Path) -> None:
    """The page is handed out while the next one is made, until it is too old."""
    world = world_with_decision()
    page = MetricsPage(flight(world, tmp_path))

    async def scrapes() -> list[bytes]:
        bodies = []
        for ticked_s, turns in ((0.0, 0), (0.6, 0), (0.0, 20), (OLDEST_NS / NS, 0)):
            world.ticks(ticked_s, running=2)
            for _ in range(turns):
                await asyncio.sleep(0)
            bodies.append((await page.answer(""))[0])
        return bodies

    first, kept, fresh, waited_for = asyncio.run(scrapes())
    assert first == kept
    assert len({first, fresh, waited_for}) == 3
    assert page.renders == 3


class SlowClock(VirtualClock):
    """Each look at it takes a quarter of a turn."""

    def monotonic_ns(self) -> int:
        self.advance(TURN_NS / NS / 4)
        return super().monotonic_ns()


def test_long_work_lets_others_run() -> None:
    world = World()
    world.pilot.clock = SlowClock()
    turns, others = Turns(world.pilot), 0

    async def work() -> None:
        nonlocal others

        async def other() -> None:
            nonlocal others
            while True:
                others += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(other())
        for _ in range(40):
            await turns.over()
        beside.cancel()

    asyncio.run(work())
    assert 5 < others < 20
    assert turns.worked_s() >= others * TURN_NS / NS


def test_no_turn_begins_where_the_next_tick_would_wait_for_it(tmp_path: Path) -> None:
    world = world_with_decision()
    page = MetricsPage(flight(world, tmp_path))
    tick = world.pilot.tick()
    world.clock.advance((TICK_NS - TURN_NS) / NS)
    asyncio.run(page.answer(""))
    assert world.clock.monotonic_ns() == tick.at_ns + TICK_NS


def test_a_scraper_that_goes_away_leaves_the_page_to_the_others(tmp_path: Path) -> None:
    page = MetricsPage(flight(world_with_decision(), tmp_path))

    async def scrapes() -> bytes:
        leaves, stays = (asyncio.create_task(page.answer("")) for _ in range(2))
        await asyncio.sleep(0)
        leaves.cancel()
        return (await stays)[0]

    assert asyncio.run(scrapes())
    assert page.renders == 1


def test_a_page_that_fails_is_tried_again(tmp_path: Path) -> None:
    world = world_with_decision()
    page = MetricsPage(flight(world, tmp_path))
    world.pilot.ledger.counts[("no", "family", "has", "so", "many", "labels")] = 1
    with pytest.raises(ValueError, match="longer"):
        asyncio.run(page.answer(""))
    world.pilot.ledger.counts.clear()
    world.ticks(0.6)
    assert asyncio.run(page.answer(""))[0]


def test_two_scrapes_in_a_row_are_one_counter_each(tmp_path: Path) -> None:
    """No counter falls between pages while the engine goes on."""
    world = world_with_decision()
    page = MetricsPage(flight(world, tmp_path))
    before: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for _ in range(4):
        world.ticks(0.6, running=2)
        now = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in parse(asyncio.run(page.answer(""))[0].decode())
            if family.type == "counter"
            for sample in family.samples
        }
        assert all(now[each] >= value for each, value in before.items())
        before = now
    assert before


def test_an_endpoint_picker_reads_queue_and_kv(tmp_path: Path) -> None:
    world = World()
    world.start_engine()
    assert get(world, tmp_path, "/metrics/picker").text == ""
    world.ticks(1, waiting=3, running=2, kv_blocks_free=25)
    text = get(world, tmp_path, "/metrics/picker").text
    found = {sample.name: sample for family in parse(text) for sample in family.samples}
    assert found["vllm:num_requests_waiting"].value == 3
    assert found["vllm:num_requests_running"].value == 2
    assert found["vllm:kv_cache_usage_perc"].value == 0.75
    assert found["vllm:num_requests_waiting"].labels["model_name"] == "tiny"
    assert found["vllm:cache_config_info"].labels["num_gpu_blocks"] == "100"
    world.pages.engines[-1].alive = False
    for _ in range(80):
        world.only_tick()
    stale = get(world, tmp_path, "/metrics/picker").text
    assert "num_requests_waiting{" not in stale, "an engine that is gone is not an idle one"


HOSTILE = ['a"b', "a\\", "a\nb", "x" * 5000, "{}", "", "\u202eevil", "\x00", "other", "(none)", "é", " "]


@given(st.lists(st.text() | st.sampled_from(HOSTILE), max_size=60, unique=True))
def test_hostile_tenants_are_escaped_bounded_and_hashed(names: list[str]) -> None:
    rows = [TenantRow(name, 1, 1, index, 10**9, index) for index, name in enumerate(names)]
    metrics, sheet = TenantMetrics(), Sheet("lab", 0)
    metrics.add_rows(sheet, rows, 0)
    page = Exposition().page(sheet.collected(), "text").decode()
    found = [sample for family in parse(page) for sample in family.samples]
    labels = {sample.labels["tenant"] for sample in found}
    assert len(labels) <= MOST_TENANTS + 1
    assert all(len(label) <= 63 and label.isprintable() and label.isascii() for label in labels)
    held = [sample.value for sample in found if sample.name == "kvpilot_tenant_kv_blocks"]
    assert sum(held) == sum(row.kv_blocks for row in rows), "nobody is lost in the rest"
    page = Exposition().page(sheet.collected(), "openmetrics").decode()
    assert len(list(parse_openmetrics(page))) == (5 if names else 0)


def test_prefix_hits_by_tenant_are_shown_where_the_engine_counts_them() -> None:
    """A tenant that was never looked up, and an engine that does not count, have no sample, not a 0."""
    rows = [TenantRow(name, 1, 0, 8, 0, 9) for name in ("acme", "globex")]
    queried, hit = "prefix_tokens_queried_total", "prefix_tokens_hit_total"
    seen = {}
    for counts in ({}, {"acme": {queried: 40, hit: 30}, "gone": {queried: 5, hit: 5}}):
        sheet = Sheet("lab", 0)
        TenantMetrics().add_rows(sheet, rows, 0, counts)
        page = Exposition().page(sheet.collected(), "text").decode()
        seen[len(counts)] = {
            (sample.name, sample.labels["tenant"]): sample.value
            for family in parse(page)
            for sample in family.samples
            if "prefix" in sample.name
        }
    names = ("kvpilot_tenant_prefix_queried_tokens_total", "kvpilot_tenant_prefix_hit_tokens_total")
    assert seen == {0: {}, 2: {(names[0], "acme"): 40, (names[1], "acme"): 30}}


@given(st.text() | st.sampled_from(HOSTILE))
def test_any_label_value_survives_both_formats(value: str) -> None:
    family = FAMILIES["kvpilot_policy_mode"]
    collected = [Collected(family, [(("lab", "0", value, "shadow"), 1.0)])]
    for form, read in (("text", parse), ("openmetrics", parse_openmetrics)):
        page = Exposition().page(collected, form).decode()
        (sample,) = (sample for each in read(page) for sample in each.samples)
        expected = "".join(each if each.isprintable() or each == "\n" else "?" for each in value)
        assert sample.labels["policy"] == expected


def test_no_tenant_can_take_the_label_of_the_rest() -> None:
    assert tenant_label("other") == "other"
    assert OTHER not in {tenant_label(name) for name in HOSTILE if name != OTHER}
    assert tenant_label("") == "(none)" != tenant_label("(none)")


@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9)), max_size=12))
def test_counters_of_tenants_add_up_and_never_fall(steps: list[dict[str, int]]) -> None:
    """Whoever comes, goes and is ranked: no series falls while it is there, and nothing is counted twice."""
    names, counted = TenantNames(most=2), Counted()
    totals: dict[str, float] = {}
    before: dict[str, float] = {}
    for step in steps:
        for name, grown in step.items():
            totals[name] = totals.get(name, 0) + grown
        names.rank(totals)
        assert len(names.named) <= 2
        now = counted.add(totals, names)
        assert all(now[label] >= before[label] for label in now.keys() & before.keys())
        if set(before) <= set(now):
            assert sum(now.values()) - sum(before.values()) == sum(step.values())
        before = now


def test_a_tenant_that_was_away_is_not_counted_again() -> None:
    names, counted = TenantNames(), Counted()
    names.rank({"a": 1, "b": 1})
    counted.add({"a": 100, "b": 1}, names)
    counted.add({"b": 2}, names)
    assert counted.add({"a": 103, "b": 2}, names) == {"a": 3, "b": 2}


def test_what_tenants_ask_of_the_valves(tmp_path: Path) -> None:
    world = World()
    world.start_engine()
    valve = MemoryValve(world)
    valve.writer.shed(0, "acme", 10)
    world.ticks(1.5, running=1)
    found = samples(world, tmp_path)
    assert found[key("kvpilot_tenant_shed_total", tenant="acme")] == 1
    assert found[key("kvpilot_tenant_offered_total", tenant="acme")] == 1


def test_of_several_pilots_one_shows_the_valves(tmp_path: Path) -> None:
    world = World(flies_valves=False)
    world.start_engine()
    MemoryValve(world).writer.shed(0, "acme", 10)
    world.ticks(1.5, running=1)
    found = {name for name, _ in samples(world, tmp_path)}
    assert "kvpilot_requests_running" in found
    assert not found & {"kvpilot_shed_total", "kvpilot_tenant_shed_total", "kvpilot_valve_processes"}


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1.0"), (math.inf, "+Inf"), (-math.inf, "-Inf"), (math.nan, "NaN"), (3, "3.0")]
)
@pytest.mark.parametrize("form", ["text", "openmetrics"])
def test_numbers(value: float, text: str, form: Format) -> None:
    family = FAMILIES["kvpilot_kv_pool_blocks"]
    page = Exposition().page([Collected(family, [(("lab", "0"), value)])], form).decode()
    assert f'kvpilot_kv_pool_blocks{{engine="lab",rank="0"}} {text}\n' in page


PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (PROMETHEUS, "openmetrics"),
        ("application/openmetrics-text", "openmetrics"),
        ("application/openmetrics-text; version=1.0.0", "openmetrics"),
        ("application/openmetrics-text; version=0.0.1, text/plain; version=0.0.4", "text"),
        ("application/openmetrics-text; version=new", "text"),
        ("text/plain; version=1.0.0; escaping=allow-utf-8", "text"),
        ("*/*", "text"),
        ("", "text"),
        (",;=;,", "text"),
    ],
)
def test_formats_are_negotiated(accept: str, form: Format) -> None:
    assert negotiated(accept) == form
    assert CONTENT_TYPES[form].endswith("charset=utf-8")


VALUES = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 1.0, math.inf])), max_size=4)


@given(st.lists(st.tuples(VALUES, st.sampled_from(["text", "openmetrics"])), max_size=6))
def test_a_family_whose_text_is_kept_is_what_it_would_be_made_anew(
    pages: list[tuple[list[tuple[str, float]], Format]],
) -> None:
    keeps, family = Exposition(), FAMILIES["kvpilot_tenant_running"]
    for values, form in pages:
        collected = [Collected(family, [(("lab", "0", tenant), value) for tenant, value in values])]
        assert keeps.page(collected, form) == Exposition().page(collected, form)


def test_promises_policies_and_claims_are_there_to_draw(tmp_path: Path) -> None:
    world = World(policy(), slo={"itl": 0.05, "ttft": 1.0, "batch": {"itl": 0.1, "ttft": 5.0}})  # type: ignore[dict-item]
    world.start_engine()
    world.ticks(1, waiting=11, running=1)
    found = samples(world, tmp_path)
    assert found[key("kvpilot_slo_seconds", promise="ttft", **{"class": "batch"})] == 5.0
    assert found[key("kvpilot_policy_mode", policy="guard", mode="enforce")] == 1
    claim = {"policy": "guard", "rule": "act", "knob": "prefill_chunk_tokens", "scope": "all"}
    assert found[key("kvpilot_rule_claim_value", shadow="false", **claim)] == 64
    lease = {"knob": "prefill_chunk_tokens", "scope": "all", "policy": "guard", "rule": "act"}
    assert found[key("kvpilot_lease_value", **lease)] == 64
    about = {"kind": "test", "version": "1", "model": "tiny", "device": "cpu"}
    assert found[key("kvpilot_engine_info", **about)] == 1
    assert replace(world.sight(), rows=()).manifest is not None
