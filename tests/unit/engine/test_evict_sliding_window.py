"""A model with a sliding window: attention is that of `transformers`' Mistral, what it never sees is free."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llamas import Bench
from test_evict_output import BLOCK_SIZE, BLOCKS, KNOBS, Engine, text
from transformers import MistralConfig, MistralForCausalLM

from kvengine.assemble import assemble
from kvengine.config import EngineConfig
from kvengine.errors import StartError
from kvengine.kv.eviction.policy import Eviction, Offer
from kvengine.model import weights
from kvengine.model.config import ModelConfig
from kvengine.model.llama import Llama, Span
from kvengine.request import Request, SamplingParams

WINDOW = 37


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=104,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=WINDOW,
        tie_word_embeddings=False,
    )
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "embed" not in name:
                parameter.mul_(4.0)
    where = tmp_path_factory.mktemp("mistral")
    model.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def target(directory: Path) -> Llama:
    config = ModelConfig.load(directory)
    assert config.sliding_window == WINDOW
    return Llama(config, weights.load(directory, config))


@pytest.fixture(scope="module")
def reference(directory: Path) -> MistralForCausalLM:
    return MistralForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def edited(directory: Path, target: Path, **changes: object) -> Path:
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    raw = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**raw, **changes}))
    return target


@pytest.mark.parametrize("chunk", [1, 7, 40, 300])
def test_logits_under_a_sliding_window_are_the_reference_s(reference, target, chunk: int) -> None:
    tokens = text(300)
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    logits = Bench.of(target).prefill(tokens, list(range(19)), chunk)
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
    wide = Llama(replace(target.config, sliding_window=None), target._weights)
    assert (Bench.of(wide).prefill(tokens, list(range(19)), chunk) - expected).abs().max() > 0.1


def test_ragged_sequences_share_a_batch_under_a_sliding_window(target) -> None:
    alone, together = Bench.of(target), Bench.of(target)
    lengths = [5, 37, 38, 90, 200]
    tables = [[0], [1, 2, 3], [4, 5, 6], list(range(7, 13)), list(range(20, 33))]
    expected, spans = [], []
    for number, (length, table) in enumerate(zip(lengths, tables, strict=True)):
        for bench in (alone, together):
            bench.prefill(text(length, number), table, 300)
        spans.append(Span([7], length, table))
        expected.append(alone.forward(spans[-1])[0])
    torch.testing.assert_close(together.forward(*spans), torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("chunk", "drafts"), [(256, 0), (24, 0), (24, 3)])
def test_a_sliding_window_evicts_what_no_token_will_see(reference, target, chunk: int, drafts: int) -> None:
    """Greedy output as the reference's, in a window's blocks and no more; nothing is counted as lost."""
    engine = Engine(target)
    engine.scheduler.sliding_window = WINDOW
    engine.executor._ngrams = drafts > 0
    asked = Request(1, text(100), SamplingParams(100, 0.0))
    assert engine.core.accept(asked) is None
    worst = 0
    knobs = replace(KNOBS, prefill_chunk_tokens=chunk, speculative_tokens=drafts)
    while engine.core.requests:
        engine.core.step(knobs)
        engine.scheduler.check()
        if asked.computed > 100:
            worst = max(worst, engine.scheduler.pool.referenced)
            # What the next step can give up is given up when it begins.
            assert asked.evicted <= asked.computed - WINDOW + 1
    assert worst <= -(-WINDOW // BLOCK_SIZE) + 2
    assert engine.scheduler.tables.evicted_tokens_total == 0
    assert engine.scheduler.pool.free + engine.scheduler.pool.cached == BLOCKS
    with torch.inference_mode():
        logits = reference(torch.tensor([asked.tokens[:-1]])).logits[0, 99:]
    picked = logits.gather(1, torch.tensor(asked.tokens[100:]).unsqueeze(1)).squeeze(1)
    assert (logits.max(-1).values - picked).max() < 1e-4


def test_a_sliding_window_evicts_nothing_that_others_hold(target) -> None:
    engine = Engine(target)
    engine.scheduler.sliding_window = WINDOW
    first, other = (Request(number, text(100), SamplingParams(60, 0.0)) for number in (1, 2))
    first.add_forks([other])
    engine.run(first)
    assert first.tokens == other.tokens
    alone = Request(3, text(100), SamplingParams(60, 0.0))
    Engine(target).run(alone)
    assert first.tokens == alone.tokens


def test_an_evict_policy_on_top_of_a_sliding_window_is_refused(target) -> None:
    refused = Offer(8, sliding_window=WINDOW).refusal(Eviction("window", recent=16))
    assert f"latest {WINDOW} tokens only" in str(refused)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 0}, "sliding_window=0: must be null or a number of tokens"),
        ({"sliding_window": "wide"}, "sliding_window='wide'"),
        (
            {"sliding_window": 9},
            "sliding_window is 9 tokens and a block holds 16; use --block-size 8 or less",
        ),
    ],
)
def test_a_sliding_window_that_cannot_work_is_one_clear_line(directory, tmp_path, changes, words) -> None:
    config = EngineConfig(model=edited(directory, tmp_path, **changes), draft=None)
    with pytest.raises(StartError, match=words):
        assemble(config, None, None)


def test_a_draft_model_beside_a_sliding_window_is_refused(directory) -> None:
    with pytest.raises(StartError, match="use --draft ngram or --draft none"):
        assemble(EngineConfig(model=directory, draft=directory), None, None)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": None}, None),
        ({"use_sliding_window": False}, None),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, WINDOW),
    ],
)
def test_config_says_whether_there_is_a_sliding_window(directory, tmp_path, changes, window) -> None:
    assert ModelConfig.load(edited(directory, tmp_path, **changes)).sliding_window == window
