"""Paged attention as engines call it, against the slow reference that says what it means."""

import random

import pytest
import torch

from kvkernels import attention, reference
from kvkernels.cpu import grouped
from kvkernels.geometry import GATHER_BYTES, TILE_ROWS, Geometry, Span
from kvkernels.precision import BF16, FP8, INT4, INT8, Precision
from kvkernels.scratch import Scratch

MAX_CONTEXT = 320


def ragged(
    rng: random.Random, blocks: int, block_size: int, singles: list[int], chunks: list[tuple[int, int]]
):
    """Spans over shuffled blocks: `singles` are contexts, `chunks` are (count, context)."""
    free = rng.sample(range(blocks), blocks)
    spans, row = [], 0
    for count, context in [*((1, context) for context in singles), *chunks]:
        table = [free.pop() for _ in range(-(-context // block_size))]
        spans.append(Span(row, count, context, table))
        row += count
    return spans, row


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(
    ("singles", "chunks"),
    [
        ([1], []),
        ([40, 40, 40], []),
        ([1, 2, 15, 16, 17, 33, 300], []),
        ([], [(7, 7), (5, 90), (TILE_ROWS + 3, 200)]),
        ([3, 64], [(2, 65), (17, 40)]),
    ],
)
def test_matches_the_reference(heads, kv_heads, block_size, singles, chunks) -> None:
    rng = random.Random(f"{heads}/{block_size}/{singles}")
    torch.manual_seed(heads * block_size)
    geometry = Geometry(heads, kv_heads, 8, block_size)
    spans, rows = ragged(rng, 64, block_size, singles, chunks)
    pool = torch.randn(64, block_size, 2, kv_heads, 8)
    query, out = torch.randn(rows, heads, 8), torch.full((rows, heads, 8), float("nan"))
    scratch = Scratch.for_geometries([geometry], MAX_CONTEXT, torch.device("cpu"))
    scratch.gathered.fill_(1e6)  # what an earlier step left behind must not matter
    attention.PagedAttention(spans, geometry, scratch, query, out).attend(pool.view(64, -1))
    torch.testing.assert_close(out, reference.attend(query, pool, spans), atol=2e-6, rtol=0)


def test_order_of_spans_does_not_matter() -> None:
    """Singles may come unsorted and between chunks; only speed depends on order."""
    geometry = Geometry(4, 2, 8, 16)
    spans = [
        Span(0, 1, 50, [3, 1, 9, 0]),
        Span(1, 3, 20, [4, 2]),
        Span(4, 1, 5, [7]),
        Span(5, 1, 33, [8, 6, 5]),
    ]
    pool, query = torch.randn(10, 16, 2, 2, 8), torch.randn(6, 4, 8)
    out = torch.zeros_like(query)
    scratch = Scratch.for_geometries([geometry], 64, torch.device("cpu"))
    attention.PagedAttention(spans, geometry, scratch, query, out).attend(pool.view(10, -1))
    torch.testing.assert_close(out, reference.attend(query, pool, spans), atol=2e-6, rtol=0)


def test_table_may_be_longer_than_the_context_needs() -> None:
    """Blocks reserved for tokens to come are not read."""
    geometry = Geometry(2, 2, 8, 16)
    pool, query = torch.randn(6, 16, 2, 2, 8), torch.randn(4, 2, 8)
    pool[5] = float("nan")
    spans = [Span(0, 1, 16, [0, 5]), Span(1, 1, 30, [1, 2, 5, 5]), Span(2, 2, 16, [3, 5])]
    out = torch.zeros_like(query)
    scratch = Scratch.for_geometries([geometry], 64, torch.device("cpu"))
    attention.PagedAttention(spans, geometry, scratch, query, out).attend(pool.view(6, -1))
    torch.testing.assert_close(out, reference.attend(query, pool, spans), atol=2e-6, rtol=0)


def test_write_puts_tokens_where_the_reference_does() -> None:
    fast, slow = torch.zeros(4, 16, 2, 3, 8), torch.zeros(4, 16, 2, 3, 8)
    kv = torch.randn(5, 2, 3, 8)
    slots = Span(0, 5, 18, [2, 0]).slots(16)
    assert slots == [2 * 16 + 13, 2 * 16 + 14, 2 * 16 + 15, 0, 1]
    scratch = Scratch(64, 16, torch.device("cpu"))
    attention.write(fast.view(64, -1), torch.tensor(slots), kv.view(5, -1), 8, scratch)
    reference.write(slow, slots, kv)
    assert torch.equal(fast, slow)
    assert Span(0, 1, 18, [2, 0]).slots(16) == [1]


@pytest.mark.parametrize("seed", range(20))
def test_groups_cover_all_in_order_and_fit_the_scratch(seed: int) -> None:
    rng = random.Random(seed)
    geometry = Geometry(4, 4, 32, 16)
    contexts = sorted(rng.randint(1, rng.choice([40, 400, 4000])) for _ in range(rng.randint(1, 300)))
    spans = [Span(row, 1, context, range(-(-context // 16))) for row, context in enumerate(contexts)]
    groups = list(grouped(spans, geometry))
    assert [span for group in groups for span in group] == spans
    for group in groups:
        widest = max(geometry.blocks_for(span.context) for span in group)
        assert len(group) == 1 or len(group) * widest * geometry.block_floats * 4 <= GATHER_BYTES
        assert len(group) <= TILE_ROWS


def test_blocks_larger_than_a_gather_are_taken_one_sequence_at_a_time() -> None:
    geometry = Geometry(8, 8, 128, 512)
    assert geometry.block_floats * 4 > GATHER_BYTES
    spans = [Span(row, 1, 9, [row]) for row in range(3)]
    assert [list(group) for group in grouped(spans, geometry)] == [[span] for span in spans]


@pytest.mark.parametrize("precision", [BF16, FP8, INT8, INT4], ids=lambda one: one.name)
@pytest.mark.parametrize("count", [1, 3])
def test_a_context_may_fill_the_scratch(precision: Precision, count: int) -> None:
    """The longest sequence takes all of it, in codes and as floats."""
    geometry = Geometry(2, 2, 8, 16)
    blocks = 128
    scratch = Scratch(blocks * geometry.block_floats, blocks * 16, torch.device("cpu"))
    kv, scales = torch.randn(blocks * 16, 4, 8), torch.ones(4, 8) / 16
    stored = reference.codes(kv, scales, precision).view(blocks, -1)
    meant = reference.values(stored.view(blocks * 16, -1), scales, precision, 8)
    spans = [Span(0, count, blocks * 16, list(range(blocks)))]
    query, out = torch.randn(count, 2, 8), torch.zeros(count, 2, 8)
    expected = reference.attend(query, meant.view(blocks, 16, 2, 2, 8), spans)
    paged = attention.PagedAttention(spans, geometry, scratch, query, out, precision)
    paged.attend(stored, scales.view(2, 2, 1, 8) if precision.scaled else None)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_causal_mask_is_the_same_at_every_offset() -> None:
    scratch = Scratch(1, 300, torch.device("cpu"))
    for start, rows in [(0, 1), (0, 128), (17, 5), (172, 128), (299, 1)]:
        mask = scratch.causal(start, rows)[0, 0]
        seen = torch.arange(start + rows) <= torch.arange(start, start + rows).unsqueeze(1)
        assert torch.equal(mask == 0, seen)
        assert torch.equal(mask.isneginf(), ~seen)
