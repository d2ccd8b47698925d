"""With a real model: KV kept head by head is attention under a mask for each layer and head."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from llamas import engine_model, reference_model
from test_evict_output import BLOCK_SIZE, BLOCKS, KNOBS, Engine, text
from torch import Tensor

from kvengine.kv.eviction.heads import shares
from kvengine.kv.eviction.policy import Eviction
from kvengine.model.llama import Llama
from kvengine.request import Request, SamplingParams

LAYERS, HEADS, KV_HEADS, PROMPT, OUTPUT = 3, 4, 2, 100, 30
H2O = Eviction("h2o", sink=8, recent=16, heavy=16, by_head=True)

Seen = list[list[dict[int, list[int]]]]
"""By layer and KV head: which positions the query at each position saw."""


@pytest.fixture(scope="module")
def reference():
    return reference_model(kv_heads=KV_HEADS)


@pytest.fixture(scope="module")
def target(reference) -> Llama:
    return engine_model(reference)


def run(target: Llama, eviction: Eviction, chunk: int = 40) -> tuple[Request, Seen, Engine, list[int]]:
    engine = Engine(target)
    asked = Request(1, text(PROMPT), SamplingParams(OUTPUT, 0.0), eviction=eviction)
    seen: Seen = [[{} for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    for layer in seen:
        for head in layer:
            head.update({position: list(range(position + 1)) for position in range(PROMPT)})
    assert engine.core.accept(asked) is None
    held = []
    while engine.core.requests:
        engine.core.step(KNOBS.__class__(256, chunk, 0, 8, 1.0))
        engine.scheduler.check()
        if asked.heads is not None and asked.computed > PROMPT:
            held.append(engine.scheduler.pool.referenced)
            assert engine.scheduler.pool.referenced == asked.heads.blocks
            for layer, heads in enumerate(asked.heads.layers):
                for number, head in enumerate(heads):
                    seen[layer][number][asked.computed - 1] = list(head.positions)
    # What the last step saw is not noted: its tables are cleared when it ends.
    return asked, seen, engine, held


@contextmanager
def masked(reference, seen: Seen, count: int) -> Iterator[None]:
    hooks = []
    for layer, block in enumerate(reference.model.layers):
        mask = torch.full((1, HEADS, count, count), float("-inf"))
        for head in range(HEADS):
            rows = seen[layer][head // (HEADS // KV_HEADS)]
            for position in range(count):
                mask[0, head, position, rows[position]] = 0.0

        def put(_module, args, kwargs, mask=mask):
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(block.self_attn.register_forward_pre_hook(put, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def attentions(reference, prompt: list[int]) -> list[Tensor]:
    """By layer [kv_heads, rows, columns], summed over the query heads that share KV."""
    reference.set_attn_implementation("eager")
    try:
        found = reference(torch.tensor([prompt]), output_attentions=True).attentions
    finally:
        reference.set_attn_implementation("sdpa")
    return [layer[0].view(KV_HEADS, -1, *layer.shape[2:]).sum(1) for layer in found]


FASTGEN = Eviction("fastgen", sink=4, recent=16, heavy=16, recovery=0.42)


@pytest.mark.parametrize("eviction", [H2O, FASTGEN], ids=["h2o", "fastgen"])
def test_evicted_by_head_output_is_attention_over_what_each_head_keeps(reference, target, eviction) -> None:
    asked, seen, engine, _held = run(target, eviction)
    tokens = asked.tokens[:-2]
    with torch.inference_mode(), masked(reference, seen, len(tokens)):
        logits = reference(torch.tensor([tokens])).logits[0, PROMPT - 1 :]
    picked = logits.gather(1, torch.tensor(asked.tokens[PROMPT:-1]).unsqueeze(1)).squeeze(1)
    assert (logits.max(-1).values - picked).max() < 1e-4
    with torch.inference_mode():
        full = reference(torch.tensor([tokens])).logits[0, PROMPT - 1 :]
    assert (full - logits).abs().max() > 0.1, "what was evicted made no difference"
    assert engine.scheduler.pool.free == BLOCKS


def test_evicted_by_head_heavy_hitters_are_each_head_s_own(reference, target) -> None:
    """40 tokens of each head in five blocks of eight: sink, recent and the top sixteen of its own scores."""
    _asked, seen, _engine, held = run(target, H2O)
    assert set(held) == {5}
    drawn = [layer.sum(1) for layer in attentions(reference, text(PROMPT))]
    chosen = set()
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            kept = [*range(8), *range(PROMPT - 16, PROMPT)]
            heavy = (drawn[layer][head][8 : PROMPT - 16].topk(16).indices + 8).tolist()
            first = seen[layer][head][PROMPT]
            assert len(first) == 40
            assert len(set(first) ^ {*kept, *heavy, PROMPT}) == 1, "one made room for the new token"
            chosen.add(tuple(sorted(heavy)))
    assert len(chosen) >= 2, "heads that differ"


@pytest.mark.parametrize("recovery", [0.3, 0.42, 0.6, 1.0])
def test_evict_fastgen_takes_the_cheapest_policy_that_keeps_enough(reference, target, recovery) -> None:
    """Of the attention of the prompt's last 20 tokens (a chunk of 40 ends there): recomputed from the
    reference, head by head; blocks follow from what was chosen.
    """
    eviction = Eviction("fastgen", sink=4, recent=16, heavy=16, recovery=recovery)
    asked, seen, _engine, held = run(target, eviction)
    options, sizes = shares(eviction), []
    for layer, weights in enumerate(attentions(reference, text(PROMPT))):
        for head in range(KV_HEADS):
            drawn, last = weights[head].sum(0).tolist(), weights[head][-20:] / (HEADS // KV_HEADS)
            for share in options:
                static = [one for one in share.keeps(drawn) if one < PROMPT - share.recent or share.all]
                total = 0.0
                for number, row in enumerate(last):
                    position = PROMPT - 20 + number
                    band = range(position - share.recent + 1, position + 1)
                    total += row[sorted({*static, *band} & {*range(position + 1)})].sum().item()
                if share.all or total / 20 >= recovery:
                    break
            sizes.append(len(seen[layer][head][PROMPT]))
            assert sizes[-1] == (PROMPT + 1 if share.all else share.limit)
    assert held[0] == -(-sum(-(-size // BLOCK_SIZE) for size in sizes) // len(sizes))
    if recovery == 1.0:
        assert set(sizes) == {PROMPT + 1}
        plain = Request(1, text(PROMPT), SamplingParams(OUTPUT, 0.0))
        Engine(target).run(plain)
        assert asked.tokens == plain.tokens
    if recovery == 0.42:
        assert len(set(sizes)) >= 2, "heads that differ"


def test_evict_by_head_is_refused_for_several_choices(target) -> None:
    engine = Engine(target)
    asked, other = (Request(n, text(20), SamplingParams(4), eviction=H2O) for n in (1, 2))
    asked.add_forks([other])
    assert "one choice, and 2 are asked for" in str(engine.core.accept(asked))


def test_evict_by_head_runs_beside_others_and_after_preemption(target) -> None:
    """Mixed batches; what others compute is what they compute alone; all blocks come back."""
    plain, alone = (Request(9, text(60, 4), SamplingParams(OUTPUT, 0.0)) for _ in range(2))
    Engine(target).run(alone)
    engine = Engine(target, blocks=30)
    several = [
        Request(number, text(PROMPT, number), SamplingParams(OUTPUT, 0.0), eviction=eviction)
        for number, eviction in enumerate([H2O, FASTGEN, Eviction("window", 8, 16)])
    ]
    engine.run(*several, plain)
    assert plain.tokens == alone.tokens
    assert engine.scheduler.pool.free + engine.scheduler.pool.cached == 30
    for one in several[:2]:
        assert one.output_count == OUTPUT
        single = Request(1, text(PROMPT, one.id), SamplingParams(OUTPUT, 0.0), eviction=one.eviction)
        Engine(target).run(single)
        assert single.preemptions or one.preemptions or single.tokens == one.tokens
