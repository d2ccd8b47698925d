"""The shipped weights are what the project says they are: small, at home in long contexts, and a pair whose
draft pays on one domain and not on the other."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kvengine
from kvengine.executor.torch import EagerExecutor
from kvengine.memory import MIB, DeviceMemory
from kvengine.model import weights
from kvengine.model.config import ModelConfig
from kvengine.model.domains import prompt
from kvengine.model.llama import Llama
from kvengine.request import Request, SamplingParams
from kvengine.sched.batch import Batch, Slice
from kvengine.train import checkpoint
from kvengine.train.corpus import Corpus
from kvengine.train.held_out import near_and_far

WEIGHTS = Path(kvengine.__file__).parent / "weights"
BLOCK, PROMPT, ROOM = 16, 160, 512


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shipped(name: str) -> Llama:
    config = ModelConfig.load(WEIGHTS / name)
    return Llama(config, weights.load(WEIGHTS / name, config))


def executor(requests: int) -> EagerExecutor:
    return EagerExecutor(
        shipped("target"), shipped("draft"), DeviceMemory(512 * MIB), requests * ROOM // BLOCK, BLOCK
    )


def requests_of(domain: str, count: int, temperature: float) -> list[Request]:
    made = []
    for i in range(count):
        request = Request(
            i, list(prompt(domain, PROMPT, 77 + i).encode()), SamplingParams(999, temperature, seed=i)
        )
        request.blocks = list(range(i * ROOM // BLOCK, (i + 1) * ROOM // BLOCK))
        made.append(request)
    return made


def advance(engine: EagerExecutor, requests: list[Request], drafts: int) -> tuple[int, int]:
    """One step of all requests; returns how many drafts were made and how many stood."""
    slices = [
        Slice(
            request,
            request.computed,
            len(request.tokens) - request.computed,
            drafts,
            samples=True,
            decode=True,
        )
        for request in requests
    ]
    results = engine.execute(Batch(slices))
    for request, result in zip(requests, results, strict=True):
        request.computed = len(request.tokens) + result.accepted
        request.tokens += result.tokens
    return sum(result.drafted for result in results), sum(result.accepted for result in results)


def acceptance(domain: str, temperature: float) -> float:
    """Accepted / proposed at k = 4 over what 12 requests generate."""
    requests = requests_of(domain, 12, temperature)
    engine = executor(len(requests))
    advance(engine, requests, drafts=0)
    steps = [advance(engine, requests, drafts=4) for _ in range(50)]
    drafted, accepted = (sum(column) for column in zip(*steps, strict=True))
    assert drafted > 1000
    return accepted / drafted


def test_draft_pays_on_log_lines() -> None:
    assert acceptance("json", 0.7) >= 0.5


def test_draft_does_not_pay_on_source_code() -> None:
    assert acceptance("python", 0.7) <= 0.25


def generate(domain: str, drafts: int, length: int) -> list[list[int]]:
    requests = requests_of(domain, 4, temperature=0.0)
    engine = executor(len(requests))
    advance(engine, requests, drafts=0)
    while min(len(request.tokens) for request in requests) < PROMPT + length:
        advance(engine, requests, drafts)
    return [request.tokens[: PROMPT + length] for request in requests]


def first_difference_is_a_tie(plain: list[int], speculative: list[int]) -> bool:
    """Whether the target itself is undecided where two greedy runs part: rounding may then choose either."""
    at = next((i for i, pair in enumerate(zip(plain, speculative, strict=True)) if pair[0] != pair[1]), None)
    if at is None:
        return True
    logits = checkpoint.load(WEIGHTS / "target")(torch.tensor([plain[:at]]))[0, -1]
    top = logits.topk(2)
    return {plain[at], speculative[at]} == set(top.indices.tolist()) and float(top.values.diff().abs()) < 1e-4


@pytest.mark.parametrize("domain", ["json", "python"])
@torch.no_grad()
def test_greedy_output_is_the_same_with_and_without_the_draft(domain: str) -> None:
    plain, speculative = generate(domain, 0, 120), generate(domain, 4, 120)
    assert all(map(first_difference_is_a_tie, plain, speculative))


@torch.no_grad()
def test_the_comparison_tells_a_wrong_token_from_a_tie() -> None:
    plain = generate("json", 0, 20)[0]
    assert not first_difference_is_a_tie(plain, [*plain[:-5], (plain[-5] + 1) % 256, *plain[-4:]])


@pytest.mark.parametrize(("model", "domain"), [("target", "json"), ("target", "python"), ("draft", "json")])
def test_long_contexts_lose_nothing(model: str, domain: str) -> None:
    corpus = Corpus(held_out=True)
    near, far = near_and_far(checkpoint.load(WEIGHTS / model), corpus, domain, windows=4, seed=1)
    assert far <= 1.05 * near


@pytest.mark.parametrize(("model", "parameters"), [("target", 1_200_000), ("draft", 70_000)])
def test_sizes(model: str, parameters: int) -> None:
    config = ModelConfig.load(WEIGHTS / model)
    assert config.parameters == pytest.approx(parameters, rel=0.1)
    assert config.max_positions >= 2048


def test_all_weights_together_stay_under_6_mb() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 6_000_000
