"""What the engine tells the link (a record a step, latencies, queues, tenants), and what it is told: knobs.

The step record's fields are the keys of what `_reading` returns, in its order: the manifest is built from
them. What needs a scan over all requests (KV demand ahead, tenants) is done every `SCAN_STEPS` steps and when
the engine falls idle. O(emissions) a step, O(requests) a scan, and memory for at most `MAX_TENANTS` that hold
nothing.
"""

import secrets
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Protocol

from kvengine.core import Core, Step
from kvengine.kv.table import BlockTables
from kvengine.request import Request
from kvengine.sched.peak import shared_blocks
from kvengine.sched.scheduler import Knobs, Scheduler
from kvpilot.inside.hook import StepHook
from kvpilot.inside.lengths import LengthPredictor
from kvpilot.link.fields import HORIZONS, QUANTILES
from kvpilot.link.requests import EndedRequest, prefix_hashes
from kvpilot.link.telemetry import TenantRow
from kvpilot.link.telemetry_page import MAX_TENANTS

SCAN_STEPS = 16

_DEMAND_FIELDS = tuple(f"demand_{horizon}_{q}_blocks" for horizon in HORIZONS for q in QUANTILES)


class MemoryReading(Protocol):
    """Bytes of the device, between steps."""

    free: int
    reserved: int
    allocated: int


class MemorySource(Protocol):
    """Whoever knows the device's memory."""

    def memory(self) -> MemoryReading: ...


def provided_fields(core: Core, memory: MemorySource, lengths: LengthPredictor) -> tuple[str, ...]:
    """Names of the step-record fields that this engine fills, in the order in which it does."""
    return tuple(_reading(core, memory, 0, 0, _Scan(core, lengths)))


class Telemetry:
    """Between one core and one step hook. Used from the core's thread."""

    def __init__(self, core: Core, memory: MemorySource, lengths: LengthPredictor, hook: StepHook) -> None:
        self._core = core
        self._memory = memory
        self._lengths = lengths
        self._hook = hook
        self._scan = _Scan(core, lengths)
        self._queues: list[tuple[int, int] | None] = [None] * len(core.scheduler.waiting.waiting_by_level)
        self._echoed: tuple[object, ...] = ()
        self._tenants: dict[str, TenantRow] = {}
        self._tenant_tokens: Counter[str] = Counter()
        self._tenant_prefix: dict[str, tuple[int, int]] = {}
        self._tenants_at_ns = 0
        self._prefix_salt = secrets.token_bytes(16)
        if hook.enabled:
            core.on_end = self._show_request

    def knobs(self, now_ns: int) -> Knobs:
        """The values in force at this step boundary."""
        values = self._hook.begin_step(now_ns)
        return Knobs(
            int(values["step_token_budget"]),
            int(values["prefill_chunk_tokens"]),
            int(values.get("speculative_tokens", 0)),
            int(values["max_running"]),
            values["admission_watermark"],
            values.get("kv_element_bits"),
            values.get("kv_kept_ratio", 1.0),
        )

    def record(self, step: Step, knobs: Knobs) -> None:
        """Write down a step that has ended."""
        if not self._hook.enabled:
            return
        self._observe(step)
        idle = not self._core.requests
        if idle or self._core.totals.steps % SCAN_STEPS == 0:
            self._scan = _Scan(self._core, self._lengths)
            self._show_tenants(step.ended_ns)
        self._show_queues()
        reading = _reading(
            self._core, self._memory, step.ended_ns, step.ended_ns - step.started_ns, self._scan
        )
        self._hook.end_step(tuple(reading.values()))
        self._echoed = (knobs, reading["device_free_bytes"], self._gone())

    def record_idle(self, now_ns: int, knobs: Knobs) -> None:
        """Between steps: write down again what moved without one: knobs, memory, requests."""
        if not self._hook.enabled:
            return
        gone = self._gone()
        if not self._echoed or gone != self._echoed[-1]:
            self._scan = _Scan(self._core, self._lengths)
            self._show_tenants(now_ns)
        # Nobody holds a block now: what the next scan finds must not be charged for this time.
        self._tenants_at_ns = now_ns
        self._show_queues()
        echo = (knobs, self._memory.memory().free, gone)
        if echo != self._echoed:
            self._hook.end_step(tuple(_reading(self._core, self._memory, now_ns, 0, self._scan).values()))
            self._echoed = echo

    def _gone(self) -> tuple[int, int, int]:
        """Requests that may have left without a step: the last record would show them running for ever."""
        totals = self._core.totals
        return totals.finished, totals.cancelled, totals.rejected

    def wake_by_ns(self) -> int | None:
        """When a lease runs out next."""
        return self._hook.next_expiry_ns()

    def last_words(self, error: BaseException) -> None:
        """Leave word for the flight recorder that this exception ends the engine."""
        self._hook.last_words(error)

    def close(self) -> None:
        self._hook.close()

    def _observe(self, step: Step) -> None:
        hook = self._hook
        for request in self._core.scheduler.admitted:
            hook.queue_wait[request.klass].record(request.first_scheduled_ns - request.arrived_ns)
        for emission in step.emissions:
            request, count = emission.request, len(emission.tokens)
            if request.tenant:
                self._tenant_tokens[request.tenant] += count
            if emission.first:
                hook.ttft[request.klass].record(emission.since_ns)
                continue
            # The tokens of one step share the time since the previous emission, or speculation would fill
            # the histogram with zeros.
            record, gap_ns = hook.itl[request.klass].record, emission.since_ns // count
            for _ in range(count):
                record(gap_ns)

    def _show_request(self, request: Request, how: str, now_ns: int) -> None:
        """Lengths and times of one that ended: recordings of arrivals are made of them."""
        scheduler, tenant = self._core.scheduler, request.tenant or ""
        prefix: tuple[int, ...] = ()
        if scheduler.tables.tree is not None:
            prefix = prefix_hashes(request.prompt, scheduler.block_size, self._prefix_salt, tenant)
        self._hook.end_request(
            EndedRequest(
                tenant,
                request.arrived_ns,
                request.first_emitted_ns,
                request.last_emitted_ns if how == "finished" else now_ns,
                request.klass,
                len(request.prompt),
                request.output_count,
                how,
                request.preemptions,
                prefix,
            )
        )

    def _show_queues(self) -> None:
        waiting = self._core.scheduler.waiting
        rows = zip(waiting.waiting_by_level, waiting.prompt_tokens_by_level, strict=True)
        for level, row in enumerate(rows):
            if row != self._queues[level]:
                self._hook.set_class(level, *row)
                self._queues[level] = row

    def _show_tenants(self, now_ns: int) -> None:
        elapsed_ns = now_ns - self._tenants_at_ns if self._tenants_at_ns else 0
        self._tenants_at_ns = now_ns
        scheduler = self._core.scheduler
        running = Counter(request.tenant for request in scheduler.running if request.tenant)
        waiting = Counter(request.tenant for request in scheduler.waiting if request.tenant)
        held: dict[str, set[int]] = {}
        for request in scheduler.running:
            if request.tenant:
                held.setdefault(request.tenant, set()).update(request.blocks)
        blocks = Counter({tenant: len(of_tenant) for tenant, of_tenant in held.items()})
        known = self._tenants.keys() | self._tenant_tokens.keys() | scheduler.tables.prefix_by_tenant.keys()
        for tenant in known | running.keys() | waiting.keys():
            before = self._tenants.get(tenant)
            # Between two scans it is taken to have held the mean of what they saw.
            held_before, block_ns = (before.kv_blocks, before.block_ns_total) if before else (0, 0)
            block_ns += (held_before + blocks[tenant]) * elapsed_ns // 2
            row = TenantRow(
                tenant,
                running[tenant],
                waiting[tenant],
                blocks[tenant],
                block_ns,
                self._tenant_tokens[tenant],
            )
            if row != before:
                self._tenants.pop(tenant, None)
                self._tenants[tenant] = row  # Last in order: the latest to change.
                self._hook.set_tenant(*row)
            self._show_prefix(tenant)
        self._forget_tenants()

    def _show_prefix(self, tenant: str) -> None:
        """What the prefix cache had of its prompts: the manifest's `tenant_columns`."""
        counts = self._core.scheduler.tables.prefix_by_tenant.get(tenant)
        if counts is not None and counts != self._tenant_prefix.get(tenant):
            self._tenant_prefix[tenant] = counts
            self._hook.set_tenant_counts(tenant, counts)

    def _forget_tenants(self) -> None:
        """Whoever can name tenants could otherwise name millions: of those that hold nothing, the
        latest to change are kept.
        """
        idle = [
            row.name for row in self._tenants.values() if not (row.running or row.waiting or row.kv_blocks)
        ]
        for name in idle[: max(0, len(idle) - MAX_TENANTS)]:
            del self._tenants[name], self._tenant_tokens[name]
            self._tenant_prefix.pop(name, None)
            self._core.scheduler.tables.prefix_by_tenant.pop(name, None)


class _Scan:
    """KV blocks that the running requests are predicted to hold some steps ahead."""

    def __init__(self, core: Core, lengths: LengthPredictor) -> None:
        self.step = core.totals.steps
        scheduler = core.scheduler
        by_packing: dict[int, list[Request]] = {}
        for request in scheduler.running:
            by_packing.setdefault(request.packing, []).append(request)
        # Blocks that several hold count once, and until all of their holders have ended: as if to the last
        # horizon. Sums over packings: of means exact, of quantiles on the safe side.
        common: set[int] = set()
        values = [0.0] * len(_DEMAND_FIELDS)
        for packing, running in (by_packing or {1: []}).items():
            size = scheduler.block_size * packing
            held = [
                (_own_tokens(request, size, scheduler, common), request.output_count, request.tenant or "")
                for request in running
            ]
            demands = lengths.demand(held, size, HORIZONS)
            values = [a + b for a, b in zip(values, chain(*demands), strict=True)]
        values = [value + len(common) for value in values]
        self.fields = dict(zip(_DEMAND_FIELDS, values, strict=True))
        self.fields |= _blocks_by_precision(by_packing, scheduler)


def _own_tokens(request: Request, size: int, scheduler: Scheduler, common: set[int]) -> int:
    """What of its KV lies in blocks of `size` tokens that it holds alone; the others go to `common`.

    The block that it writes next is its own in either case: before it does it has a copy.
    """
    held = len(request.tokens) - request.evicted
    shared = min(shared_blocks(request.blocks, scheduler.pool.references), request.stored // size)
    common.update(request.blocks[:shared])
    return held - shared * size


def _blocks_by_precision(by_packing: dict[int, list[Request]], scheduler: Scheduler) -> dict[str, float]:
    """Blocks in use whose tokens are stored in so many bits; together all that are in use."""
    own = scheduler.precisions.own.bits
    counts = {f"kv_{one.bits}bit_blocks": 0 for one in scheduler.precisions.offered}
    for packing, running in by_packing.items():
        if packing > 1:
            blocks = {block for request in running for block in request.blocks}
            counts[f"kv_{own // packing}bit_blocks"] = len(blocks)
    counts[f"kv_{own}bit_blocks"] = scheduler.pool.referenced - sum(counts.values())
    return dict(counts)


def _reading(
    core: Core, memory: MemorySource, now_ns: int, duration_ns: int, scan: _Scan
) -> dict[str, float]:
    """The step record. Adding a key adds a field; each is in the catalogue of `kvpilot.link.fields`."""
    totals, scheduler, device = core.totals, core.scheduler, memory.memory()
    pool, waiting, running = scheduler.pool, scheduler.waiting, scheduler.running
    return {
        "time_ns": now_ns,
        "duration_ns": duration_ns,
        "steps_total": totals.steps,
        "prefill_tokens_total": totals.prefill_tokens,
        "decode_tokens_total": totals.decode_tokens,
        "drafted_tokens_total": totals.drafted_tokens,
        "accepted_tokens_total": totals.accepted_tokens,
        "draft_rounds_total": totals.draft_rounds,
        "rejected_rounds_total": totals.rejected_rounds,
        "decode_sequences_total": totals.decode_sequences,
        "context_tokens_total": totals.context_tokens,
        "chunk_positions_total": totals.chunk_positions,
        "running": len(running),
        "waiting": len(waiting),
        "waiting_prompt_tokens": waiting.prompt_tokens,
        "kv_limited_steps_total": totals.kv_limited_steps,
        "budget_limited_steps_total": totals.budget_limited_steps,
        "kv_blocks_free": pool.free,
        "kv_blocks_cached": pool.cached,
        "kv_blocks_shared": pool.shared,
        "tail_waste_tokens": _tail_waste_tokens(running, scheduler.block_size),
        "evicted_tokens_total": scheduler.tables.evicted_tokens_total,
        "preemptions_total": scheduler.preemptions_total,
        "recomputed_tokens_total": totals.recomputed_tokens,
        "finished_total": totals.finished,
        "rejected_total": totals.rejected,
        "cancelled_total": totals.cancelled,
        "failed_total": totals.failed,
        "oom_total": totals.oom,
        "device_free_bytes": device.free,
        "device_reserved_bytes": device.reserved,
        "device_allocated_bytes": device.allocated,
        "demand_step": scan.step,
        **scan.fields,
        **_prefix_reading(scheduler.tables),
    }


def _tail_waste_tokens(running: Sequence[Request], block_size: int) -> int:
    """Slots without a token. Blocks that are full are waste to nobody; forks' common tail counts once."""
    waste, shared = 0, {}
    for request in running:
        empty = max(0, len(request.blocks) * block_size * request.packing - request.stored)
        if request.tail_shared:
            shared[request.blocks[-1]] = empty
        else:
            waste += empty
    return waste + sum(shared.values())


def _prefix_reading(tables: BlockTables) -> dict[str, float]:
    tree = tables.tree
    if tree is None:
        return {}
    return {
        "kv_blocks_pinned": len(tree.pinned),
        "prefix_tokens_queried_total": tables.queried_tokens_total,
        "prefix_tokens_hit_total": tables.hit_tokens_total,
        "prefix_mismatches_total": tree.mismatches,
    }
