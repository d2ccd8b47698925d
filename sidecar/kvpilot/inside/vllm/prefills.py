"""Prompts being computed: who is at it, how much of it a step does, and what is done for a second time."""

from typing import Any

from kvpilot.inside.hook import StepHook
from kvpilot.inside.vllm.inflight import Flight
from kvpilot.inside.vllm.lives import Lives
from kvpilot.inside.vllm.record import Record


class Prefills:
    """Requests between their admission and their first token since then. A step without any costs nothing."""

    def __init__(self, scheduler: Any, hook: StepHook, lives: Lives, record: Record) -> None:
        self._scheduler = scheduler
        self._hook = hook
        self._lives = lives
        self._record = record
        self.under_way: set[str] = set()
        """Whose prompts are being computed."""
        self._again: dict[str, int] = {}
        """Preempted requests: up to which position their tokens had been computed."""

    def preempted(self, request: Any) -> None:
        """A request is about to lose its KV blocks."""
        # Beyond the last known token lie drafts, and placeholders for what is being computed.
        done = min(request.num_computed_tokens, request.num_tokens)
        request_id = request.request_id
        self._again[request_id] = max(done, self._again.get(request_id, 0))
        self.under_way.discard(request_id)

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self.under_way.discard(request_id)
        self._again.pop(request_id, None)

    def scheduled(self, flight: Flight) -> int:
        """Take in a scheduled step's prompt chunks; how many there are."""
        output = flight.output
        if output.scheduled_new_reqs:
            self._admit(output.scheduled_new_reqs, flight.started_ns)
        resumed = output.scheduled_cached_reqs.resumed_req_ids
        if resumed:
            self.under_way.update(resumed)
        if not self.under_way:
            return 0
        return self._count(flight, output.num_scheduled_tokens)

    def _admit(self, new_requests: Any, started_ns: int) -> None:
        for new in new_requests:
            self.under_way.add(new.req_id)
            life = self._lives.get(new.req_id)
            if life is None or life.placed:
                continue
            life.placed = True
            if life.added_ns:
                self._hook.queue_wait[life.level].record(started_ns - life.added_ns)
            request = self._scheduler.requests[new.req_id]
            if not getattr(request, "skip_reading_prefix_cache", False):
                self._record.add("prefix_tokens_queried_total", request.num_tokens)
                self._record.add("prefix_tokens_hit_total", new.num_computed_tokens)

    def _count(self, flight: Flight, tokens: dict[str, int]) -> int:
        requests = self._scheduler.requests
        chunks, done = 0, []
        for request_id in self.under_way:
            count = tokens.get(request_id)
            if count is None:
                continue
            request = requests[request_id]
            end = request.num_computed_tokens
            start = end - count
            length = min(end, request.num_tokens) - start
            flight.prefill_tokens += length
            flight.chunk_positions += length * (start + length)
            flight.chunks_reach += end
            chunks += 1
            if request_id in self._again:
                self._count_again(flight, request_id, start, end)
            if end >= request.num_tokens:
                done.append(request_id)
        self.under_way.difference_update(done)
        return chunks

    def _count_again(self, flight: Flight, request_id: str, start: int, end: int) -> None:
        until = self._again[request_id]
        flight.recomputed_tokens += max(0, min(end, until) - start)
        if end >= until:
            del self._again[request_id]
