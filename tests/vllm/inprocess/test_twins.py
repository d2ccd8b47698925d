"""Scheduling under a hook is scheduling without one: at baseline, and whatever breaks inside the hook."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from flown import Flown
from plane import BLOCK, Make, Plane

Fly = Callable[..., Flown]
FlyAlone = Callable[..., Plane]
Said = Callable[[], list[str]]

SYNC = Make(drafts=3, blocks=24, max_num_seqs=6, max_num_batched_tokens=96, max_model_len=256)
MAKES = {"sync": SYNC, "async": replace(SYNC, asynchronous=True)}
EVERYTHING = {
    "step_token_budget": 40,
    "prefill_chunk_tokens": 20,
    "speculative_tokens": 1,
    "max_running": 3,
    "admission_watermark": 0.7,
}


def script(flight: Plane, steps: int, seed: int = 1, aborts: bool = True) -> None:
    """The same arrivals, aborts and hits for every flight."""
    rng = random.Random(seed)
    shared = [rng.randrange(4, 500) for _ in range(48)]
    for number in range(steps):
        if rng.random() < 0.4:
            own = [rng.randrange(4, 500) for _ in range(rng.randint(1, 60))]
            flight.ask(f"{seed}-{number}", [*shared[: BLOCK * rng.randint(0, 3)], *own], rng.randint(1, 70))
        if aborts and rng.random() < 0.05 and flight.scheduler.requests:
            flight.abort(rng.choice(sorted(flight.scheduler.requests)))
        flight.step()


def accept_by_name(request_id: str, drafts: int) -> int:
    return sum(map(ord, request_id)) % (drafts + 1)


def decisions(flight: Plane, begin: int = 0) -> list[Any]:
    """What was scheduled from step `begin` on, in full."""
    return [
        (
            list(output.num_scheduled_tokens.items()),
            {key: len(tokens) for key, tokens in output.scheduled_spec_decode_tokens.items()},
            [(new.req_id, new.block_ids, new.num_computed_tokens) for new in output.scheduled_new_reqs],
            output.scheduled_cached_reqs.new_block_ids,
            output.preempted_req_ids,
            output.num_spec_tokens_to_schedule,
        )
        for output in flight.history[begin:]
    ]


def assert_twins(flight: Plane, alone: Plane, begin: int = 0) -> None:
    assert decisions(flight, begin) == decisions(alone, begin)
    assert flight.outputs == alone.outputs
    assert flight.finished == alone.finished


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_at_baseline_nothing_is_different(fly: Fly, fly_alone: FlyAlone, make: Make) -> None:
    flight, alone = fly(make), fly_alone(make)
    for each in (flight, alone):
        each.accept = accept_by_name
        script(each, 150)
        each.drain()
    assert flight.last["preemptions_total"] > 0
    assert_twins(flight, alone)


def raising(*_arguments: object, **_named: object) -> Any:
    raise ZeroDivisionError("planted")


INSIDE = {
    "schedule, before": ("hook", "begin_step"),
    "schedule, after": ("recorder", "scheduled"),
    "update, before": ("recorder", "counts"),
    "update, after": ("recorder", "updated"),
    "add_request": ("recorder", "added"),
    "finish_requests": ("recorder", "left"),
    "_free_request": ("recorder", "freed"),
    "_preempt_request": ("recorder", "preempted"),
    "the scan": ("recorder.scan", "look"),
    "the sweep": ("recorder.sweep", "advance"),
    "emissions": ("recorder.emissions", "step"),
    "prefills": ("recorder.prefills", "scheduled"),
    "the record": ("recorder", "_write"),
    "histograms": ("hook", "_flush"),
    "the page": ("hook._telemetry", "write_packed"),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("where", INSIDE)
def test_a_failure_anywhere_ends_the_hook_and_nothing_else(
    fly: Fly, fly_alone: FlyAlone, said: Said, make: Make, where: str
) -> None:
    flight, alone = fly(make), fly_alone(make)
    found = flight.knob_state()
    for each in (flight, alone):
        each.accept = accept_by_name
        script(each, 30)
    # Not so far away from baseline that nobody would be preempted any more.
    flight.hold(ttl_s=60, step_token_budget=90, speculative_tokens=1)
    owner: Any = flight.attachment
    path, method = INSIDE[where]
    for name in path.split("."):
        owner = getattr(owner, name)
    setattr(owner, method, raising)
    for each in (flight, alone):
        script(each, 120, seed=2, aborts=False)
        each.ask("gone", 20, 20)
        each.abort("gone")
        each.drain()
    assert flight.is_as_found(found)
    assert flight.wrapped == set()
    assert not flight.hook.enabled
    assert flight.attachment.failures + flight.hook.failures >= 1
    assert len([line for line in said() if "failed" in line]) == 1
    # A knob may have been in force for a step before the failure: what is the same is what comes out.
    assert {key: len(tokens) for key, tokens in flight.outputs.items()} == {
        key: len(tokens) for key, tokens in alone.outputs.items()
    }
    assert flight.finished == alone.finished


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("where", INSIDE)
def test_after_a_failure_scheduling_is_that_of_a_twin_without_a_hook(
    fly: Fly, fly_alone: FlyAlone, make: Make, where: str
) -> None:
    flight, alone = fly(make), fly_alone(make)
    owner: Any = flight.attachment
    path, method = INSIDE[where]
    for each in (flight, alone):
        each.accept = accept_by_name
        script(each, 40)
    for name in path.split("."):
        owner = getattr(owner, name)
    setattr(owner, method, raising)
    for each in (flight, alone):
        script(each, 120, seed=2)
        each.drain()
    assert_twins(flight, alone)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("when", ["apply", "each_step"])
@pytest.mark.parametrize("knob", EVERYTHING)
def test_a_knob_that_fails_is_disabled_alone(fly: Fly, said: Said, make: Make, knob: str, when: str) -> None:
    flight = fly(make)
    found = flight.knob_state()
    flight.ask("r", 60, 60)
    port = next(port for port in flight.attachment.ports if port.name == knob)
    setattr(port, when, raising)
    flight.hold(ttl_s=60, **EVERYTHING)
    for _ in range(4):
        flight.step()
    baselines = {knob.name: knob.baseline for knob in flight.reader.manifest.knobs}
    record = flight.last
    assert record[f"knob.{knob}"] == baselines[knob]
    for other, value in EVERYTHING.items():
        if other != knob:
            assert record[f"knob.{other}"] == pytest.approx(value)
    assert flight.hook.enabled
    assert flight.attachment.failures == 1
    assert len([line for line in said() if knob in line]) == 1
    flight.release()
    flight.step()
    assert flight.is_as_found(found)
    flight.drain()
    assert flight.finished == {"r": "length"}


def test_an_exception_of_vllms_own_passes_and_is_left_as_last_words(fly: Fly) -> None:
    flight = fly(SYNC)
    flight.ask("r", 20, 20)
    flight.step()
    flight.scheduler.kv_cache_manager.new_step_starts = raising
    with pytest.raises(ZeroDivisionError, match="planted"):
        flight.step()
    ending = flight.reader.ending()
    assert ending is not None
    assert ending.kind == "exception"
    assert ending.what.startswith("ZeroDivisionError\n")
    assert "planted" not in ending.what


def test_a_shutdown_in_order_says_so_and_puts_everything_back(fly: Fly) -> None:
    flight = fly(SYNC)
    found = flight.knob_state()
    flight.ask("r", 20, 20)
    flight.hold(**EVERYTHING)
    flight.step()
    flight.scheduler.shutdown()
    ending = flight.reader.ending()
    assert ending is not None
    assert ending.kind == "closed"
    assert flight.is_as_found(found)
    assert flight.wrapped == set()
