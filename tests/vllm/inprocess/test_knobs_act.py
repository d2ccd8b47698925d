"""Every knob, moved on a real scheduler: it takes effect at once and goes back to exactly what it was."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from flown import Flown
from plane import Make, Scheduler

Fly = Callable[..., Flown]

SYNC = Make(drafts=3)
ASYNC = replace(SYNC, asynchronous=True)


@pytest.fixture(params=[SYNC, ASYNC], ids=["sync", "async"])
def flight(fly: Fly, request: pytest.FixtureRequest) -> Flown:
    return fly(request.param)


def tokens_of_steps(flight: Flown, count: int) -> list[dict[str, int]]:
    """What the next `count` steps schedule, by request."""
    begin = len(flight.history)
    for _ in range(count):
        flight.step()
    return [output.num_scheduled_tokens for output in flight.history[begin:]]


def test_all_knobs_are_offered_with_their_limits(flight: Flown) -> None:
    knobs = {knob.name: (knob.minimum, knob.maximum, knob.baseline) for knob in flight.reader.manifest.knobs}
    assert knobs == {
        "step_token_budget": (4, 256, 256),
        "prefill_chunk_tokens": (4, 256, 256),
        "speculative_tokens": (0, 3, 3),
        "max_running": (1, 8, 8),
        "admission_watermark": (0.05, 1.0, 1.0),
    }
    assert flight.reader.manifest.unsupported_knobs == {
        "kv_element_bits": "vLLM has one --kv-cache-dtype for the engine's life",
        "kv_kept_ratio": "vLLM keeps every token of a running request",
    }
    chunk = flight.reader.manifest.knob("prefill_chunk_tokens")
    assert chunk is not None
    assert "per step" in chunk.applied


def test_step_token_budget(flight: Flown) -> None:
    found = flight.knob_state()
    for n in range(5):
        flight.ask(f"r{n}", 200, 60)
    assert max(sum(step.values()) for step in tokens_of_steps(flight, 2)) == 256
    flight.hold(step_token_budget=40)
    steps = tokens_of_steps(flight, 6)
    assert {sum(step.values()) for step in steps} == {40}
    assert flight.last["knob.step_token_budget"] == 40
    flight.release()
    steps = tokens_of_steps(flight, 3)
    assert max(sum(step.values()) for step in steps) > 40
    assert flight.is_as_found(found)
    flight.drain()


def test_step_token_budget_at_its_minimum_still_finishes_everything(flight: Flown) -> None:
    for n in range(4):
        flight.ask(f"r{n}", 50, 10)
    flight.accept = lambda _id, drafts: drafts
    flight.hold(ttl_s=60, step_token_budget=1)
    flight.drain()
    assert {len(tokens) for tokens in flight.outputs.values()} == {10}
    assert max(output.total_num_scheduled_tokens for output in flight.history) == 4


def test_prefill_chunk_bounds_the_prompt_tokens_of_a_step(flight: Flown) -> None:
    found = flight.knob_state()
    for n in range(3):
        flight.ask(f"decoding{n}", 20, 40)
    for _ in range(3):
        flight.step()
    flight.hold(prefill_chunk_tokens=16)
    for n in range(3):
        flight.ask(f"r{n}", 120, 20)
    steps = tokens_of_steps(flight, 6)
    for step in steps:
        assert {step.get(f"decoding{n}", 0) for n in range(3)} == {4}
        prompts = [count for request_id, count in step.items() if request_id.startswith("r")]
        # Whoever runs may have a token more: it might have been decoding.
        assert 16 <= sum(prompts) <= 16 + len(prompts)
    flight.release()
    assert max(count for step in tokens_of_steps(flight, 2) for count in step.values()) > 16
    assert flight.is_as_found(found)
    flight.drain()


def test_a_prompt_that_is_alone_comes_in_chunks_too(flight: Flown) -> None:
    flight.hold(prefill_chunk_tokens=16)
    flight.ask("alone", 120, 20)
    assert {count for step in tokens_of_steps(flight, 4) for count in step.values()} <= {16, 17}


def test_an_adaptive_threshold_is_put_aside_meanwhile(fly: Fly) -> None:
    make = replace(
        SYNC,
        drafts=0,
        extra=(("long_prefill_token_threshold", 64), ("long_prefill_token_threshold_adaptive", True)),
    )
    flight = fly(make)
    found = flight.knob_state()
    assert found["adaptive"] is True
    assert flight.reader.manifest.knob("prefill_chunk_tokens").baseline == 64
    flight.hold(prefill_chunk_tokens=16)
    for n in range(2):
        flight.ask(f"r{n}", 120, 4)
    # Adaptive, each of two requests would get half of the budget.
    assert max(count for step in tokens_of_steps(flight, 3) for count in step.values()) == 16
    assert flight.scheduler.adaptive_long_prefill_threshold is False
    flight.release()
    flight.step()
    assert flight.is_as_found(found)
    assert max(flight.history[-1].num_scheduled_tokens.values()) > 16


def test_running_cap_drains_and_never_preempts(flight: Flown) -> None:
    found = flight.knob_state()
    for n in range(8):
        flight.ask(f"r{n}", 20, 10 + 4 * n)
    for _ in range(3):
        flight.step()
    assert len(flight.scheduler.running) == 8
    flight.ask("late", 20, 5)
    flight.hold(ttl_s=60, max_running=2)
    running = []
    while len(flight.scheduler.running) > 2:
        flight.step()
        running.append(len(flight.scheduler.running))
    assert running == sorted(running, reverse=True)
    assert "late" not in flight.outputs
    assert flight.last["preemptions_total"] == 0
    while "late" not in flight.outputs:
        flight.step()
        assert len(flight.scheduler.running) <= 2
    flight.release()
    for n in range(6):
        flight.ask(f"more{n}", 20, 30)
    flight.step()
    assert len(flight.scheduler.running) > 2
    assert flight.is_as_found(found)
    flight.drain()
    assert set(flight.finished.values()) == {"length"}


@pytest.mark.parametrize("most", [0, 1, 2])
def test_speculative_tokens_trim_what_is_attached(flight: Flown, most: int) -> None:
    found = flight.knob_state()
    flight.accept = lambda _id, drafts: drafts // 2
    for n in range(4):
        flight.ask(f"r{n}", 20, 100)
    for _ in range(4):
        flight.step()
    assert max(map(len, flight.history[-1].scheduled_spec_decode_tokens.values())) == 3
    flight.hold(speculative_tokens=most)
    begin = len(flight.history)
    for _ in range(6):
        flight.step()
    for output in flight.history[begin:]:
        drafts = output.scheduled_spec_decode_tokens.values()
        assert max(map(len, drafts), default=0) == most
        assert output.num_spec_tokens_to_schedule == most
    assert flight.last["knob.speculative_tokens"] == most
    flight.release()
    for _ in range(3):
        flight.step()
    assert max(map(len, flight.history[-1].scheduled_spec_decode_tokens.values())) == 3
    assert flight.is_as_found(found)
    assert found["dynamic_sd_lookup"] is None
    flight.drain()
    assert {len(tokens) for tokens in flight.outputs.values()} == {100}


def test_a_draft_table_of_the_operators_stays_the_upper_bound(fly: Fly) -> None:
    flight = fly(replace(SYNC, draft_table=[[1, 2, 3], [3, 8, 1]]))
    table = flight.scheduler.dynamic_sd_lookup
    assert table == [0, 3, 3, 1, 1, 1, 1, 1, 1]
    flight.ask("r", 20, 60)
    flight.hold(speculative_tokens=2)
    flight.step()
    assert flight.scheduler.dynamic_sd_lookup == [0, 2, 2, 1, 1, 1, 1, 1, 1]
    flight.release()
    flight.step()
    assert flight.scheduler.dynamic_sd_lookup is table


def test_trimming_leaves_the_shared_placeholders_alone(fly: Fly) -> None:
    flight = fly(ASYNC)
    for n in range(3):
        flight.ask(f"r{n}", 20, 100)
    for _ in range(4):
        flight.step()
    shared = flight.scheduler._spec_token_placeholders
    flight.hold(speculative_tokens=1)
    flight.step()
    assert shared == [-1, -1, -1]


def test_admission_watermark(fly: Fly) -> None:
    flight = fly(Make(blocks=41, max_num_seqs=8))
    found = flight.knob_state()
    flight.hold(ttl_s=60, admission_watermark=0.5)
    for n in range(6):
        flight.ask(f"r{n}", 100, 6)
    pool = flight.scheduler.kv_cache_manager.block_pool
    used = []
    for _ in range(4):
        flight.step()
        used.append(41 - 1 - pool.get_num_free_blocks())
    # Seven blocks each: the third would leave less than half of the pool.
    assert len(flight.scheduler.running) == 2
    assert max(used) <= 21
    flight.release()
    flight.step()
    assert len(flight.scheduler.running) > 2
    assert flight.is_as_found(found)
    flight.drain()


def test_a_watermark_that_holds_nobody_back_when_nothing_runs(fly: Fly) -> None:
    flight = fly(Make(blocks=41))
    flight.hold(ttl_s=60, admission_watermark=0.05)
    flight.ask("large", 400, 6)
    flight.drain()
    assert flight.finished == {"large": "length"}


def test_configured_watermark_is_the_baseline(fly: Fly) -> None:
    flight = fly(Make(blocks=100, extra=(("watermark", 0.2),)))
    knob = flight.reader.manifest.knob("admission_watermark")
    assert knob is not None
    assert (knob.minimum, knob.baseline, knob.maximum) == (0.05, 0.8, 0.8)


class Counting(Scheduler):
    """Counts writes of what knobs move."""

    writes: int = 0

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("max_num_scheduled_tokens", "max_num_active_reqs", "dynamic_sd_lookup"):
            object.__setattr__(self, "writes", self.writes + 1)
        object.__setattr__(self, name, value)


def test_at_baseline_nothing_is_written(fly: Fly) -> None:
    flight = fly(replace(SYNC, scheduler_cls=Counting))
    before = flight.scheduler.writes
    baseline = {knob.name: knob.baseline for knob in flight.reader.manifest.knobs}
    flight.ask("r", 100, 40)
    flight.hold(**baseline)
    for _ in range(5):
        flight.step()
        flight.renew(**baseline)
    assert flight.scheduler.writes == before
    flight.hold(max_running=3)
    for _ in range(5):
        flight.step()
    assert flight.scheduler.writes == before + 1
    flight.drain()


def test_a_lease_runs_out_at_a_step_boundary(flight: Flown) -> None:
    found = flight.knob_state()
    flight.ask("r", 20, 200)
    everything = {"step_token_budget": 8, "prefill_chunk_tokens": 8, "speculative_tokens": 0}
    flight.hold(ttl_s=0.5, max_running=1, admission_watermark=0.1, **everything)
    flight.step()
    away = flight.knob_state()
    assert {name for name, value in away.items() if value is not found[name]} >= {
        "max_num_scheduled_tokens",
        "max_num_active_reqs",
        "dynamic_sd_lookup",
        "threshold",
        "watermark",
    }
    flight.clock.advance(0.4)
    flight.step()
    assert flight.knob_state() == away
    flight.clock.advance(0.2)
    flight.step()
    assert flight.is_as_found(found)
    flight.step()
    assert flight.last["knob.max_running"] == 8


def test_a_lease_that_ran_out_while_idle_does_not_hold_the_next_request(flight: Flown) -> None:
    """And what a pilot wrote meanwhile, before it died, is history."""
    found = flight.knob_state()
    flight.ask("r", 20, 20)
    flight.hold(max_running=1, speculative_tokens=0)
    flight.drain()
    assert not flight.is_as_found(found)
    flight.clock.advance(1)
    flight.renew(max_running=1, speculative_tokens=0)
    flight.clock.advance(60)
    for n in range(3):
        flight.ask(f"later{n}", 20, 20)
    flight.step()
    assert flight.is_as_found(found)
    assert len(flight.scheduler.running) == 3
    flight.drain()


def test_values_beyond_the_limits_are_clamped(flight: Flown) -> None:
    flight.ask("r", 100, 40)
    flight.hold(max_running=0, step_token_budget=10_000, speculative_tokens=9)
    flight.step()
    assert flight.scheduler.max_num_active_reqs == 1
    assert flight.scheduler.max_num_scheduled_tokens == 256
    assert flight.scheduler.dynamic_sd_lookup is None
    flight.drain()


def test_a_record_tells_the_values_under_which_its_step_was_scheduled(fly: Fly) -> None:
    """Asynchronously the next step begins before a step ends."""
    flight = fly(ASYNC)
    flight.ask("r", 20, 60)
    for _ in range(4):
        flight.step()
    flight.hold(max_running=2)
    scheduled_before = len(flight.history)
    flight.step()
    assert flight.scheduler.max_num_active_reqs == 2
    assert flight.last["knob.max_running"] == 8
    assert flight.last["steps_total"] == scheduled_before
    flight.step()
    assert flight.last["knob.max_running"] == 2


def test_paused_streaming_sessions_cannot_lock_everybody_out(fly: Fly) -> None:
    """A paused session holds a slot, perhaps for ever; under a cap of one nobody else would ever run."""
    flight = fly(Make())
    session = flight.ask("session", 20, 4, resumable=True)
    while "session" not in flight.finished:
        flight.step()
    assert flight.scheduler.num_waiting_for_streaming_input == 1
    flight.hold(ttl_s=60, max_running=1)
    flight.ask("other", 20, 4)
    for _ in range(8):
        flight.step()
    assert "other" in flight.finished
    assert session.request_id in flight.scheduler.requests
