"""Lossless speculative decoding: which drafted tokens stand, and which token follows them.

The rule of rejection sampling, for a batch of sequences at once. Draft token t, drawn from q, stands with
probability min(1, p(t)/q(t)). At the first that falls, the next token is drawn from max(p - q, 0) normalised;
when all stand, from p at the position after the last. The tokens emitted are then distributed exactly as if
the target had been sampled one token at a time. Sequences may have drafted fewer tokens than the batch's
widest: a missing draft is a rejection with q = 0, whose residual is p itself, so the bonus token after a full
acceptance needs no case of its own.

Cost: O(batch x drafts) for the acceptance, one O(batch x vocabulary) draw; nothing in Python per sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvengine.model.sampling import sample


def verify(
    target_probs: Tensor,
    draft_probs: Tensor | None,
    draft_tokens: Tensor,
    counts: Tensor,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """Accepted draft tokens [batch] and the token after them [batch].

    target_probs [batch, k + 1, vocab]: the target's distribution before each draft and after the last.
    draft_probs [batch, k, vocab], draft_tokens [batch, k]: what was drafted, and from what; None if every
    draft was certain (q is 1 at the draft), which needs no memory.
    counts [batch]: how many of the k each sequence drafted; the rest of its row is ignored.
    uniforms [batch, k + 1]: k for the acceptances, the last for the draw.
    """
    batch, k = draft_tokens.shape
    rows = torch.arange(batch, device=draft_tokens.device)
    if k == 0:
        return torch.zeros_like(counts), sample(target_probs[:, 0], uniforms[:, 0])
    drafts = draft_tokens.unsqueeze(-1)
    p = target_probs[:, :k].gather(-1, drafts).squeeze(-1)
    q = torch.ones_like(p) if draft_probs is None else draft_probs.gather(-1, drafts).squeeze(-1)
    accepted = leading(uniforms[:, :k] * q < p, counts)
    p_next = target_probs[rows, accepted]
    rejected, at = accepted < counts, accepted.clamp_max(k - 1)
    if draft_probs is None:
        fallen = draft_tokens[rows, at]
        residual = p_next.clone()
        residual[rows, fallen] = residual[rows, fallen].masked_fill(rejected, 0.0)
    else:
        residual = (p_next - draft_probs[rows, at] * rejected.to(p_next.dtype).unsqueeze(-1)).clamp_min(0.0)
    # p and q equal up to rounding leave nothing to draw from; the draw is then from p, which is q.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0.0, residual, p_next)
    return accepted, sample(residual, uniforms[:, -1])


def leading(stands: Tensor, counts: Tensor) -> Tensor:
    """How many drafts stand before the first that does not [batch]; `stands` [batch, k] is a mask."""
    position = torch.arange(stands.shape[1], device=stands.device)
    return (stands & (position < counts.unsqueeze(1))).long().cumprod(1).sum(1)
