"""One step's work as plain data: what the scheduler decided, what the executor gave back.

The executor never calls the scheduler, the scheduler never sees a tensor. O(slices) to build, once a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvengine.request import Request


@dataclass(slots=True)
class Slice:
    """`tokens[start : start + count]` of one request go through the target model in this step."""

    request: Request
    start: int
    count: int
    drafts: int = 0
    """Draft tokens to propose and verify after the last token; above 0 only when `count` is 1."""
    samples: bool = False
    """Whether the logits of the last position are sampled: the slice reaches the newest token."""
    decode: bool = False
    """Whether it extends an output (one token, whose predecessors are all computed) and not a prompt."""


@dataclass(slots=True)
class SliceResult:
    """What came out of a slice. `tokens`: the accepted drafts and one more, or empty if it did not sample."""

    tokens: list[int]
    drafted: int = 0
    accepted: int = 0
    forked: Sequence[int] = ()
    """One token for each of the request's forks, if it sampled and has any."""
    logprobs: Sequence[float] = ()
    """Of the token, then of those of the forks, where the request asks for scores."""
    block_mass: Sequence[float] = ()
    """Attention that each block has drawn, where the request evicts by it."""
    candidates: Sequence[tuple[int, float]] = ()
    """Of a beam, in place of a token: the likeliest next ones with their log-probabilities, best first."""


@dataclass(slots=True)
class Batch:
    """The slices of one step, at most one a request, with the sums that cost models and telemetry use."""

    slices: Sequence[Slice]
    copies: Sequence[tuple[int, int]] = ()
    """(source, destination) of KV blocks to copy before anything else: all are read, then all written."""
    tokens: int = field(init=False, default=0)
    """Everything that goes through the target: prompt tokens, decoded tokens, drafts."""
    prefill_tokens: int = field(init=False, default=0)
    decode_sequences: int = field(init=False, default=0)
    drafted_tokens: int = field(init=False, default=0)
    context_tokens: int = field(init=False, default=0)
    """KV positions that decoding sequences read."""
    chunk_positions: int = field(init=False, default=0)
    """Sum over prompt chunks of their length times their last position (counted from 1)."""

    def __post_init__(self) -> None:
        for item in self.slices:
            if item.decode:
                self.decode_sequences += 1
                self.tokens += 1 + item.drafts
                self.drafted_tokens += item.drafts
                self.context_tokens += item.start - item.request.evicted + 1 + item.drafts
            else:
                self.tokens += item.count
                self.prefill_tokens += item.count
                self.chunk_positions += item.count * (item.start - item.request.evicted + item.count)
