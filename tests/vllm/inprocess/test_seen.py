"""Latencies, classes, tenants and the idle engine, as the page shows them."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from flown import STEP_S, Flown
from plane import Make

Fly = Callable[..., Flown]

MAKES = {
    "sync": Make(drafts=3),
    "async": Make(drafts=3, asynchronous=True),
    "plain": Make(asynchronous=True),
}
CALLERS = json.dumps({"classes": {"batch": 0, "interactive": 1}, "tenants": ["acme", "globex"]})


@pytest.fixture(params=MAKES.values(), ids=MAKES)
def flight(fly: Fly, request: pytest.FixtureRequest) -> Flown:
    return fly(request.param, 0, CALLERS)


def tag(level: int, tenant: str = "") -> dict[str, str]:
    return {"kvpilot": f"{level}:{tenant}"}


def test_each_token_but_a_requests_first_has_a_gap(flight: Flown) -> None:
    flight.accept = lambda request_id, drafts: len(request_id) % (drafts + 1)
    outputs = {"a": 30, "bb": 7, "ccc": 19, "dddd": 40}
    for n, (request_id, output) in enumerate(outputs.items()):
        flight.ask(request_id, 30, output, trace_headers=tag(n % 2))
        flight.step()
    flight.drain()
    itl, ttft = flight.reader.histogram("itl"), flight.reader.histogram("ttft")
    assert itl is not None
    assert ttft is not None
    assert ttft.count == len(outputs)
    # A prompt's last chunk brings one token.
    assert itl.count == sum(outputs.values()) - len(outputs)
    by_class = [flight.reader.histogram("itl", level) for level in (0, 1)]
    assert [histogram.count for histogram in by_class if histogram] == [30 + 19 - 2, 7 + 40 - 2]
    # Every gap is shared by the tokens of one emission: they add up to the time that requests were decoding.
    assert itl.sum_ns <= len(flight.history) * STEP_S * 1e9 * len(outputs)


def test_a_steady_batch_shares_one_gap(fly: Fly) -> None:
    flight = fly(MAKES["sync"])
    flight.accept = lambda _id, _drafts: 1
    for n in range(4):
        flight.ask(f"r{n}", 20, 41)
    flight.drain()
    itl = flight.reader.histogram("itl")
    assert itl is not None
    assert itl.count == 160
    assert itl.sum_ns == 160 * STEP_S * 1e9 / 2
    assert itl.quantile(0.01) == pytest.approx(STEP_S / 2, rel=0.05) == itl.quantile(0.99)


def test_gaps_grow_while_a_request_is_left_out(fly: Fly) -> None:
    """Preempted, or without budget: the time until its next token is its gap, not a step's."""
    flight = fly(Make())
    for n in range(2):
        flight.ask(f"r{n}", 20, 30)
    for _ in range(5):
        flight.step()
    itl = flight.reader.histogram("itl")
    assert itl is not None
    flight.hold(ttl_s=60, step_token_budget=1)
    for _ in range(10):
        flight.step()
    flight.release()
    flight.drain()
    after = flight.reader.histogram("itl")
    assert after is not None
    assert after.quantile(1) == pytest.approx(11 * STEP_S, rel=0.05)


def test_queue_wait_and_ttft_run_from_arrival(fly: Fly) -> None:
    flight = fly(Make(max_num_seqs=1))
    flight.ask("first", 20, 10)
    flight.ask("second", 20, 3)
    flight.drain()
    wait, ttft = flight.reader.histogram("queue_wait"), flight.reader.histogram("ttft")
    assert wait is not None
    assert ttft is not None
    assert wait.count == ttft.count == 2
    assert wait.sum_ns == 10 * STEP_S * 1e9
    assert ttft.sum_ns == (1 + 11) * STEP_S * 1e9


def test_step_durations_of_overlapping_steps_add_up_to_the_time(flight: Flown) -> None:
    for n in range(3):
        flight.ask(f"r{n}", 50, 30)
    begin_ns = flight.clock.monotonic_ns()
    flight.drain()
    durations = [record["duration_ns"] for record in flight.records if record["duration_ns"]]
    assert sum(durations) == flight.clock.monotonic_ns() - begin_ns - empty_steps(flight) * STEP_S * 1e9


def empty_steps(flight: Flown) -> int:
    return sum(not output.total_num_scheduled_tokens for output in flight.history)


def test_classes_show_their_queues(fly: Fly) -> None:
    flight = fly(Make(max_num_seqs=1), 0, CALLERS)
    assert flight.reader.manifest.classes == ("batch", "interactive")
    for n in range(5):
        flight.ask(f"r{n}", 10 * (n + 1), 4, trace_headers=tag(n % 2))
    flight.step()
    assert [tuple(row) for row in flight.reader.classes()] == [
        ("batch", 2, 30 + 50),
        ("interactive", 2, 20 + 40),
    ]
    assert flight.last["waiting_prompt_tokens"] == 140
    flight.drain()
    assert [tuple(row)[1:] for row in flight.reader.classes()] == [(0, 0), (0, 0)]


def test_tenants_hold_what_their_requests_hold(flight: Flown) -> None:
    assert "tenants" not in flight.reader.manifest.unsupported_signals
    flight.ask("a1", 40, 20, trace_headers=tag(0, "acme"))
    flight.ask("a2", 40, 20, trace_headers=tag(1, "acme"))
    flight.ask("g", 90, 10, trace_headers=tag(0, "globex"))
    flight.ask("nobody", 30, 5)
    for _ in range(8):
        flight.step()
    rows = {row.name: row for row in flight.reader.tenants()}
    assert set(rows) == {"acme", "globex"}
    assert rows["acme"].running == 2
    assert rows["acme"].kv_blocks >= 6
    flight.drain()
    rows = {row.name: row for row in flight.reader.tenants()}
    assert (rows["acme"].tokens_total, rows["globex"].tokens_total) == (40, 10)
    assert all(not (row.running or row.waiting or row.kv_blocks) for row in rows.values())
    assert rows["acme"].block_ns_total > rows["globex"].block_ns_total > 0


def test_a_tag_does_not_travel_back(flight: Flown) -> None:
    request = flight.ask("r", 20, 4, trace_headers={"traceparent": "x", **tag(1, "acme")})
    assert request.trace_headers == {"traceparent": "x"}
    flight.drain()


def test_an_idle_engine_shows_nothing_running(flight: Flown) -> None:
    for n in range(3):
        flight.ask(f"r{n}", 50, 10)
    flight.drain()
    record = flight.last
    assert record["running"] == record["waiting"] == record["waiting_prompt_tokens"] == 0
    assert record["demand_16_p90_blocks"] == record["tail_waste_tokens"] == 0
    assert not flight.scheduler.has_requests()


def test_requests_that_are_aborted_between_steps_do_not_stay(flight: Flown) -> None:
    flight.ask("r", 50, 10)
    flight.ask("waiting", 50, 10)
    flight.step()
    steps = flight.last["steps_total"] if flight.records else 0
    flight.abort("r", "waiting")
    record = flight.last
    assert record["duration_ns"] == 0
    assert record["running"] == record["waiting"] == 0
    assert record["steps_total"] == steps
    assert record["cancelled_total"] == 2
    flight.drain()
    assert len(flight.attachment.recorder._lives) == 0


def test_empty_steps_leave_one_record_at_most(fly: Fly) -> None:
    """vLLM asks a thousand times a second while a request waits for something else than a step."""
    flight = fly(MAKES["plain"])
    session = flight.ask("session", 20, 3, resumable=True)
    while "session" not in flight.finished:
        flight.step()
    for _ in range(3):
        flight.step()
    flight.records += flight.reader.poll()
    before, steps = len(flight.records), flight.last["steps_total"]
    for _ in range(50):
        output = flight.scheduler.schedule()
        flight._land(output, flight._run(output))
    assert len(flight.records) - before <= 1
    assert flight.last["steps_total"] == steps
    assert session.request_id in flight.scheduler.requests


def test_under_the_lowest_cap_an_idle_engine_has_nothing_to_step(flight: Flown) -> None:
    """vLLM's loop sleeps while its scheduler has no requests, and spins while it has."""
    flight.hold(ttl_s=60, max_running=1, step_token_budget=4, admission_watermark=0.05)
    for n in range(4):
        flight.ask(f"r{n}", 50, 6)
    flight.drain(most=1000)
    assert not flight.scheduler.has_requests()
    empty = [output for output in flight.history if not output.total_num_scheduled_tokens]
    # One after each end, to tell the workers; asynchronously another while the last output is under way.
    assert len(empty) <= 2 * 4


def test_what_limited_a_step(fly: Fly) -> None:
    flight = fly(Make(blocks=12, max_num_seqs=4, max_num_batched_tokens=64))
    flight.ask("large", 100, 40)
    flight.step()
    assert flight.last["budget_limited_steps_total"] == 1
    flight.ask("next", 100, 4)
    for _ in range(3):
        flight.step()
    record = flight.last
    assert record["kv_limited_steps_total"] == 3
    assert record["waiting"] == 1
    flight.abort("large")
    flight.step()
    assert flight.last["kv_limited_steps_total"] == 3


def test_a_cap_is_not_a_lack_of_memory(fly: Fly) -> None:
    flight = fly(replace(MAKES["plain"], max_num_seqs=1))
    for n in range(3):
        flight.ask(f"r{n}", 20, 5)
    flight.drain()
    assert flight.last["kv_limited_steps_total"] == flight.last["budget_limited_steps_total"] == 0


def test_prefixes_queried_and_hit(fly: Fly) -> None:
    flight = fly(Make())
    prompt = list(range(10, 60))
    for n in range(2):
        flight.ask(f"r{n}", prompt, 4)
        flight.drain()
    record = flight.last
    assert (record["prefix_tokens_queried_total"], record["prefix_tokens_hit_total"]) == (100, 48)


def test_a_pool_without_a_prefix_cache_says_so(fly: Fly) -> None:
    flight = fly(Make(caching=False))
    flight.ask("r", 40, 30)
    flight.drain()
    assert "prefix_tokens_hit_total" not in flight.last
    assert flight.last["kv_blocks_cached"] == flight.last["kv_blocks_shared"] == 0


def test_finished_lengths_teach_the_predictor(fly: Fly) -> None:
    flight = fly(Make(blocks=400, max_model_len=512))
    for n in range(40):
        flight.ask(f"r{n}", 20, 10)
    flight.drain()
    flight.ask("now", 20, 10)
    flight.clock.advance(1)
    flight.step()
    # All forty ended after ten tokens: hardly anybody is expected to hold a block 64 steps on.
    assert flight.last["demand_64_p50_blocks"] < 2
