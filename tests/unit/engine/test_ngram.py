"""Drafting from the text itself: what is proposed, and that it changes no output."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_executor import BLOCK_SIZE, BLOCKS, generate, output, requests

from kvengine.config import EngineConfig
from kvengine.errors import ConfigError
from kvengine.executor.torch import EagerExecutor
from kvengine.memory import MIB, DeviceMemory
from kvengine.request import Request, SamplingParams
from kvengine.spec.ngram import LONGEST, SHORTEST, continuation, propose


@pytest.mark.parametrize(
    ("tokens", "count", "drafted"),
    [
        ([1, 2, 3, 9, 1, 2], 3, [3, 9, 1]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, [4, 1]),
        ([1, 2, 3, 4], 2, []),
        ([5, 5, 5, 5], 3, [5]),
        ([1, 2], 2, []),
        ([7], 2, []),
        ([1, 2, 3, 4, 5, 8, 2, 3, 9, 1, 2, 3], 1, [4]),
    ],
    ids=["again", "latest", "nothing new", "runs", "short", "one", "longest first"],
)
def test_continuation(tokens: list[int], count: int, drafted: list[int]) -> None:
    assert continuation(tokens, count) == drafted


@given(st.lists(st.sampled_from([0, 1, 256, 65_536, 1 << 24]), max_size=30), st.integers(1, 5))
def test_continuation_is_what_a_plain_search_finds(tokens: list[int], count: int) -> None:
    """Token ids that share bytes: only whole tokens match."""

    def plain() -> list[int]:
        for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
            for start in range(len(tokens) - length - 1, -1, -1):
                if tokens[start : start + length] == tokens[-length:]:
                    return tokens[start + length : start + length + count]
        return []

    assert continuation(tokens, count) == plain()


def test_rows_of_different_lengths_share_one_proposal() -> None:
    made = [Request(n, tokens, SamplingParams(9)) for n, tokens in enumerate([[1, 2, 3, 1, 2], [1, 2, 3]])]
    proposal = propose(made, [2, 2], "cpu")
    assert (proposal.tokens.tolist(), proposal.counts, proposal.probs) == ([[3, 1], [0, 0]], [2, 0], None)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_ngrams_leave_greedy_output_as_it_is(temperature: float) -> None:
    """Greedy: token for token. Sampled: it runs, and both verdicts happen (`test_verify` has the law)."""
    from llamas import engine_model, reference_model

    target = engine_model(reference_model(kv_heads=2))
    plain, drafted = ([_repeating(r) for r in requests(4, temperature)] for _ in range(2))
    engines = [
        EagerExecutor(target, None, DeviceMemory(256 * MIB), BLOCKS, BLOCK_SIZE, ngrams=ngrams)
        for ngrams in (False, True)
    ]
    generate(engines[0], plain, 40)
    proposed, accepted = generate(engines[1], drafted, 40, 4)
    assert accepted < proposed
    if temperature == 0.0:
        assert accepted > 0
        assert list(map(output, drafted)) == list(map(output, plain))


def _repeating(request: Request) -> Request:
    """The same request over a prompt that repeats itself."""
    rng = random.Random(request.id)
    period = [rng.randrange(97) for _ in range(5)]
    request.prompt = (period * len(request.prompt))[: len(request.prompt)]
    request.tokens = list(request.prompt)
    return request


def test_ngrams_and_a_draft_model_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        EngineConfig(drafter="ngram")
    assert EngineConfig(drafter="ngram", draft=None).speculates
    assert not EngineConfig(drafter="ngram", draft=None, speculative_tokens=0).speculates
    assert not EngineConfig(draft=None).speculates


def test_an_ngram_proposal_lies_on_the_device_of_the_model() -> None:
    request = Request(1, [1, 2, 3, 1, 2], SamplingParams(9))
    assert propose([request], [2], torch.device("cpu")).tokens.device == torch.device("cpu")
