"""The draft's bookkeeping, on a model whose every logit depends on the whole history its KV holds.

A position that was drafted, rejected and not rolled back changes all that follows, so a mistake cannot hide.
"""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kvengine.executor.emission import judged
from kvengine.model.llama import Span
from kvengine.request import Request, SamplingParams
from kvengine.spec import draft
from kvengine.spec.draft import propose, settle

VOCAB, BLOCK = 6, 4
Settle = Callable[[Sequence[Request], Sequence[int], Sequence[int]], None]


class StaleKv(AssertionError):
    """The draft's KV holds something other than the sequence it is asked to go on with."""


def logits_after(history: Sequence[int], noise: float = 0.0) -> Tensor:
    """The target's logits, or with noise a draft's that agrees with it most of the time."""
    rng = random.Random(repr(list(history)))
    logits = torch.tensor([rng.gauss(0, 3) for _ in range(VOCAB)])
    return logits + noise * torch.tensor([rng.gauss(0, 1) for _ in range(VOCAB)])


class PagedDraft:
    """Keeps each token at its slot, as KV would be kept, and answers from what the slots hold."""

    def __init__(self, requests: Sequence[Request], noise: float) -> None:
        self.slots: dict[int, int] = {}
        self.passes: list[list[int]] = []  # tokens of each span, pass by pass
        self._requests, self._noise = requests, noise

    def __call__(self, spans: Sequence[Span]) -> Tensor:
        self.passes.append([len(span.tokens) for span in spans])
        return torch.stack([self._one(span) for span in spans])

    def _one(self, span: Span) -> Tensor:
        for i, token in enumerate(span.tokens):
            self.slots[self._slot(span, span.start + i)] = token
        history = [self.slots[self._slot(span, i)] for i in range(span.start + len(span.tokens))]
        known = next(r.tokens for r in self._requests if r.blocks is span.blocks)
        if history[: len(known)] != known[: len(history)]:
            raise StaleKv(f"the draft saw {history}, the sequence is {known}")
        return logits_after(history, self._noise)

    def _slot(self, span: Span, position: int) -> int:
        return span.blocks[position // BLOCK] * BLOCK + position % BLOCK


def requests_of(prompts: Sequence[int], temperature: float) -> list[Request]:
    """One request for each prompt length, with interleaved blocks for 800 positions each."""
    made = []
    for i, length in enumerate(prompts):
        prompt = random.Random(i).choices(range(VOCAB), k=length)
        request = Request(i, prompt, SamplingParams(999, temperature, seed=i))
        request.blocks = [i + len(prompts) * block for block in range(200)]
        made.append(request)
    return made


def step(
    forward: PagedDraft, requests: list[Request], wanted: list[int], settling: Settle = settle
) -> list[int]:
    """One speculative step as an executor does it; returns how many drafts each sequence made."""
    temperature = torch.tensor([request.sampling.temperature for request in requests])
    top_p = torch.ones(len(requests))
    proposal = propose(forward, requests, wanted, temperature, top_p)
    logits = [
        logits_after(request.tokens + drafted[:i])
        for request, drafted, count in zip(requests, proposal.tokens.tolist(), proposal.counts, strict=True)
        for i in range(count + 1)
    ]
    emitted = judged(torch.stack(logits), requests, proposal)
    settling(requests, proposal.counts, [len(tokens) - 1 for tokens in emitted])
    for request, tokens in zip(requests, emitted, strict=True):
        request.tokens += tokens
    return proposal.counts


def run(forward: PagedDraft, requests: list[Request], steps: int, settling: Settle = settle) -> None:
    rng = random.Random(1)
    for _ in range(steps):
        step(forward, requests, [rng.randint(1, 5) for _ in requests], settling)


def greedy(prompt: list[int], length: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < length:
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens


@pytest.mark.parametrize("noise", [0.0, 1.0, 5.0])
def test_greedy_output_is_the_targets_own_whatever_the_draft(noise: float) -> None:
    requests = requests_of([3, 9, 1, 30], temperature=0.0)
    forward = PagedDraft(requests, noise)
    run(forward, requests, steps=30)
    for request in requests:
        assert request.tokens == greedy(request.prompt, len(request.tokens))
    if noise == 0.0:
        assert sum(len(request.tokens) for request in requests) > 43 + 4 * 30 * 3  # everything was accepted


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_draft_kv_always_holds_the_sequence(temperature: float) -> None:
    requests = requests_of([5, 2, 17], temperature)
    run(PagedDraft(requests, noise=1.0), requests, steps=40)


def not_rolled_back(requests: Sequence[Request], counts: Sequence[int], accepted: Sequence[int]) -> None:
    """Mutant: keeps the KV of drafts that were rejected."""
    for request, count in zip(requests, counts, strict=True):
        request.draft_computed = len(request.tokens) + count - 1


def last_draft_counted(requests: Sequence[Request], counts: Sequence[int], accepted: Sequence[int]) -> None:
    """Mutant: takes the last draft's KV for computed when all were accepted."""
    for request, stood in zip(requests, accepted, strict=True):
        request.draft_computed = len(request.tokens) + stood


@pytest.mark.parametrize(("mutant", "noise"), [(not_rolled_back, 5.0), (last_draft_counted, 0.0)])
def test_wrong_rollback_is_caught(mutant: Settle, noise: float) -> None:
    requests = requests_of([5, 2, 17], temperature=0.0)
    forward = PagedDraft(requests, noise)
    with pytest.raises((StaleKv, KeyError)):
        run(forward, requests, steps=20, settling=mutant)


def test_catching_up_is_bounded_and_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "DRAFT_CATCH_UP_TOKENS", 64)
    requests = requests_of([10, 300, 20], temperature=0.7)
    forward = PagedDraft(requests, noise=1.0)
    seen = []
    for _ in range(8):
        forward.passes.clear()
        seen.append(step(forward, requests, [3, 3, 3]))
        assert sum(forward.passes[0]) <= 64
    assert seen[0] == [3, 0, 3]
    behind = [counts[1] for counts in seen]
    assert behind == sorted(behind)
    assert behind[-1] == 3
    assert all(counts[0] == counts[2] == 3 for counts in seen)


def test_a_step_in_which_all_catch_up_drafts_nothing_and_still_samples() -> None:
    requests = requests_of([600], temperature=0.7)
    forward = PagedDraft(requests, noise=0.0)
    assert step(forward, requests, [4]) == [0]
    assert len(requests[0].tokens) == 601
    assert requests[0].draft_computed == draft.DRAFT_CATCH_UP_TOKENS
    assert step(forward, requests, [4]) == [4]


def test_draws_come_from_each_requests_own_generator() -> None:
    together, alone = requests_of([7, 7], temperature=1.0), requests_of([7, 7], temperature=1.0)
    wanted = [2, 4]
    settings = torch.ones(2)
    both = propose(PagedDraft(together, 0.0), together, wanted, settings, settings)
    for row in range(2):
        one = propose(PagedDraft(alone, 0.0), [alone[row]], [wanted[row]], settings[:1], settings[:1])
        count = wanted[row]
        assert one.tokens[0].tolist() == both.tokens[row, :count].tolist()
        assert one.probs is not None
        assert both.probs is not None
        assert torch.equal(one.probs[0], both.probs[row, :count])
        assert alone[row].rng.random() == together[row].rng.random()
