"""The forward pass is transformers' Llama, however the work is cut and wherever the KV lies."""

import random

import pytest
import torch
from llamas import Bench, engine_model, reference_model

from kvengine.model.llama import Span

TOLERANCE = 1e-5
TOKENS = [random.Random(1).randrange(97) for _ in range(120)]


def table(blocks: int = 8, seed: int = 0) -> list[int]:
    return random.Random(seed).sample(range(64), blocks)


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() <= TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7, 16, 17, 120])
@pytest.mark.parametrize(
    "shape",
    [
        {"kv_heads": 4, "tied": True},
        {"kv_heads": 2, "tied": False},
        {"kv_heads": 1, "tied": True, "head_dim": 24},
    ],
    ids=["mha-tied", "gqa", "mqa-wide-heads"],
)
def test_logits_are_those_of_transformers(shape: dict, chunk: int) -> None:
    reference = reference_model(**shape)
    with torch.inference_mode():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    assert expected.std() > 0.1  # logits that are all alike would prove nothing
    logits = Bench.of(engine_model(reference)).prefill(TOKENS, table(), chunk)
    assert close(logits, expected)


def test_late_positions_rotate_like_transformers() -> None:
    """Angles are fp32 there, so they must be here: at position 500 a more exact angle already differs."""
    reference = reference_model()
    tokens = [random.Random(2).randrange(97) for _ in range(512)]
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    assert close(Bench.of(engine_model(reference)).prefill(tokens, table(32), 512), expected)


@pytest.mark.parametrize("chunk", [1, 7, 16, 17])
def test_paged_is_contiguous(chunk: int) -> None:
    """Shuffled small blocks and one block that holds everything give the same logits."""
    model = engine_model(reference_model(kv_heads=2))
    paged = Bench.of(model, block_size=16).prefill(TOKENS, table(), chunk)
    contiguous = Bench.of(model, block_size=512).prefill(TOKENS, [1], chunk)
    assert close(paged, contiguous)


def test_mixed_batch_is_separate_batches() -> None:
    """Prefill chunks, decodes and drafts to verify in one pass give what each gives alone, logits and KV."""
    model = engine_model(reference_model(kv_heads=2))
    rng = random.Random(3)
    free = rng.sample(range(64), 64)
    spans = []
    # (already computed, new tokens, logits wanted); order mixes kinds on purpose
    for start, count, logits in [
        (30, 1, 1),
        (0, 40, 0),
        (17, 5, 5),
        (60, 1, 1),
        (33, 20, 1),
        (15, 2, 2),
        (8, 1, 1),
    ]:
        blocks = [free.pop() for _ in range(-(-(start + count) // 16))]
        spans.append((Span([rng.randrange(97) for _ in range(count)], start, blocks, logits), start))
    together, apart = Bench.of(model), Bench.of(model)
    for bench in (together, apart):
        for number, (span, start) in enumerate(spans):
            history = [random.Random(number).randrange(97) for _ in range(start)]
            if history:
                bench.forward(Span(history, 0, span.blocks, 0))
    mixed = together.forward(*(span for span, _ in spans))
    alone = torch.cat([apart.forward(span) for span, _ in spans if span.logits] or [])
    for span, _ in spans:
        if not span.logits:
            apart.forward(span)
    assert mixed.shape == (11, 97)
    assert close(mixed, alone)
    for layer, other in zip(together.storage.tokens, apart.storage.tokens, strict=True):
        assert close(layer, other)


def test_drafts_verified_at_once_are_tokens_decoded_one_by_one() -> None:
    model = engine_model(reference_model())
    at_once, one_by_one = Bench.of(model), Bench.of(model)
    blocks = table()
    for bench in (at_once, one_by_one):
        bench.forward(Span(TOKENS[:50], 0, blocks, 0))
    verified = at_once.forward(Span(TOKENS[50:55], 50, blocks, 5))
    decoded = torch.cat([one_by_one.forward(Span(TOKENS[p : p + 1], p, blocks, 1)) for p in range(50, 55)])
    assert close(verified, decoded)


def test_what_a_block_held_before_does_not_matter() -> None:
    """Blocks are handed on without being cleared."""
    model = engine_model(reference_model())
    clean, used = Bench.of(model), Bench.of(model)
    used.prefill(TOKENS[::-1], table(), 120)
    assert close(used.prefill(TOKENS[:70], table(), 16), clean.prefill(TOKENS[:70], table(), 16))
