"""What the engine has done since it started, as cumulative counts: any two readings give exact rates.

Every arrival ends in exactly one of four counts, so at any time, with `open` requests waiting or running:

    arrivals == finished + rejected + cancelled + failed + open
"""

from dataclasses import dataclass

from kvengine.sched.batch import Batch, SliceResult


@dataclass(slots=True)
class Totals:
    """Units are in the names of the step-record fields that these become."""

    steps: int = 0
    arrivals: int = 0
    finished: int = 0
    rejected: int = 0
    cancelled: int = 0
    failed: int = 0
    oom: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    recomputed_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    draft_rounds: int = 0
    rejected_rounds: int = 0
    decode_sequences: int = 0
    context_tokens: int = 0
    chunk_positions: int = 0
    kv_limited_steps: int = 0
    budget_limited_steps: int = 0

    def add_batch(self, batch: Batch) -> None:
        """A step computed this."""
        self.prefill_tokens += batch.prefill_tokens
        self.decode_sequences += batch.decode_sequences
        self.context_tokens += batch.context_tokens
        self.chunk_positions += batch.chunk_positions

    def add_round(self, result: SliceResult) -> None:
        """A decoding sequence verified drafts."""
        self.draft_rounds += 1
        self.drafted_tokens += result.drafted
        self.accepted_tokens += result.accepted
        self.rejected_rounds += result.accepted < result.drafted
