"""From a step's logits to the tokens each sequence emits: sampled, or drafts judged and one token more.

Greedy batches take the largest logit and build no distribution. Otherwise each request's own generator
provides the uniforms, as many as it would need in any other batch. O(rows x vocabulary).
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from kvengine.model.sampling import GREEDY_BELOW, probs, sample
from kvengine.request import Request
from kvengine.sched.batch import Slice, SliceResult
from kvengine.spec.draft import Proposal
from kvengine.spec.verify import verify


def greedy(requests: Sequence[Request]) -> bool:
    """Whether each of them just takes its largest logit."""
    return all(request.sampling.temperature < GREEDY_BELOW for request in requests)


def draws(request: Request) -> int:
    """How a row of this request counts in `StepSize.drawn_rows`."""
    if request.sampling.temperature < GREEDY_BELOW:
        return int(request.sampling.scored)
    return 2 if request.sampling.top_p < 1.0 else 1


def sampling_rows(requests: Sequence[Request], device: torch.device) -> tuple[Tensor, Tensor]:
    """Temperature and top_p of each request."""
    settings = [(request.sampling.temperature, request.sampling.top_p) for request in requests]
    return torch.tensor(settings, device=device).unbind(1)


def next_tokens(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """One token a request from its row of `logits`."""
    if greedy(requests):
        return logits.argmax(-1).tolist()
    uniforms = torch.tensor([request.rng.random() for request in requests], dtype=torch.float64)
    distribution = probs(logits, *sampling_rows(requests, logits.device))
    return sample(distribution, uniforms.to(logits.device)).tolist()


def sampled(logits: Tensor, slices: Sequence[Slice]) -> dict[int, SliceResult]:
    """The result of each slice, by its id, from its row of `logits`; a request's forks draw from the same."""
    results: dict[int, SliceResult] = {}
    first = 0
    # Runs of the same kind, so that no row is copied; beams of a group stand together.
    for searches, run in groupby(slices, lambda piece: piece.request.group is not None):
        pieces = list(run)
        rows = logits[first : first + len(pieces)]
        results |= _searched(rows, pieces) if searches else _drawn(rows, pieces)
        first += len(pieces)
    return results


def _searched(logits: Tensor, slices: Sequence[Slice]) -> dict[int, SliceResult]:
    """What may follow each beam."""
    groups = [piece.request.group for piece in slices]
    counts = [min(group.wanted, logits.shape[1]) for group in groups if group is not None]
    logprobs, tokens = logits.float().log_softmax(-1).topk(max(counts))
    rows = zip(slices, counts, tokens.tolist(), logprobs.tolist(), strict=True)
    return {
        id(piece): SliceResult([], candidates=list(zip(likeliest, scores, strict=True))[:count])
        for piece, count, likeliest, scores in rows
    }


def _drawn(logits: Tensor, slices: Sequence[Slice]) -> dict[int, SliceResult]:
    requests = [request for piece in slices for request in (piece.request, *piece.request.forks)]
    if len(requests) > len(slices):
        rows = [row for row, piece in enumerate(slices) for _ in range(1 + len(piece.request.forks))]
        logits = logits[torch.tensor(rows, device=logits.device)]
    tokens = next_tokens(logits, requests)
    scores = _logprobs(logits, tokens) if any(request.sampling.scored for request in requests) else []
    results, first = {}, 0
    for piece in slices:
        end = first + 1 + len(piece.request.forks)
        results[id(piece)] = SliceResult(
            tokens[first : first + 1], forked=tokens[first + 1 : end], logprobs=scores[first:end]
        )
        first = end
    return results


def _logprobs(logits: Tensor, tokens: list[int]) -> list[float]:
    """What the model itself, at temperature 1, gives each row's token; natural logarithm."""
    chosen = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    return (logits.gather(1, chosen).squeeze(1) - logits.logsumexp(-1)).tolist()


def judged(logits: Tensor, requests: Sequence[Request], proposal: Proposal) -> list[list[int]]:
    """The accepted drafts of each request and the token after them; `logits` has count + 1 rows for each."""
    counts, drafts = proposal.counts, proposal.tokens.tolist()
    if not any(counts):
        return [[token] for token in next_tokens(logits, requests)]
    if greedy(requests):
        return _judged_greedy(logits.argmax(-1).tolist(), counts, drafts)
    rows, width, first = [], max(counts) + 1, 0
    for count in counts:
        rows.append([first + min(i, count) for i in range(width)])
        first += count + 1
    temperature, top_p = sampling_rows(requests, logits.device)
    repeats = torch.tensor([count + 1 for count in counts], device=logits.device)
    distribution = probs(logits, temperature.repeat_interleave(repeats), top_p.repeat_interleave(repeats))
    uniforms = torch.tensor(
        [_uniforms(request, count, width) for request, count in zip(requests, counts, strict=True)],
        dtype=torch.float64,
        device=logits.device,
    )
    accepted, following = verify(
        distribution[torch.tensor(rows, device=logits.device)],
        proposal.probs,
        proposal.tokens,
        torch.tensor(counts, device=logits.device),
        uniforms,
    )
    return [
        [*draft[:stood], token]
        for draft, stood, token in zip(drafts, accepted.tolist(), following.tolist(), strict=True)
    ]


def _judged_greedy(choices: list[int], counts: list[int], drafts: list[list[int]]) -> list[list[int]]:
    emitted, first = [], 0
    for count, draft in zip(counts, drafts, strict=True):
        stood = 0
        while stood < count and draft[stood] == choices[first + stood]:
            stood += 1
        emitted.append(choices[first : first + stood + 1])
        first += count + 1
    return emitted


def _uniforms(request: Request, count: int, width: int) -> list[float]:
    """`count` draws for the acceptances, padding that is never looked at, one for the token after them."""
    draw = request.rng.random
    return [*(draw() for _ in range(count)), *[0.0] * (width - 1 - count), draw()]
