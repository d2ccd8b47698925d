"""The draft model's side of a speculative step: k tokens proposed for each of a batch of sequences.

The draft keeps its KV in the same blocks as the target. `Request.draft_computed` counts the positions of it
that are valid; what is missing (a whole prompt, when speculation has been off) is computed here, at most
`DRAFT_CATCH_UP_TOKENS` a step, so that switching speculation on neither stalls a step nor needs memory nobody
planned. A sequence that has not caught up proposes nothing this step.

k rounds of one forward each, batched over sequences; per round the Python work is O(sequences).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvengine.model.footprint import DRAFT_CATCH_UP_TOKENS
from kvengine.model.llama import Span
from kvengine.model.sampling import is_greedy, probs, sample
from kvengine.request import Request

Forward = Callable[[Sequence[Span]], Tensor]
"""One pass of the draft model: logits [spans, vocab] after the last token of each span."""


@dataclass(slots=True)
class Proposal:
    """What was drafted for each sequence, in the form `verify` takes."""

    tokens: Tensor
    """[batch, k]; a row is meaningful up to its count."""
    probs: Tensor | None
    """[batch, k, vocab]: what the tokens were drawn from. None when each was certain: every sequence is
    greedy, or no model drafted.
    """
    counts: list[int]
    """How many each sequence drafted: what it wanted, or 0 while its draft KV catches up."""


def propose(
    forward: Forward, requests: Sequence[Request], wanted: Sequence[int], temperature: Tensor, top_p: Tensor
) -> Proposal:
    """Draft `wanted[i]` > 0 tokens after `requests[i].tokens`, at each row's temperature and top_p [batch].

    Both must be what the target is sampled with. Draws come from each request's own generator, one a drafted
    token, none while the whole batch is greedy. Call `settle` once the target has judged.
    """
    rows, spans, counts = _catch_up(requests, wanted)
    batch, k = len(requests), max(counts)
    tokens = torch.zeros(batch, k, dtype=torch.long, device=temperature.device)
    logits = forward(spans)[: len(rows)]
    distributions = None if is_greedy(temperature) else logits.new_zeros(batch, k, logits.shape[1])
    for i in range(k):
        if distributions is None:
            drawn = logits.argmax(-1)
        else:
            distribution = probs(logits, temperature[rows], top_p[rows])
            uniforms = [requests[row].rng.random() for row in rows]
            drawn = sample(distribution, torch.tensor(uniforms, dtype=torch.float64, device=logits.device))
            distributions[rows, i] = distribution
        tokens[rows, i] = drawn
        # Rows come widest first, so those that go on are a prefix. Nobody needs KV of the last draft yet.
        rows = [row for row in rows if counts[row] > i + 1]
        if rows:
            newest = drawn[: len(rows)].tolist()
            logits = forward(
                [_next(requests[row], i, token) for row, token in zip(rows, newest, strict=True)]
            )
    return Proposal(tokens, distributions, counts)


def settle(requests: Sequence[Request], counts: Sequence[int], accepted: Sequence[int]) -> None:
    """Record which draft KV the target's verdict leaves valid. Before the accepted tokens are appended.

    The drafts' own KV was computed but for the last one's, and holds up to the first that was rejected.
    """
    for request, count, stood in zip(requests, counts, accepted, strict=True):
        if count:
            request.draft_computed = len(request.tokens) + min(stood, count - 1)


def _catch_up(requests: Sequence[Request], wanted: Sequence[int]) -> tuple[list[int], list[Span], list[int]]:
    """Rows that can draft now, widest first; the first pass's spans, theirs in front; drafts of each row."""
    missing = [len(request.tokens) - request.draft_computed for request in requests]
    budget = max(DRAFT_CATCH_UP_TOKENS, 2 * len(requests))
    counts = [0] * len(requests)
    behind: list[Span] = []
    # The least behind first: who drafted in the last step lacks one or two tokens and always fits.
    for row in sorted(range(len(requests)), key=missing.__getitem__):
        request, count = requests[row], min(missing[row], budget)
        budget -= count
        if count == missing[row]:
            counts[row] = wanted[row]
        elif count:
            start = request.draft_computed
            tokens = request.tokens[start : start + count]
            behind.append(Span(tokens, start, request.blocks, packing=request.packing))
            request.draft_computed += count
    rows = sorted((row for row, count in enumerate(counts) if count), key=lambda row: -counts[row])
    return rows, [*(_remainder(requests[row]) for row in rows), *behind], counts


def _remainder(request: Request) -> Span:
    start = request.draft_computed
    return Span(request.tokens[start:], start, request.blocks, packing=request.packing)


def _next(request: Request, drafted: int, token: int) -> Span:
    return Span((token,), len(request.tokens) + drafted, request.blocks, packing=request.packing)
