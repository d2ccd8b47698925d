"""The tokens of a step, which two knobs bound: the step's own budget, and the prompt chunk.

vLLM's chunk limit holds for each request, so several prompts together still make a step as long as its budget
allows, and everybody who decodes waits for it. Here the chunk bounds the prompt tokens of the whole step, as
its name says everywhere: a step gets the chunk, and what its running requests need to decode.
"""

from collections.abc import Callable
from typing import Any

from kvpilot.inside.vllm.port import Port

BUDGET = "max_num_scheduled_tokens"


class StepTokens:
    """`scheduler.max_num_scheduled_tokens`: the smaller of both bounds; its own value where there is none."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.own = getattr(scheduler, BUDGET)
        self.budget: int | None = None
        self.chunk: int | None = None

    def settle(self) -> None:
        """Put what holds now in force; writes only what changes. O(running requests) under a chunk."""
        bound = self.own if self.budget is None else self.budget
        if self.chunk is not None:
            bound = min(bound, self.chunk + self._decoding())
        if getattr(self._scheduler, BUDGET) is not bound:
            setattr(self._scheduler, BUDGET, bound)

    def _decoding(self) -> int:
        """What the running requests take if all of them decode; of one in its prompt, a single token."""
        running = self._scheduler.running
        return len(running) + sum([len(request.spec_token_ids) for request in running])


class BudgetPort(Port):
    """The port of `step_token_budget`."""

    def __init__(self, tokens: StepTokens) -> None:
        super().__init__("step_token_budget", int(tokens.own))
        self._tokens = tokens

    def apply(self, value: float) -> None:
        self.value = value
        self._tokens.budget = None if value == self.baseline else int(value)
        self._tokens.settle()

    def restore(self) -> None:
        self.value = self.baseline
        self._tokens.budget = None
        self._tokens.settle()


class ChunkPort(Port):
    """The port of `prefill_chunk_tokens`: the limit of each request, in `places`, and that of the step."""

    def __init__(
        self, baseline: float, tokens: StepTokens, *places: tuple[Any, str, Callable[[float], object]]
    ) -> None:
        super().__init__("prefill_chunk_tokens", baseline, *places)
        self._tokens = tokens

    def apply(self, value: float) -> None:
        super().apply(value)
        self._tokens.chunk = None if value == self.baseline else int(value)
        self._tokens.settle()

    def restore(self) -> None:
        super().restore()
        self._tokens.chunk = None
        self._tokens.settle()

    def each_step(self) -> None:
        self._tokens.settle()
