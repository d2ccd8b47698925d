"""The engine core: one step of continuous batching, from arrivals to emitted tokens.

A request's life: accepted (or refused at the door) → waiting → running: its prompt in chunks, then a token or
more a step → ended, in exactly one of the ways that `Totals` counts. Preemption sends it back to waiting and
loses no token.

A request may bring forks: continuations of the same prompt. Each counts as a request of its own; it begins
when its prompt has been computed once, and shares those blocks. Or it brings a group of beams, which end, are
cancelled and fail together; see `sched.beam`.

Nothing here knows processes, sockets or torch: an executor computes, a clock tells the time, and the caller
sends what `Step` holds wherever it should go. O(slices of the step).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvengine.errors import DeviceOutOfMemory
from kvengine.kv.eviction.policy import Offer
from kvengine.request import Request
from kvengine.sched import beam
from kvengine.sched.admission import Limits, refusal
from kvengine.sched.batch import Batch, Slice, SliceResult
from kvengine.sched.scheduler import Knobs, Scheduler
from kvengine.totals import Totals
from kvpilot.clock import Clock
from kvpilot.inside.lengths import LengthPredictor

log = logging.getLogger(__name__)


class Executor(Protocol):
    """Whatever computes a batch."""

    def execute(self, batch: Batch) -> list[SliceResult]:
        """One result a slice, in order. Raises DeviceOutOfMemory with the requests as they were."""
        ...


@dataclass(slots=True)
class Emission:
    """Tokens of one request that one step brought out."""

    request: Request
    tokens: list[int]
    since_ns: int
    """Time since its previous emission; for its first, since it arrived."""
    first: bool
    finish: str | None
    """`stop` or `length` with its last token."""


@dataclass(slots=True)
class Failure:
    """A request that ended in an error; `status` is the HTTP one."""

    request: Request
    status: int
    message: str


@dataclass(slots=True)
class Step:
    """What one step did."""

    batch: Batch
    started_ns: int
    ended_ns: int
    emissions: list[Emission]
    failures: list[Failure]


class Core:
    """All requests of one engine and the step that moves them on."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        limits: Limits,
        eos: frozenset[int],
        lengths: LengthPredictor,
        clock: Clock,
        offer: Offer | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.totals = Totals()
        self.requests: dict[int, Request] = {}
        """Waiting, running, or a fork of one whose prompt is still to be computed; by id."""
        self.on_end: Callable[[Request, str, int], None] | None = None
        """Told of each request that ends, how (as `kvpilot.link.requests` calls it) and when."""
        self._executor = executor
        self._limits = limits
        self._eos = eos
        self._lengths = lengths
        self._clock = clock
        self._offer = offer or Offer(scheduler.block_size)

    def accept(self, request: Request) -> str | None:
        """Queue a request, or say in one line why it can never be served."""
        reason = refusal(len(request.prompt), request.sampling.max_tokens, self._limits)
        if reason is None and request.eviction is not None:
            reason = self._offer.refusal(request.eviction, 1 + len(request.forks))
        family = [request, *request.forks]
        if request.group is not None:
            family = request.group.family
            reason = reason or self._offer.beam_refusal() or self._too_wide(request, len(family))
        if reason is not None:
            for _ in family:
                self.count_rejected()
            return reason
        self.totals.arrivals += len(family)
        self.requests.update((one.id, one) for one in family)
        self.scheduler.add(request)
        return None

    def count_rejected(self) -> None:
        """A request was refused, here or before it came here."""
        self.totals.arrivals += 1
        self.totals.rejected += 1

    def cancel(self, request_id: int) -> None:
        """Its client went away. Nothing happens if it has ended already: the two crossed."""
        for request in self._company(request_id):
            self.totals.cancelled += 1
            self._tell_end(request, "cancelled")
            self._forget(request)

    def stop(self, request_id: int) -> None:
        """Its text reached a stop string: it finished. Nothing happens if it has ended already."""
        for request in self._company(request_id):
            self._finish(request)

    def step(self, knobs: Knobs) -> Step:
        """Schedule, execute, commit. Never raises for what an executor does; its requests fail."""
        started_ns = self._clock.monotonic_ns()
        batch = self.scheduler.schedule(knobs, started_ns)
        self.totals.steps += 1
        self.totals.kv_limited_steps += self.scheduler.kv_limited
        self.totals.budget_limited_steps += self.scheduler.budget_limited
        step = Step(batch, started_ns, started_ns, [], [])
        try:
            results = self._executor.execute(batch) if batch.slices else []
        except DeviceOutOfMemory as error:
            self.totals.oom += 1
            self._fail(step, 503, f"The engine ran out of device memory computing this request: {error}")
        except Exception as error:
            log.exception("step %d failed; its %d requests fail", self.totals.steps, len(batch.slices))
            self._fail(step, 500, f"The engine failed computing this request: {type(error).__name__}")
        else:
            step.ended_ns = self._clock.monotonic_ns()
            self.totals.add_batch(batch)
            for item, result in zip(batch.slices, results, strict=True):
                self._commit(step, item, result)
        return step

    def _commit(self, step: Step, item: Slice, result: SliceResult) -> None:
        request = item.request
        if result.drafted:
            self.totals.add_round(result)
        if request.recompute_until > item.start:
            again = min(request.recompute_until, item.start + item.count) - item.start
            self.totals.recomputed_tokens += again
        request.computed += item.count + result.accepted
        request.block_mass = result.block_mass
        if not item.samples:
            self.scheduler.tables.register(request)
            return
        if request.group is not None:
            self.scheduler.tables.register(request)
            request.group.hold(request, result.candidates)
            if request.group.ready:
                self._move(step, request.group)
            return
        tokens, finish = self._cut(request, result.tokens)
        request.tokens += tokens
        self.scheduler.tables.register(request)
        if result.logprobs:
            for one, logprob in zip((request, *request.forks), result.logprobs, strict=True):
                one.logprob += logprob
        for fork, token in zip(request.forks, result.forked, strict=True):
            self.scheduler.fork(request, fork)
            fork.parent = None
            begun, ended = self._cut(fork, [token])
            fork.tokens += begun
            self._emit(step, fork, begun, ended)
        if request.forks:
            request.forks = []
        self._emit(step, request, tokens, finish)

    def _move(self, step: Step, group: beam.BeamGroup) -> None:
        """All beams of a group have their candidates: on to the next token, or to the end."""
        heirs = group.choose(self._eos)
        if heirs:
            group.move(heirs, self.scheduler)
            for one in group.live:
                self._emit(step, one, one.tokens[-1:], None)
        else:
            group.settle(self.scheduler)
            for one, hypothesis in zip(group.family, group.finished, strict=True):
                self._emit(step, one, one.tokens[-1:], hypothesis.finish)
        for one in group.family:
            # Who carries no beam now emits with the others when it does.
            one.last_emitted_ns = step.ended_ns

    def _emit(self, step: Step, request: Request, tokens: list[int], finish: str | None) -> None:
        self.totals.decode_tokens += len(tokens)
        first = request.last_emitted_ns == 0
        since_ns = step.ended_ns - (request.arrived_ns if first else request.last_emitted_ns)
        request.last_emitted_ns = step.ended_ns
        if first:
            request.first_emitted_ns = step.ended_ns
        step.emissions.append(Emission(request, tokens, since_ns, first, finish))
        if finish is not None:
            self._finish(request)

    def _cut(self, request: Request, tokens: list[int]) -> tuple[list[int], str | None]:
        """What to emit, and why it ends there. Drafts may run past an end token, never past `max_tokens`."""
        if not request.sampling.ignore_eos and not self._eos.isdisjoint(tokens):
            end = next(index for index, token in enumerate(tokens) if token in self._eos) + 1
            return tokens[:end], "stop"
        left = request.sampling.max_tokens - (len(request.tokens) - len(request.prompt))
        return tokens, "length" if len(tokens) == left else None

    def _fail(self, step: Step, status: int, message: str) -> None:
        step.ended_ns = self._clock.monotonic_ns()
        for item in step.batch.slices:
            if item.request.id not in self.requests:  # It has failed with its group.
                continue
            # Its draft KV may have been half written; nobody else may rely on it.
            item.request.draft_computed = 0
            group = item.request.group
            family, item.request.forks = [item.request, *item.request.forks], []
            family = family if group is None else group.family
            for request in family:
                self.totals.failed += 1
                self._tell_end(request, "failed")
                step.failures.append(Failure(request, status, message))
                del self.requests[request.id]
            if group is None:
                self.scheduler.remove(item.request)
            else:
                group.dissolve(self.scheduler)

    def _company(self, request_id: int) -> list[Request]:
        """Who leaves with this one, itself included; nobody if it has ended already."""
        request = self.requests.get(request_id)
        if request is None:
            return []
        return [request] if request.group is None else request.group.family

    def _too_wide(self, request: Request, width: int) -> str | None:
        size = self.scheduler.block_size
        blocks = self._limits.pool_tokens // size
        return beam.refusal(len(request.prompt), request.sampling.max_tokens, width, size, blocks)

    def _finish(self, request: Request) -> None:
        self.totals.finished += 1
        self._tell_end(request, "finished")
        self._lengths.observe(request.output_count, request.tenant or "")
        self._forget(request)

    def _tell_end(self, request: Request, how: str) -> None:
        if self.on_end is not None:
            self.on_end(request, how, self._clock.monotonic_ns())

    def _forget(self, request: Request) -> None:
        del self.requests[request.id]
        if request.group is not None:
            request.group.dissolve(self.scheduler)
            return
        if request.parent is not None:
            request.parent.forks.remove(request)
            return
        self.scheduler.remove(request)
        if request.forks:
            # It ended before its prompt was computed: the first of its forks takes its place.
            heir, *rest = request.forks
            heir.parent = None
            heir.add_forks(rest)
            self.scheduler.add(heir)
