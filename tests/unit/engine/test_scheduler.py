"""What the scheduler promises about one step, without a model."""

from dataclasses import replace

import pytest

from kvengine.kv.pool import BlockPool
from kvengine.request import Request, SamplingParams
from kvengine.sched.admission import Limits, WaitingQueue, fits, refusal
from kvengine.sched.batch import Batch
from kvengine.sched.scheduler import Knobs, Scheduler

BLOCK = 4
KNOBS = Knobs(64, 64, 0, 8, 1.0)


def scheduler(blocks: int = 32, levels: int = 2) -> Scheduler:
    return Scheduler(BlockPool(blocks), BLOCK, levels)


def request(number: int, prompt: int = 8, output: int = 8, klass: int = 0) -> Request:
    return Request(number, [number % 200] * prompt, SamplingParams(output), klass, arrived_ns=number)


def commit(batch: Batch) -> None:
    """As if the model had run: slices are computed, sampled ones get a token, drafts are rejected."""
    for item in batch.slices:
        item.request.computed += item.count
        if item.samples:
            item.request.tokens.append(7)


def run(engine: Scheduler, knobs: Knobs = KNOBS, steps: int = 1) -> Batch:
    for _ in range(steps):
        batch = engine.schedule(knobs)
        commit(batch)
        engine.check()
    return batch


def served(batch: Batch) -> dict[int, int]:
    """Tokens of each request in the batch."""
    return {item.request.id: item.count + item.drafts for item in batch.slices}


def test_a_prompt_longer_than_the_chunk_is_computed_in_chunks() -> None:
    """Chunks follow one another, only the last samples, and all requests share one chunk budget."""
    engine = scheduler()
    engine.add(request(1, prompt=10))
    engine.add(request(2, prompt=3))
    knobs = replace(KNOBS, prefill_chunk_tokens=6)
    assert served(run(engine, knobs)) == {1: 6}
    assert served(run(engine, knobs)) == {1: 4, 2: 2}
    assert [item.decode for item in run(engine, knobs).slices] == [True, False]


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 17])
def test_no_step_exceeds_its_budget(budget: int) -> None:
    """Decodes, drafts and prompts together stay within the budget, in whole tokens, and always move on."""
    engine = scheduler(128)
    for number in range(1, 7):
        engine.add(request(number, prompt=5, output=100))
    knobs = Knobs(budget, 4, 3, 8, 1.0)
    for _ in range(60):
        batch = engine.schedule(knobs)
        assert 1 <= batch.tokens <= budget
        assert batch.prefill_tokens <= 4
        assert all(item.count >= 1 for item in batch.slices)
        commit(batch)
        assert engine.budget_limited == (batch.tokens == budget or batch.prefill_tokens == 4)


def test_decodes_beyond_the_budget_take_turns() -> None:
    """With more decodes than budget nobody starves: 5 decodes with 2 a step wait 3 steps at most."""
    engine = scheduler(64)
    for number in range(1, 6):
        engine.add(request(number, prompt=1, output=100))
    run(engine)
    last = dict.fromkeys(range(1, 6), 0)
    for step in range(1, 40):
        for number in served(run(engine, replace(KNOBS, step_token_budget=2))):
            last[number] = step
        assert step - min(last.values()) <= 3


def test_speculation_is_even_and_ends_with_the_output() -> None:
    """Every decode gets the same whole number of drafts, but none past its last token."""
    engine = scheduler()
    engine.add(request(1, output=10))
    engine.add(request(2, output=3))
    run(engine)
    batch = engine.schedule(replace(KNOBS, speculative_tokens=4))
    assert [item.drafts for item in batch.slices] == [4, 1]
    commit(batch)
    batch = engine.schedule(Knobs(7, 64, 4, 8, 1.0))
    assert [item.drafts for item in batch.slices] == [2, 0]


def test_drafts_leave_room_for_waiting_prompts() -> None:
    """While a prompt waits, drafts use at most half of what decodes leave of the budget."""
    engine = scheduler()
    for number in (1, 2):
        engine.add(request(number, output=30))
    run(engine)
    engine.add(request(3, prompt=30))
    batch = engine.schedule(Knobs(10, 64, 4, 8, 1.0))
    assert served(batch) == {1: 3, 2: 3, 3: 4}


def test_drafts_are_given_up_before_anybody_is_preempted() -> None:
    """A draft never costs another request its KV."""
    engine = scheduler(blocks=4)
    engine.add(request(1, prompt=7, output=9))
    engine.add(request(2, prompt=7, output=9))
    run(engine)
    batch = engine.schedule(replace(KNOBS, speculative_tokens=4))
    assert [item.drafts for item in batch.slices] == [0, 0]
    assert engine.preemptions_total == 0


def test_drafts_of_one_request_do_not_cost_another_its_kv() -> None:
    """One block is left: the first could draft into it, the second needs it for its next token."""
    engine = scheduler(blocks=3)
    engine.add(request(1, prompt=2))
    engine.add(request(2, prompt=4))
    run(engine)
    assert engine.pool.free == 1
    batch = run(engine, replace(KNOBS, speculative_tokens=3))
    assert served(batch) == {1: 1, 2: 4}
    assert engine.preemptions_total == 0


def test_growth_is_on_demand() -> None:
    """A request holds the blocks of what it has computed, not of what it may ask for."""
    engine = scheduler()
    engine.add(request(1, prompt=4, output=60))
    run(engine)
    (running,) = engine.running
    assert len(running.blocks) == 1
    run(engine, steps=5)
    assert len(running.blocks) == 3


def test_preemption_takes_the_lowest_class_admitted_last() -> None:
    """The victim is of the lowest class, of those the latest; its tokens stay, its KV goes."""
    engine = scheduler(blocks=6)
    for number, klass in ((1, 0), (2, 1), (3, 0)):
        engine.add(request(number, prompt=7, output=9, klass=klass))
    run(engine)
    run(engine)
    assert [r.id for r in engine.running] == [2, 1, 3]
    batch = run(engine)
    assert served(batch) == {2: 1, 1: 1}
    victim = engine.waiting.head
    assert (victim.id, victim.preemptions, victim.output_count, victim.computed) == (3, 1, 2, 0)
    assert victim.recompute_until == 8
    assert engine.kv_limited


def test_a_preempted_request_is_served_before_later_arrivals_of_its_class() -> None:
    """Preemption costs time, not the turn."""
    queue = WaitingQueue(levels=2)
    order = [request(5), request(3), request(4, klass=1), request(1), request(9, klass=1)]
    for item in order:
        queue.push(item)
    assert [item.id for item in queue] == [4, 9, 1, 3, 5]
    assert queue.waiting_by_level == [3, 2]
    assert queue.prompt_tokens == 40
    assert queue.remove(order[1])
    assert not queue.remove(order[1])
    assert [queue.pop().id for _ in range(4)] == [4, 9, 1, 5]
    assert queue.prompt_tokens_by_level == [0, 0]


def test_a_prompt_makes_room_among_decodes_already_in_the_step() -> None:
    """A victim that was to decode in this very step leaves it, and its tokens go back to the budget."""
    engine = scheduler(blocks=4)
    low = request(1, prompt=4, output=12)
    engine.add(low)
    run(engine, steps=2)
    assert len(low.blocks) == 2
    high = request(2, prompt=12, output=4, klass=1)
    engine.add(high)
    # Admission would not promise blocks that do not exist; a lowered and raised watermark is not needed:
    # put the prompt where a growing neighbour could have brought it.
    engine.waiting.remove(high)
    engine._start(high, 0)
    commit(Batch(engine._slices))
    engine.check()
    batch = run(engine)
    assert served(batch)[2] >= 1
    assert 1 not in served(batch)
    assert low in list(engine.waiting)
    assert batch.tokens == sum(served(batch).values())


def test_lowering_max_running_drains_and_never_preempts() -> None:
    engine = scheduler(64)
    for number in range(1, 6):
        engine.add(request(number, output=20))
    run(engine)
    assert len(engine.running) == 5
    run(engine, replace(KNOBS, max_running=2), steps=3)
    assert len(engine.running) == 5
    for running in list(engine.running)[:4]:
        engine.remove(running)
    engine.add(request(9))
    engine.add(request(10))
    run(engine, replace(KNOBS, max_running=2))
    assert len(engine.running) == 2


def test_nobody_is_let_in_on_blocks_that_a_running_prompt_still_needs() -> None:
    """Whoever comes next waits until the prompt in progress has all of its blocks, and only then counts."""
    engine = scheduler(blocks=8)
    engine.add(request(1, prompt=24))
    engine.add(request(2, prompt=12))
    run(engine, replace(KNOBS, prefill_chunk_tokens=4))
    assert [r.id for r in engine.running] == [1]
    run(engine, replace(KNOBS, prefill_chunk_tokens=16))
    assert not engine.kv_limited
    run(engine, replace(KNOBS, prefill_chunk_tokens=16))
    assert [r.id for r in engine.running] == [1]
    assert engine.kv_limited


def test_a_watermark_holds_admission_back_but_never_a_lone_request() -> None:
    engine = scheduler(blocks=8)
    engine.add(request(1, prompt=20))
    engine.add(request(2, prompt=4))
    low = replace(KNOBS, admission_watermark=0.5)
    run(engine, low)
    assert [r.id for r in engine.running] == [1]
    engine.remove(engine.running[0])
    run(engine, low)
    assert [r.id for r in engine.running] == [2]
    assert fits(9, 0, 8, 1.0, alone=True)
    assert not fits(5, 4, 8, 1.0, alone=False)
    assert fits(4, 4, 8, 1.0, alone=False)


@pytest.mark.parametrize(
    ("prompt", "output", "pool", "words"),
    [
        (0, 5, 100, "empty"),
        (5, 0, 100, "max_tokens is 0"),
        (50, 1, 100, "maximum context length is 50"),
        (49, 2, 100, "at most 1 tokens"),
        (40, 1, 40, "whole KV memory is 40"),
    ],
)
def test_the_door_says_why(prompt: int, output: int, pool: int, words: str) -> None:
    assert words in str(refusal(prompt, output, Limits(model_tokens=50, pool_tokens=pool)))


def test_the_door_lets_in_what_just_fits() -> None:
    assert refusal(49, 1, Limits(50, 50)) is None
