"""An executor without a model: tokens follow from the text before them, and it watches the KV like a hawk.

It keeps which text, of whom, the KV in each slot belongs to, and refuses a batch that would read a slot that
was never written, or that holds anything but this tenant's own text up to there: so block tables, sharing,
copies, preemption and rollback are tested without weights.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvengine.sched.batch import Batch, Slice, SliceResult
from kvkernels.precision import MAX_PACKING

VOCABULARY = 256


def continuation(tokens: Sequence[int]) -> int:
    """The one token that follows: printable, and different whenever anything was lost or doubled."""
    return 97 + (tokens[-1] * 31 + len(tokens) * 7) % 26


def expected_output(prompt: Sequence[int], count: int) -> list[int]:
    """What a request emits when nothing is lost or doubled."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(continuation(tokens))
    return tokens[len(prompt) :]


def log_probabilities(tokens: Sequence[int]) -> list[tuple[int, float]]:
    """What may follow for a beam, every token of it, likeliest first: 0, an end to some, and letters."""
    text = bytes(tokens)
    ranked = [(token, -zlib.crc32(text + bytes([token])) / 2**30) for token in (0, *range(97, 123))]
    return sorted(ranked, key=lambda one: -one[1])


def _held(tokens: Sequence[int], tenant: str | None) -> list[tuple[str | None, int]]:
    """What the KV slot of each position holds: it depends on the whole text before it."""
    held, text = [], 0
    for token in tokens:
        text = hash((text, token))
        held.append((tenant, text))
    return held


@dataclass(frozen=True)
class Reading:
    """Bytes, as the real executor's memory reading."""

    free: int = 64 << 20
    reserved: int = 32 << 20
    allocated: int = 16 << 20


class FakeExecutor:
    """`before` runs ahead of every batch and may raise, wait or advance a clock."""

    def __init__(
        self, block_size: int, accepted: int = 2, before: Callable[[Batch], None] | None = None
    ) -> None:
        self.batches = 0
        self._block_size = block_size
        self._block_slots = block_size * MAX_PACKING
        self._accepted = accepted
        self._before = before
        self._slots: dict[int, tuple[str | None, int]] = {}
        """KV slot -> (tenant, hash of the text up to and with the token there)."""

    def memory(self) -> Reading:
        return Reading()

    def execute(self, batch: Batch) -> list[SliceResult]:
        if self._before is not None:
            self._before(batch)
        self.batches += 1
        size, before = self._block_slots, dict(self._slots) if batch.copies else {}
        for source, destination in batch.copies:
            for i in range(size):
                if source * size + i in before:
                    self._slots[destination * size + i] = before[source * size + i]
        return [self._compute(item) for item in batch.slices]

    def _compute(self, item: Slice) -> SliceResult:
        request = item.request
        assert item.count >= 1
        assert item.start == request.computed
        assert item.start + item.count <= len(request.tokens)
        assert item.samples == (item.start + item.count == len(request.tokens))
        held = _held(request.tokens[: item.start + item.count], request.tenant)
        # Which positions are left of those evicted is for tests with a real model.
        for position in range(item.start if request.evicted else 0, item.start):
            assert self._slots.get(self._slot(item, position)) == held[position]
        for position in range(item.start, item.start + item.count):
            self._slots[self._slot(item, position)] = held[position]
        if not item.samples:
            return SliceResult([])
        return self._sample(item)

    def _sample(self, item: Slice) -> SliceResult:
        """Accepts up to `accepted` drafts; those after them are written to KV and rejected, as in life."""
        request = item.request
        tokens = list(request.tokens)
        if request.group is not None:
            return SliceResult([], candidates=log_probabilities(tokens)[: request.group.wanted])
        accepted = min(item.drafts, self._accepted)
        for index in range(accepted + 1):
            tokens.append(continuation(tokens))
            if index < accepted:
                slot = self._slot(item, item.start + 1 + index)
                self._slots[slot] = _held(tokens, request.tenant)[-1]
        for index in range(accepted, item.drafts):
            self._slots[self._slot(item, item.start + 1 + index)] = (request.tenant, -1)
        forked = [97 + (tokens[-1] + fork.id) % 26 for fork in request.forks]
        scores = [-float(one.id % 7) for one in (request, *request.forks) if one.sampling.scored]
        return SliceResult(
            tokens[len(request.tokens) :], item.drafts, accepted, forked=forked, logprobs=scores
        )

    def _slot(self, item: Slice, position: int) -> int:
        held = self._block_size * item.request.packing
        place = position - item.request.evicted
        return item.request.blocks[place // held] * self._block_slots + place % held
