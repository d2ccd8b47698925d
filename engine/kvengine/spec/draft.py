"""The draft model's side of a speculative step: k tokens proposed for each of a batch of sequences.

The draft keeps its KV in the same blocks as the target. `Request.draft_computed` counts the positions of it
that are valid; what is missing (a whole prompt, when speculation has been off) is computed here, at most
`CATCH_UP_TOKENS` a step, so that switching speculation on neither stalls a step nor needs memory nobody
planned. A sequence that has not caught up proposes nothing this step.

k rounds of one forward each, batched over sequences; per round the Python work is O(sequences).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvengine.model.sampling import is_greedy, probs, sample
from kvengine.request import Request

CATCH_UP_TOKENS = 512


@dataclass(slots=True)
class Piece:
    """New tokens of one sequence for the draft to compute: positions `start` and on, KV into `blocks`."""

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]


Forward = Callable[[Sequence[Piece]], Tensor]
"""One pass of the draft model: logits [pieces, vocab] after the last token of each piece."""


@dataclass(slots=True)
class Proposal:
    """What was drafted for each sequence, in the form `verify` takes."""

    tokens: Tensor
    """[batch, k]; a row is meaningful up to its count."""
    probs: Tensor | None
    """[batch, k, vocab]: what the tokens were drawn from. None when every sequence is greedy."""
    counts: list[int]
    """How many each sequence drafted: what it wanted, or 0 while its draft KV catches up."""


def propose(
    forward: Forward, requests: Sequence[Request], wanted: Sequence[int], temperature: Tensor, top_p: Tensor
) -> Proposal:
    """Draft `wanted[i]` > 0 tokens after `requests[i].tokens`, at each row's temperature and top_p [batch].

    Both must be what the target is sampled with. Draws come from each request's own generator, one a drafted
    token, none while the whole batch is greedy. Call `settle` once the target has judged.
    """
    rows, pieces, counts = _catch_up(requests, wanted)
    k = max(counts)
    greedy = is_greedy(temperature)
    tokens = torch.zeros(len(requests), k, dtype=torch.long, device=temperature.device)
    distributions: Tensor | None = None
    logits = forward(pieces)[: len(rows)]
    for i in range(k):
        if greedy:
            drawn = logits.argmax(-1)
        else:
            distribution = probs(logits, temperature[rows], top_p[rows])
            drawn = sample(distribution, draws([requests[row] for row in rows], distribution))
            if distributions is None:
                distributions = distribution.new_zeros(len(requests), k, distribution.shape[-1])
            distributions[rows, i] = distribution
        tokens[rows, i] = drawn
        # Rows come widest first, so those that go on are a prefix. Nobody needs KV of the last draft yet.
        rows = [row for row in rows if counts[row] > i + 1]
        if rows:
            live = [requests[row] for row in rows]
            logits = forward(
                [
                    Piece((token,), len(request.tokens) + i, request.blocks)
                    for request, token in zip(live, drawn.tolist(), strict=False)
                ]
            )
    return Proposal(tokens, distributions, counts)


def settle(requests: Sequence[Request], counts: Sequence[int], accepted: Sequence[int]) -> None:
    """Record which draft KV the target's verdict leaves valid. Before the accepted tokens are appended.

    The drafts' own KV was computed but for the last one's, and holds up to the first that was rejected.
    """
    for request, count, stood in zip(requests, counts, accepted, strict=True):
        if count:
            request.draft_computed = len(request.tokens) + min(stood, count - 1)


def draws(requests: Sequence[Request], like: Tensor) -> Tensor:
    """One uniform of each request's own generator [requests]."""
    return torch.tensor(
        [request.rng.random() for request in requests], dtype=torch.float64, device=like.device
    )


def _catch_up(requests: Sequence[Request], wanted: Sequence[int]) -> tuple[list[int], list[Piece], list[int]]:
    """Rows that can draft now, widest first; the first pass's pieces, theirs in front; drafts of each row."""
    missing = [len(request.tokens) - request.draft_computed for request in requests]
    budget = max(CATCH_UP_TOKENS, 2 * len(requests))
    counts = [0] * len(requests)
    behind: list[Piece] = []
    # The least behind first: who drafted in the last step lacks one or two tokens and always fits.
    for row in sorted(range(len(requests)), key=missing.__getitem__):
        request, count = requests[row], min(missing[row], budget)
        budget -= count
        if count == missing[row]:
            counts[row] = wanted[row]
        elif count:
            start = request.draft_computed
            behind.append(Piece(request.tokens[start : start + count], start, request.blocks))
            request.draft_computed += count
    rows = sorted((row for row, count in enumerate(counts) if count), key=lambda row: -counts[row])
    ready = [
        Piece(
            requests[row].tokens[requests[row].draft_computed :],
            requests[row].draft_computed,
            requests[row].blocks,
        )
        for row in rows
    ]
    return rows, [*ready, *behind], counts
