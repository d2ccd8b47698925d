"""From logits to probabilities to tokens, a batch at a time.

Randomness comes in as uniforms in [0, 1), one a draw, so that a request's own seeded generator decides its
tokens whatever batch it runs in. Temperature 0 is a distribution too: all mass on the largest logit. Both
functions cost O(rows x vocabulary); rows with top_p < 1 add one sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow."""


def probs(logits: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """Distributions [rows, vocab] of logits [rows, vocab] under each row's temperature and top_p [rows]."""
    greedy = temperature < GREEDY_BELOW
    if is_greedy(temperature):
        return one_hot(logits.argmax(-1), logits.shape[-1])
    divisor = temperature.masked_fill(greedy, 1.0).unsqueeze(-1)
    distribution = (logits.float() / divisor).softmax(-1)
    narrowed = (top_p < 1.0) & ~greedy
    if bool(narrowed.any()):
        distribution[narrowed] = _nucleus(distribution[narrowed], top_p[narrowed])
    if bool(greedy.any()):
        distribution[greedy] = one_hot(logits[greedy].argmax(-1), logits.shape[-1])
    return distribution


def sample(distribution: Tensor, uniforms: Tensor) -> Tensor:
    """One token a row [rows] by inverting the cumulative distribution; never a token of probability zero.

    The rows need not sum to one: unnormalised weights are drawn from in proportion.
    """
    # In float64 for the sum over a large vocabulary; below the total even if a uniform was rounded up to 1.
    cumulative = distribution.double().cumsum(-1)
    total = cumulative[..., -1:]
    point = torch.minimum(
        uniforms.double().unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total))
    )
    # right=True finds the first entry strictly above the point: its own probability is then above zero.
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1)


def is_greedy(temperature: Tensor) -> bool:
    """Whether every row just takes its largest logit, so that no distribution need be built."""
    return bool((temperature < GREEDY_BELOW).all())


def one_hot(tokens: Tensor, vocab: int) -> Tensor:
    """float32 [rows, vocab] with all mass on `tokens` [rows]."""
    return torch.zeros(*tokens.shape, vocab, device=tokens.device).scatter_(-1, tokens.unsqueeze(-1), 1.0)


def _nucleus(distribution: Tensor, top_p: Tensor) -> Tensor:
    """Keep the fewest most likely tokens whose mass reaches top_p (always at least one), renormalised."""
    ordered, order = distribution.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    # The floor keeps the first token, before which the mass is 0, even at top_p = 0.
    ordered = ordered.masked_fill(
        before >= top_p.unsqueeze(-1).clamp_min(torch.finfo(torch.float32).tiny), 0.0
    )
    kept = torch.zeros_like(distribution).scatter_(-1, order, ordered)
    return kept / kept.sum(-1, keepdim=True)
