"""An executor without a model: tokens follow from the text before them, and it watches the KV like a hawk.

It keeps who wrote which token to which KV slot, and refuses a batch that would read a slot that was never
written, or that another request has overwritten since: so block tables, preemption and rollback are tested
without weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvengine.sched.batch import Batch, Slice, SliceResult

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
        self._accepted = accepted
        self._before = before
        self._slots: dict[int, tuple[int, int]] = {}
        """KV slot -> (request id, token)."""

    def memory(self) -> Reading:
        return Reading()

    def execute(self, batch: Batch) -> list[SliceResult]:
        if self._before is not None:
            self._before(batch)
        self.batches += 1
        return [self._compute(item) for item in batch.slices]

    def _compute(self, item: Slice) -> SliceResult:
        request = item.request
        assert item.count >= 1
        assert item.start == request.computed
        assert item.start + item.count <= len(request.tokens)
        assert item.samples == (item.start + item.count == len(request.tokens))
        for position in range(item.start):
            assert self._slots.get(self._slot(item, position)) == (request.id, request.tokens[position])
        for position in range(item.start, item.start + item.count):
            self._slots[self._slot(item, position)] = (request.id, request.tokens[position])
        if not item.samples:
            return SliceResult([])
        return self._sample(item)

    def _sample(self, item: Slice) -> SliceResult:
        """Accepts up to `accepted` drafts; those after them are written to KV and rejected, as in life."""
        tokens = list(item.request.tokens)
        accepted = min(item.drafts, self._accepted)
        for index in range(accepted + 1):
            tokens.append(continuation(tokens))
            if index < accepted:
                slot = self._slot(item, item.start + 1 + index)
                self._slots[slot] = (item.request.id, tokens[-1])
        for index in range(accepted, item.drafts):
            self._slots[self._slot(item, item.start + 1 + index)] = (item.request.id, -1)
        return SliceResult(tokens[len(item.request.tokens) :], item.drafts, accepted)

    def _slot(self, item: Slice, position: int) -> int:
        block = item.request.blocks[position // self._block_size]
        return block * self._block_size + position % self._block_size
