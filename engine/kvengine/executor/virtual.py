"""Runs batches in virtual time: a step takes as long as somebody says, and no model computes.

It knows no model: `step_seconds(batch)` is a plant's, `accepts(request, drafts)` says how many of the drafts
of one sequence stand, `memory` bounds what a step may allocate. Scheduler, pool, tables, core and telemetry
around it are the engine's own. Tokens are all alike unless `token` says otherwise. O(slices).
"""

from collections.abc import Callable
from typing import Protocol

from kvengine.errors import DeviceOutOfMemory
from kvengine.memory import MemoryReading
from kvengine.request import Request
from kvengine.sched.batch import Batch, Slice, SliceResult

TOKEN = 7
"""What every sequence says."""
OOM_PAUSE_S = 2.0
"""What a failed allocation costs: the allocator gives everything back and tries once more."""


class StepMemory(Protocol):
    """The device's memory, between steps and in one."""

    def reading(self) -> MemoryReading: ...

    def lacking_bytes(self, batch: Batch) -> int:
        """What the step needs beyond what is free; at most 0 if it fits."""
        ...


class Boundless:
    """A device whose memory never runs out."""

    _READING = MemoryReading(free=1 << 40, reserved=0, allocated=0)

    def reading(self) -> MemoryReading:
        return self._READING

    def lacking_bytes(self, batch: Batch) -> int:
        return 0


class VirtualExecutor:
    """`spend(seconds)` lets the time of a step pass: the clock moves on, and with it the world around."""

    def __init__(
        self,
        step_seconds: Callable[[Batch], float],
        spend: Callable[[float], None],
        accepts: Callable[[Request, int], int] = lambda request, drafts: 0,
        memory: StepMemory | None = None,
        token: Callable[[Request, int], int] | None = None,
    ) -> None:
        self._step_seconds = step_seconds
        self._spend = spend
        self._accepts = accepts
        self._memory = memory or Boundless()
        self._bounded = memory is not None
        self._token = token
        self.busy_s = 0.0
        """Time that steps took."""

    def memory(self) -> MemoryReading:
        return self._memory.reading()

    def execute(self, batch: Batch) -> list[SliceResult]:
        """One step. Raises DeviceOutOfMemory, after the time that finding out takes."""
        if self._bounded and (lacking := self._memory.lacking_bytes(batch)) > 0:
            self._spend(OOM_PAUSE_S)
            raise DeviceOutOfMemory(f"step of {batch.tokens} tokens: {lacking / 2**20:.1f} MiB too little")
        seconds = self._step_seconds(batch)
        assert seconds > 0, f"a step of {batch.tokens} tokens takes {seconds} s"
        self.busy_s += seconds
        self._spend(seconds)
        return [self._result(item) for item in batch.slices]

    def _result(self, item: Slice) -> SliceResult:
        if not item.samples:
            return SliceResult([])
        request, drafts = item.request, item.drafts
        if request.forks or request.sampling.scored:
            return self._forked(request)
        stood = self._accepts(request, drafts) if drafts else 0
        return SliceResult(self._tokens(request, stood + 1), drafts, stood)

    def _forked(self, request: Request) -> SliceResult:
        """Several choices, or scores: one token each, and nothing was drafted."""
        scores = [0.0] * (1 + len(request.forks)) if request.sampling.scored else ()
        forked = [self._tokens(fork, 1)[0] for fork in request.forks]
        return SliceResult(self._tokens(request, 1), forked=forked, logprobs=scores)

    def _tokens(self, request: Request, count: int) -> list[int]:
        if self._token is None:
            return [TOKEN] * count
        first = request.output_count
        return [self._token(request, first + number) for number in range(count)]
