"""Counts what a vLLM engine core's scheduler does, and writes one record a step.

A step is one output that came back; with asynchronous scheduling the next one is scheduled by then. A step
takes the time from its scheduling, or from the end of the step before where that came later, so that the
durations of overlapping steps add up to the time that passed. Steps without tokens are none: they leave a
record, without a duration, only where something moved.

All memory that a step touches is cold by the next one, so the usual step, where nobody comes or goes, touches
little: what depends on who is there is worked out when that changes.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from kvpilot.clock import Clock
from kvpilot.inside.hook import StepHook
from kvpilot.inside.lengths import LengthPredictor
from kvpilot.inside.vllm.drafted import drafted, drafted_by_all
from kvpilot.inside.vllm.emissions import Emissions
from kvpilot.inside.vllm.inflight import Flight, Flights
from kvpilot.inside.vllm.layout import Layout
from kvpilot.inside.vllm.lives import Lives
from kvpilot.inside.vllm.prefills import Prefills
from kvpilot.inside.vllm.record import Record
from kvpilot.inside.vllm.scan import Scan
from kvpilot.inside.vllm.sweep import EVERY, BlockSweep

_FLUSH_EVERY_NS = 25_000_000
"""How long latencies may wait to be shown."""

_computed = attrgetter("num_computed_tokens")


class Recorder:
    """Told of everything that the scheduler does, by one thread."""

    def __init__(
        self,
        scheduler: Any,
        hook: StepHook,
        layout: Layout,
        lives: Lives,
        clock: Clock,
        fields: tuple[str, ...],
        levels: int,
    ) -> None:
        self._scheduler = scheduler
        self._hook = hook
        self._lives = lives
        self._now = clock.monotonic_ns
        self._free_blocks = layout.pool.get_num_free_blocks
        self._lengths = LengthPredictor(int(scheduler.max_model_len))
        self.record = Record(hook, fields)
        self.emissions = Emissions(hook, lives)
        self.prefills = Prefills(scheduler, hook, lives, self.record)
        self.sweep = BlockSweep(layout.pool, clock)
        self.scan = Scan(scheduler, layout, lives, self._lengths, hook, clock, levels)
        self._flights = Flights()
        self._judges_memory = "kv_limited_steps_total" in fields
        self._ended: list[str] = []
        self._preempted_now = False
        self._changes = 0
        """How often anybody came or went."""
        self._last_changes = -1
        """As many by the last step, if that was whole; else -1."""
        self._counted = -1
        """As many when requests were last counted."""
        self._running = self._waiting = 0
        self._reach = 0
        """KV positions of all that run, while nobody comes or goes."""
        self._reach_changes = -1
        self._last_end_ns = 0
        self._flush_ns = 0
        self._written = (0, 0, 0)
        self.steps = self.decode_sequences = self.context_tokens = 0

    # Between steps.

    def added(self, request: Any) -> None:
        """The scheduler got a request."""
        self._counted = -1
        self._lives.begin(request, self._now())

    def preempted(self, request: Any) -> None:
        """A running request is about to lose its KV blocks."""
        self._changes += 1
        self.record.add("preemptions_total", 1)
        self._preempted_now = True
        self.prefills.preempted(request)

    def freed(self, request: Any) -> None:
        """A request has ended, one way or another."""
        self._changes += 1
        request_id = request.request_id
        life = self._lives.get(request_id)
        kind = request.status.name
        if kind == "FINISHED_ABORTED":
            self.record.add("cancelled_total", 1)
        elif kind == "FINISHED_ERROR":
            self.record.add("failed_total", 1)
        else:
            self.record.add("finished_total", 1)
            self._lengths.observe(request.num_output_tokens, life.tenant if life is not None else "")
        if life is not None:
            self.scan.tenants.count_tokens(life, request.num_output_tokens)
        self._ended.append(request_id)
        self.prefills.forget(request_id)

    def left(self) -> None:
        """Requests were ended from outside a step: the last record must not show them for ever."""
        self._forget_ended()
        self._count()
        if not self._running and not self._waiting:
            self._write(self._now(), 0)

    def _forget_ended(self) -> None:
        for request_id in self._ended:
            self._lives.pop(request_id, None)
        self._ended.clear()

    def _count(self) -> None:
        """How many run and wait."""
        self._running, self._waiting = self._scheduler.get_request_counts()
        self._counted = self._changes

    # A step.

    def scheduled(self, output: Any, started_ns: int, throttled: bool) -> None:
        """The scheduler made up its mind about one step."""
        flight = Flight(output, started_ns, self._hook.echo)
        scheduler, tokens = self._scheduler, output.num_scheduled_tokens
        chunks = 0
        if (
            output.scheduled_new_reqs
            or self.prefills.under_way
            or output.scheduled_cached_reqs.resumed_req_ids
        ):
            chunks = self.prefills.scheduled(flight)
            self._changes += chunks
        running = len(scheduler.running)
        # Nobody moves without a change, save a streaming session that pauses.
        if self._counted != self._changes or running != self._running:
            self._count()
        flight.decodes = len(tokens) - chunks
        total = output.total_num_scheduled_tokens
        if flight.decodes == running:
            flight.whole = True
            self._reach_all(flight, total)
        elif flight.decodes:
            requests = scheduler.requests
            everything = sum([requests[request_id].num_computed_tokens for request_id in tokens])
            flight.context_tokens = everything - flight.chunks_reach
        if total >= scheduler.max_num_scheduled_tokens:
            flight.budget_limited = True
        if self._preempted_now:
            self._preempted_now = False
            flight.kv_limited = True
        elif self._waiting and self._judges_memory and not flight.budget_limited and not throttled:
            flight.kv_limited = self._short_of_memory()
        flight.changes = self._changes
        self._flights.add(flight)

    def _reach_all(self, flight: Flight, total: int) -> None:
        """KV positions that decodes read where all that run decode: as many as in the step before, and this
        step's, less the rejected ones. Counted anew when anybody has come or gone.
        """
        if self._reach_changes == self._changes:
            self._reach += total
        else:
            self._reach = sum(map(_computed, self._scheduler.running))
            self._reach_changes = self._changes
        flight.context_tokens = self._reach

    def _short_of_memory(self) -> bool:
        """Whether a request waits though the step had room for it in every other respect."""
        scheduler = self._scheduler
        # Some wait for something else: a grammar, a transfer, an adapter.
        ready: bool = self._waiting > len(scheduler.deferred_waiting)
        slots = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
        return ready and slots < scheduler.max_num_active_reqs and not scheduler.pause_state

    @staticmethod
    def counts(runner_output: Any) -> list[int]:
        """Tokens sampled for each request, before the scheduler cuts them where a request ends. Only for a
        step with drafts: else one each.
        """
        return list(map(len, runner_output.sampled_token_ids))

    def updated(
        self, output: Any, runner_output: Any, counts: list[int] | None, result: dict[int, Any]
    ) -> None:
        """The output of a step came back and `result` goes out to clients."""
        now_ns = self._now()
        flight = self._flights.take(output)
        if flight is None or not output.total_num_scheduled_tokens:
            self._no_step(now_ns, runner_output, result)
            return
        changes = flight.changes
        whole = flight.whole and not self._ended
        same = whole and changes == self._last_changes
        self._last_changes = changes if whole else -1
        same = self.emissions.step(runner_output.req_ids, counts, result, whole, same, now_ns)
        if counts is not None:
            self._count_drafts(flight, runner_output, counts, same)
        self.steps += 1
        self.decode_sequences += flight.decodes
        self.context_tokens += flight.context_tokens
        if self._ended:
            self._forget_ended()
        if self._counted != self._changes:
            self._count()
        if flight.prefill_tokens or flight.budget_limited or flight.kv_limited:
            self._count_limits(flight)
        started_ns = max(flight.started_ns, self._last_end_ns)
        self._last_end_ns = now_ns
        if self.steps % EVERY == 0 and self.sweep.advance(now_ns - started_ns, self.steps):
            self.record.put("kv_blocks_shared", self.sweep.shared)
            self.record.put("blocks_step", self.sweep.step)
        self._write(now_ns, now_ns - started_ns or 1, flight.echo)

    def _no_step(self, now_ns: int, runner_output: Any, result: dict[int, Any]) -> None:
        """Nothing was computed; but a request may have left."""
        self.emissions.step(runner_output.req_ids, None, result, False, False, now_ns)
        ended = bool(self._ended)
        self._forget_ended()
        self._count()
        self._last_changes = -1
        self._last_end_ns = now_ns
        if ended or self._written != (self._running, self._waiting, self._free_blocks()):
            self._write(now_ns, 0)

    def _count_limits(self, flight: Flight) -> None:
        add = self.record.add
        add("prefill_tokens_total", flight.prefill_tokens)
        add("chunk_positions_total", flight.chunk_positions)
        add("recomputed_tokens_total", flight.recomputed_tokens)
        add("kv_limited_steps_total", flight.kv_limited)
        add("budget_limited_steps_total", flight.budget_limited)

    def _count_drafts(self, flight: Flight, runner_output: Any, counts: list[int], same: bool) -> None:
        output, found = flight.output, None
        drafts, invalid = output.scheduled_spec_decode_tokens, output.num_invalid_spec_tokens
        if same and not invalid and len(drafts) == len(counts):
            attached = output.total_num_scheduled_tokens - len(counts)
            found = drafted_by_all(attached, counts, self._scheduler.num_spec_tokens)
        if found is None:
            # Of a request that ended before this output came back nobody looks at it.
            requests, ended = self._scheduler.requests, self._ended
            alive = {key: tokens for key, tokens in drafts.items() if key in requests or key in ended}
            found = drafted(alive, counts, runner_output.req_id_to_index, invalid)
        if same and flight.changes == self._changes:
            self._reach -= output.total_num_scheduled_tokens - len(counts) - found.accepted
        else:
            self._reach_changes = -1
        self.record.add_drafted(found)

    def _write(self, now_ns: int, duration_ns: int, echo: Sequence[float] | None = None) -> None:
        running, waiting, scan, record = self._running, self._waiting, self.scan, self.record
        if (now_ns >= scan.due_ns or not (running and waiting)) and scan.look(
            running, waiting, self.steps, now_ns
        ):
            scan.show(record)
        free = self._free_blocks()
        # A count of cached blocks is some steps old; the number of free ones is not.
        cached = min(self.sweep.cached, free)
        self._written = (running, waiting, free)
        record.set_head(
            now_ns,
            duration_ns,
            self.steps,
            self.emissions.tokens_total,
            self.decode_sequences,
            self.context_tokens,
            running,
            waiting,
            free - cached,
            cached,
        )
        flush = now_ns >= self._flush_ns or not (running or waiting)
        if flush:
            self._flush_ns = now_ns + _FLUSH_EVERY_NS
        self._hook.end_packed(record.packed, duration_ns, echo, flush)
