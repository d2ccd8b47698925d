"""The knob kv_element_bits: newcomers take fewer bits, so fewer blocks, and share with their like."""

import random
from dataclasses import replace

import pytest

from kvengine.config import EngineConfig
from kvengine.errors import ConfigError
from kvengine.kv.plan import Plan
from kvengine.kv.pool import BlockPool
from kvengine.kv.precisions import FULL
from kvengine.kv.tree import PrefixTree
from kvengine.manifest import build_manifest
from kvengine.request import Request, SamplingParams
from kvengine.sched.scheduler import Knobs, Scheduler

BLOCK = 4
KNOBS = Knobs(64, 64, 0, 8, 1.0)


def scheduler(blocks: int = 64, cached: bool = False) -> Scheduler:
    pool = BlockPool(blocks)
    tree = PrefixTree(pool, BLOCK, "model") if cached else None
    return Scheduler(pool, BLOCK, 1, tree, FULL)


def request(number: int, prompt: int = 32, output: int = 40) -> Request:
    return Request(number, [5] * prompt, SamplingParams(output), arrived_ns=number)


def step(engine: Scheduler, knobs: Knobs) -> None:
    """As if the model had run."""
    for item in engine.schedule(knobs).slices:
        item.request.computed += item.count
        if item.samples:
            item.request.tokens.append(7)
        engine.tables.register(item.request)
    engine.check()


def blocks_of(one: Request) -> int:
    return len(one.blocks)


def test_those_that_run_keep_theirs_and_newcomers_take_fewer_blocks() -> None:
    engine = scheduler()
    for number, bits in enumerate((32, 16, 8, 4, None)):
        engine.add(request(number))
        step(engine, replace(KNOBS, kv_element_bits=bits))
    held = {one.id: (one.packing, -(-one.computed // (BLOCK * one.packing))) for one in engine.running}
    assert [held[number][0] for number in range(5)] == [1, 2, 4, 8, 1]
    assert {one.id: blocks_of(one) for one in engine.running} == {
        n: blocks for n, (_, blocks) in held.items()
    }
    assert [held[number][1] for number in range(5)] == [9, 5, 3, 2, 8]


def test_a_lower_precision_lets_more_in() -> None:
    """Sixteen prompts of 32 tokens fill 128 blocks of 4; in a quarter of the bits they fit in 32."""
    admitted = {}
    for bits in (32, 8):
        engine = scheduler(blocks=36)
        for number in range(16):
            engine.add(request(number, output=1))
        engine.schedule(Knobs(4096, 4096, 0, 64, 1.0, bits))
        admitted[bits] = len(engine.running)
    assert admitted == {32: 4, 8: 16}


def test_a_preempted_sequence_comes_back_at_the_precision_of_the_day() -> None:
    engine = scheduler(blocks=12)
    for number in (1, 2):
        engine.add(request(number, prompt=20))
    step(engine, KNOBS)
    while not engine.preemptions_total:
        step(engine, KNOBS)
    (waiting,) = engine.waiting
    for _ in range(3):
        step(engine, replace(KNOBS, kv_element_bits=8))
    assert waiting in engine.running
    assert [one.packing for one in engine.running] == [1, 4]


def test_a_prefix_is_shared_within_a_precision_only() -> None:
    """The same tokens in other bits are other KV; a block of packed ones is found by its longer prefix."""
    engine = scheduler(cached=True)
    for number, bits in enumerate((32, 8, 32, 8)):
        engine.add(request(number, prompt=50))
        step(engine, replace(KNOBS, kv_element_bits=bits))
    wide, narrow, wide_again, narrow_again = sorted(engine.running, key=lambda one: one.id)
    assert wide.blocks[:12] == wide_again.blocks[:12]
    assert narrow.blocks[:3] == narrow_again.blocks[:3]
    assert not set(wide.blocks) & set(narrow.blocks)
    assert engine.pool.shared == 12 + 3


@pytest.mark.parametrize("seed", range(6))
def test_accounts_agree_whatever_the_knob_does(seed: int) -> None:
    """Random arrivals, ends, preemptions and precisions: no block is in two precisions at once."""
    rng = random.Random(seed)
    engine, number = scheduler(blocks=24, cached=True), 0
    for _ in range(300):
        if len(engine.waiting) < 3:
            number += 1
            engine.add(request(number, prompt=rng.randint(1, 40), output=rng.randint(1, 40)))
        before = {one.id: (one.packing, one.preemptions) for one in engine.running}
        step(engine, replace(KNOBS, kv_element_bits=rng.choice([None, 32, 16, 8, 4])))
        packing_of: dict[int, int] = {}
        for one in list(engine.running):
            assert before.get(one.id, (one.packing, one.preemptions))[0] == one.packing or (
                before[one.id][1] < one.preemptions
            )
            assert all(packing_of.setdefault(block, one.packing) == one.packing for block in one.blocks)
            if one.output_left <= 0 or rng.random() < 0.02:
                engine.remove(one)
    assert engine.preemptions_total > 0
    assert engine.tables.hit_tokens_total > 0


def manifest(**changes):
    config = EngineConfig(**changes)
    division = Plan(1 << 28, 1 << 20, 16, 1 << 15, 100, 1 << 20)
    return build_manifest(
        config, division, fields=(), max_model_len=64, activation_bytes_per_token=1, device="cpu"
    )


def test_the_manifest_offers_the_range() -> None:
    knob = next(knob for knob in manifest().knobs if knob.name == "kv_element_bits")
    assert (knob.minimum, knob.maximum, knob.baseline) == (4, 32, 32)
    assert (
        "8 (fp8)"
        in next(
            knob for knob in manifest(kv_eight_bits="fp8").knobs if knob.name == "kv_element_bits"
        ).applied
    )
    narrow = manifest(kv_dtype="int4")
    assert "narrowest" in narrow.unsupported_knobs["kv_element_bits"]
    assert all(knob.name != "kv_element_bits" for knob in narrow.knobs)


def test_unknown_dtypes_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="kv_dtype=int3: choose one of fp32, bf16, fp8, int8, int4"):
        EngineConfig(kv_dtype="int3")
    with pytest.raises(ConfigError, match="kv_eight_bits=int4: choose int8 or fp8"):
        EngineConfig(kv_eight_bits="int4")
