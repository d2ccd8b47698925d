"""KV in fewer bits: close to full precision, beside it in one pool, in exactly the memory that it says."""

import pytest
import torch
from llamas import BLOCKS, Bench, engine_model, reference_model

from kvengine.executor.torch import EagerExecutor
from kvengine.kv.precisions import FULL, Precisions, fine_packing, scale_bytes
from kvengine.kv.scales import Scales
from kvengine.kv.storage import KvStorage
from kvengine.memory import MIB, DeviceMemory
from kvengine.model.llama import Llama, Span
from kvengine.request import Request, SamplingParams
from kvengine.sched.batch import Batch, Slice
from kvkernels.geometry import Geometry
from kvkernels.precision import BF16, FP8, FP32, INT4, INT8, Precision
from kvkernels.scratch import Scratch

WITH_FP8 = Precisions(eight=FP8)
MODES = [(FULL, 2, 0.02), (WITH_FP8, 4, 0.1), (FULL, 4, 0.06), (FULL, 8, 0.6)]
"""Precisions, packing, and how far logits may be from full precision, in their standard deviations."""
NAMES = ["bf16", "fp8", "int8", "int4"]


@pytest.fixture(scope="module")
def model() -> Llama:
    return engine_model(reference_model(kv_heads=2))


def bench(model: Llama, precisions: Precisions = FULL) -> Bench:
    made = Bench.of(model)
    made.storage = KvStorage(model.config.layers, BLOCKS, model.geometry(16), "cpu", precisions)
    return made


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def decoded(made: Bench, text: list[int], blocks: list[int], packing: int, chunk: int = 40) -> torch.Tensor:
    """Logits after each token, most of them computed alone."""
    parts = [made.forward(Span(text[:chunk], 0, blocks, chunk, packing))]
    for position in range(chunk, len(text)):
        parts.append(made.forward(Span(text[position : position + 1], position, blocks, 1, packing)))
    return torch.cat(parts)


@pytest.mark.parametrize(("precisions", "packing", "bound"), MODES, ids=NAMES)
def test_logits_stay_close(model: Llama, precisions: Precisions, packing: int, bound: float) -> None:
    text = tokens(150)
    exact = decoded(bench(model), text, list(range(10)), 1)
    stored = decoded(bench(model, precisions), text, list(range(10)), packing)
    gap = (stored - exact).pow(2).mean().sqrt() / exact.std()
    assert 1e-4 < gap < bound  # exactly equal would mean that nothing was stored smaller


@pytest.mark.parametrize(("precisions", "packing", "bound"), MODES, ids=NAMES)
def test_tokens_take_exactly_the_bits_they_say(model, precisions, packing, bound) -> None:
    """A block holds `packing` times as many tokens, and all of them fit where one precision's did."""
    storage = bench(model, precisions).storage
    stored, own = storage.at(packing), storage.at(1)
    config = model.config
    assert stored.geometry.block_size == 16 * packing
    fine = 8 * 2 * config.kv_heads if precisions is WITH_FP8 else 0  # a byte for K and V of each head
    token_bits = config.layers * (config.kv_width * stored.precision.bits + fine)
    assert storage.block_bytes * 8 == token_bits * stored.geometry.block_size
    assert stored.blocks[0].data_ptr() == own.blocks[0].data_ptr()
    assert stored.tokens[0].shape[0] == packing * own.tokens[0].shape[0]


@pytest.mark.parametrize("precisions", [FULL, WITH_FP8], ids=["int8", "fp8"])
def test_precisions_share_a_batch_and_a_pool(model: Llama, precisions: Precisions) -> None:
    """Sequences of every precision in one pass are what each is alone."""
    texts = [tokens(70, seed) for seed in range(4)]
    blocks = [[7, 3, 21, 9, 5], [1, 8, 2], [0, 4], [6]]
    packings = [1, 2, 4, 8]
    together = bench(model, precisions)

    def spans(start: int, end: int) -> list[Span]:
        return [
            Span(text[start:end], start, table, 1, packing)
            for text, table, packing in zip(texts, blocks, packings, strict=True)
        ]

    for start, end in [(0, 33), (33, 69), (69, 70)]:
        rows = together.forward(*spans(start, end))
    for index in range(4):
        alone = bench(model, precisions)
        for start, end in [(0, 33), (33, 69), (69, 70)]:
            row = alone.forward(spans(start, end)[index])
        torch.testing.assert_close(rows[index], row[0], atol=2e-4, rtol=0)


def test_a_block_that_changes_its_precision_leaves_nothing_behind(model: Llama) -> None:
    """Codes of all ones are NaN as floats of any kind; tails of blocks are multiplied by zero."""
    fresh, used = bench(model, WITH_FP8), bench(model, WITH_FP8)
    for packing in (4, 1, 8, 2, 1):
        for layer in used.storage.memory:
            layer.fill_(0xFF)
        used.storage._packings = [4 if packing != 4 else 1] * BLOCKS
        used.storage._mixed = True
        text = tokens(9, packing)
        # Two spans of different lengths in one group: the shorter one's padding is looked at.
        for made in (fresh, used):
            made.forward(Span(text, 0, [3], 1, packing))
            made.forward(Span(tokens(30), 0, [5, 6], 1, packing))
        rows = [
            made.forward(Span(text[:1], 9, [3], 1, packing), Span(text[1:2], 30, [5, 6], 1, packing))
            for made in (fresh, used)
        ]
        assert torch.isfinite(rows[1]).all()
        torch.testing.assert_close(rows[0], rows[1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("precisions", [FULL, WITH_FP8], ids=["int8", "fp8"])
def test_copied_blocks_keep_their_precision(model: Llama, precisions: Precisions) -> None:
    made = bench(model, precisions)
    text = tokens(20)
    made.forward(Span(text, 0, [3], 1, 4))
    made.storage.copy([(3, 9)])
    expected = made.forward(Span([1], 20, [3], 1, 4))
    assert torch.equal(made.forward(Span([1], 20, [9], 1, 4)), expected)


@pytest.mark.parametrize(("packing", "precision"), [(4, INT8), (8, INT4), (4, FP8)])
def test_scales_that_grow_take_what_is_stored_along(packing: int, precision: Precision) -> None:
    """What was written before means the same as ever, to a step or two of the coarser scale."""
    geometry = Geometry(2, 2, 8, 16)
    precisions = WITH_FP8 if precision is FP8 else FULL
    storage = KvStorage(1, 4, geometry, "cpu", precisions)
    scratch = Scratch.for_geometries([geometry], 64, torch.device("cpu"))
    stored = storage.at(packing)
    small, large = torch.randn(16, 32), 9 * torch.randn(16, 32)
    storage.claim(packing, [2])
    first = torch.arange(2 * 16 * packing, 2 * 16 * packing + 32)
    stored.write(0, first[:16], small.clone(), scratch)
    before = meaning(stored, scratch)[first[:16]]
    stored.write(0, first[16:], large.clone(), scratch)
    after = meaning(stored, scratch)
    steps = stored.scales(0).flatten() * (448 / 16 if precision is FP8 else 1)  # fp8's step at its limit
    assert ((after[first[:16]] - before).abs() <= steps).all()
    assert ((after[first[:16]] - small).abs() <= 1.5 * steps).all()
    assert ((after[first[16:]] - large).abs() <= 0.51 * steps).all()


def meaning(stored, scratch: Scratch) -> torch.Tensor:
    """Every token slot of the first layer as floats."""
    from kvkernels.codec import Gather, fetched_scale

    table = torch.arange(len(stored.blocks[0]))
    gather = Gather(table, stored.geometry, stored.precision, scratch)
    gather.fetch(stored.blocks[0], stored.fine(0))
    floats = gather.floats.view(-1, stored.geometry.token_floats)
    return floats * stored.scales(0).flatten() * fetched_scale(stored.precision)


def test_no_value_is_ever_clipped_and_growth_is_rare() -> None:
    """Whatever comes in whatever order, scales reach it before it is stored."""
    geometry = Geometry(2, 2, 8, 16)
    scales = Scales(INT8, 1, geometry, "cpu")
    torch.manual_seed(1)
    grown = 0
    for _ in range(500):
        kv = torch.randn(3, 32)
        grown += scales.fit(0, kv) is not None
        codes = kv.view(3, 4, 8) * scales.inverse[0]
        assert codes.abs().max() <= 127.0001
    assert grown <= 8


def test_precision_of_a_lease() -> None:
    """Bits are rounded down to what there is; below that, the narrowest."""
    assert [FULL.packing(bits) for bits in (None, 32, 31, 16, 12, 8, 6, 4, 2)] == [1, 1, 2, 2, 4, 4, 8, 8, 8]
    half = Precisions(BF16)
    assert [half.packing(bits) for bits in (None, 32, 16, 8, 4)] == [1, 1, 1, 2, 4]
    assert [one.name for one in Precisions(INT8).offered] == ["int8", "int4"]
    assert [FULL.at(packing) for packing in (1, 2, 4, 8)] == [FP32, BF16, INT8, INT4]


@pytest.mark.parametrize("own", [BF16, INT8, INT4, FP8])
def test_a_pool_of_its_own_precision_is_charged_exactly(model: Llama, own: Precision) -> None:
    memory = DeviceMemory(64 * MIB)
    engine = EagerExecutor(model, None, memory, 40, 16, precisions=Precisions(own))
    storage = engine._target_kv
    assert 40 * storage.block_bytes == 40 * 16 * engine.footprint.kv_bytes_per_token
    pool, fine = sum(layer.nbytes for layer in storage.memory), storage.fine.nbytes
    assert pool + fine == 40 * storage.block_bytes
    assert pool * 32 == 40 * 16 * model.config.kv_bytes_per_token * own.bits
    assert fine * model.config.head_dim == (pool if own is FP8 else 0)
    kept = [stored._scales for stored in engine._target_kv._stored.values() if stored._scales is not None]
    held = sum(one._values.nbytes + one._reach.nbytes + one.inverse.nbytes for one in kept)
    assert held == scale_bytes(Precisions(own), model.config.layers, model.config.kv_width)


@pytest.mark.parametrize(("own", "packing"), [(FP32, 4), (BF16, 2), (FP8, 1)], ids=lambda one: str(one))
def test_a_pool_has_room_for_the_steps_of_every_vector_it_could_hold(own: Precision, packing: int) -> None:
    geometry, precisions = Geometry(2, 2, 8, 16), Precisions(own, FP8)
    storage = KvStorage(3, 4, geometry, "cpu", precisions)
    assert fine_packing(precisions) == packing
    assert storage.at(packing).fine(1).shape == (4, 2 * 2, 16 * packing)
    assert all(storage.at(one).fine(0) is None for one in (1, 2, 4) if one != packing and one <= packing)
    assert fine_packing(FULL) == 0
    assert KvStorage(3, 4, geometry, "cpu").fine.numel() == 0


def test_fine_scales_take_a_quarter_off_the_error_and_go_where_blocks_go() -> None:
    """Against the same codes under the scales of heads alone; copied twice, they mean the same."""
    geometry, scratch = Geometry(2, 2, 32, 16), Scratch(1 << 16, 64, torch.device("cpu"))
    storage = KvStorage(2, 6, geometry, "cpu", WITH_FP8)
    stored, plain = storage.at(4), KvStorage(2, 6, geometry, "cpu", WITH_FP8).at(4)
    torch.manual_seed(2)
    kv, slots = torch.randn(64, 128), torch.arange(64, 128)
    for layer in (0, 1):
        stored.write(layer, slots, kv.clone(), scratch)
    plain._fine = None
    plain.write(0, slots, kv.clone(), scratch)
    found, coarse = meaning(stored, scratch)[slots], meaning(plain, scratch)[slots]
    assert (found - kv).pow(2).mean() < 0.75**2 * (coarse - kv).pow(2).mean()
    storage.copy([(1, 5), (2, 0)])
    storage.copy([(5, 3)])
    assert torch.equal(meaning(stored, scratch)[192:256], found)
    for layer in (0, 1):
        assert torch.equal(stored.fine(layer)[3], stored.fine(layer)[1])
        assert stored.fine(layer)[1].unique().numel() > 64


@pytest.mark.parametrize("packing", [1, 2, 4, 8])
def test_drafts_change_nothing_at_any_precision(model: Llama, packing: int) -> None:
    """Both models' KV is packed alike; a draft that is the target always stands, at temperature 0."""
    outputs = []
    for drafts in (0, 3):
        engine = EagerExecutor(model, model, DeviceMemory(64 * MIB), 40, 16)
        request = Request(0, tokens(30), SamplingParams(60, 0.0))
        request.blocks, request.packing = list(range(90 // (16 * packing) + 1)), packing
        engine.execute(Batch([Slice(request, 0, 29)]))
        request.computed = 29
        while request.output_count < 40:
            wanted = min(drafts, 40 - request.output_count - 1)
            piece = Slice(request, request.computed, 1, wanted, samples=True, decode=True)
            (result,) = engine.execute(Batch([piece]))
            request.computed += 1 + result.accepted
            request.tokens += result.tokens
        outputs.append(request.tokens)
    assert outputs[0] == outputs[1]
