"""The port of `speculative_tokens`: how many tokens the drafter proposes, and which proposals are kept.

The scheduler passes the drafter a number of draft tokens by batch size; a table of our own there turns
drafting down from the next step on. Drafts proposed before are attached to their requests already (real ones,
or under asynchronous scheduling placeholders for those being computed): whatever exceeds the knob is cut off.
A draft is a guess, so no output changes.

Only running requests are looked at, before every step: drafts of a waiting request are not used in the step
that admits it, and in the next one it runs.
"""

from typing import Any

from kvpilot.inside.vllm.port import Port


class DraftPort(Port):
    """See the module docstring. `batch_sizes`: the largest batch that the scheduler may look up."""

    def __init__(self, scheduler: Any, baseline: int, batch_sizes: int) -> None:
        super().__init__("speculative_tokens", baseline, (scheduler, "dynamic_sd_lookup", self._table))
        self._scheduler = scheduler
        self._entries = batch_sizes + 1

    def _table(self, value: float) -> list[int]:
        """By batch size. A table of the operator's own stays the upper bound."""
        most = int(value)
        own = self.originals[0] if self.originals else None
        return [min(most, entry) for entry in own] if isinstance(own, list) else [most] * self._entries

    def each_step(self) -> None:
        most = int(self.value)
        for request in self._scheduler.running:
            drafts = request.spec_token_ids
            if len(drafts) > most:
                # Never in place: under asynchronous scheduling all requests share one list of placeholders.
                request.spec_token_ids = drafts[:most]
