"""What the engine writes to the link, read back as the pilot reads it; knobs that move between steps only."""

import os

import pytest
from fake_executor import FakeExecutor, Reading

from kvengine.config import EngineConfig
from kvengine.core import Core
from kvengine.errors import DeviceOutOfMemory
from kvengine.kv.eviction.policy import Eviction
from kvengine.kv.plan import Plan
from kvengine.kv.pool import BlockPool
from kvengine.kv.tree import PrefixTree
from kvengine.manifest import PREFIX_FIELDS, PREFIX_SIGNALS, build_manifest
from kvengine.request import Request, SamplingParams
from kvengine.sched.admission import Limits
from kvengine.sched.batch import Batch
from kvengine.sched.scheduler import Scheduler
from kvengine.telemetry import SCAN_STEPS, Telemetry, provided_fields
from kvpilot.clock import NS, VirtualClock
from kvpilot.inside.hook import StepHook, with_hook_fields
from kvpilot.inside.lengths import LengthPredictor
from kvpilot.link.controls import CONTROLS_BYTES, ControlsWriter, Lease, Scope
from kvpilot.link.fields import HOST_FIELD, STEP_FIELDS
from kvpilot.link.page import Identity
from kvpilot.link.telemetry import TelemetryReader, TelemetryWriter, plan_page
from kvpilot.link.telemetry_page import MAX_TENANTS

BLOCK = 4
BLOCKS = 32
NONCE = 77
STEP_NS = 10_000_000
WHO = Identity("host", "", 0, 0)


class Flight:
    """An engine in virtual time with a page that a reader reads and controls that a writer writes."""

    def __init__(self, draft: bool = True, cached: bool = False) -> None:
        self.clock = VirtualClock(start_ns=NS)
        self.free_bytes = 1 << 20
        self.error: Exception | None = None
        executor = FakeExecutor(BLOCK, before=self._before)
        executor.memory = lambda: Reading(self.free_bytes, 5, 4)  # type: ignore[method-assign]
        lengths = LengthPredictor(100)
        pool = BlockPool(BLOCKS)
        self.tree = PrefixTree(pool, BLOCK, "fake") if cached else None
        self.scheduler = Scheduler(pool, BLOCK, levels=2, tree=self.tree)
        self.core = Core(
            self.scheduler, executor, Limits(100, BLOCKS * BLOCK), frozenset(), lengths, self.clock
        )
        config = EngineConfig(
            step_token_budget=64,
            prefill_chunk_tokens=64,
            max_running=8,
            classes=("batch", "interactive"),
            **({} if draft else {"draft": None}),
        )
        self.manifest = with_hook_fields(
            build_manifest(
                config,
                Plan(1 << 30, 1 << 20, BLOCK, 512, BLOCKS, 1 << 20),
                fields=provided_fields(self.core, executor, lengths),
                max_model_len=100,
                activation_bytes_per_token=8192,
                device="cpu",
            )
        )
        page = bytearray(plan_page(self.manifest).page_bytes)
        writer = TelemetryWriter(page, self.manifest, nonce=NONCE, identity=WHO)
        self.controls = bytearray(CONTROLS_BYTES)
        self.pilot = ControlsWriter(self.controls, WHO)
        hook = StepHook(self.manifest, writer, lambda _now_ns: bytes(self.controls))
        hook.controls_every_ns = 0
        self.telemetry = Telemetry(self.core, executor, lengths, hook)
        self.reader = TelemetryReader(lambda offset, size: bytes(page[offset : offset + size]))

    def _before(self, _batch: Batch) -> None:
        self.clock.advance(STEP_NS / NS)
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def arrive(self, number: int, prompt: int = 6, output: int = 6, klass: int = 0, tenant: str = "") -> None:
        sampling = SamplingParams(output)
        now_ns = self.clock.monotonic_ns()
        self.core.accept(Request(number, [number] * prompt, sampling, klass, tenant or None, now_ns))

    def step(self) -> Batch:
        knobs = self.telemetry.knobs(self.clock.monotonic_ns())
        step = self.core.step(knobs)
        self.telemetry.record(step, knobs)
        return step.batch

    def idle(self) -> None:
        now_ns = self.clock.monotonic_ns()
        self.telemetry.record_idle(now_ns, self.telemetry.knobs(now_ns))

    def lease(self, renewal: int, ttl_s: float = 1.0, **values: float) -> None:
        leases = [
            Lease(knob, Scope("all"), value, round(ttl_s * NS), renewal, 1) for knob, value in values.items()
        ]
        self.pilot.write(leases, NONCE)


def test_every_field_that_this_engine_can_fill_is_filled() -> None:
    """The catalogue less the prefix cache, which the manifest says is missing and why, what only a hook over
    real files has, and when blocks were counted: here that is every step.
    """
    names = {field.name for field in Flight().manifest.fields if not field.name.startswith("knob.")}
    assert names == set(STEP_FIELDS) - set(PREFIX_FIELDS) - {HOST_FIELD, "blocks_step"}
    lacking = set(Flight().manifest.unsupported_signals)
    assert lacking == {*PREFIX_SIGNALS, "device_fragmentation_ratio"}


def test_with_a_prefix_cache_every_field_is_filled_and_what_is_missing_is_told() -> None:
    """On a CPU there is no allocator that could be fragmented: missing, not 0."""
    manifest = Flight(cached=True).manifest
    names = {field.name for field in manifest.fields if not field.name.startswith("knob.")}
    assert names == set(STEP_FIELDS) - {HOST_FIELD, "blocks_step"}
    assert set(manifest.unsupported_signals) == {"device_fragmentation_ratio"}


def test_a_step_record_says_what_the_prefix_cache_did() -> None:
    """Counts by hand, blocks of 4: a prompt of 9 leaves 2 blocks cached; two alike then share those."""
    flight = Flight(cached=True)
    flight.arrive(1, prompt=9, output=1)
    flight.step()
    expected = {
        "kv_blocks_cached": 2,
        "kv_blocks_free": BLOCKS - 2,
        "kv_blocks_shared": 0,
        "prefix_tokens_queried_total": 9,
        "prefix_tokens_hit_total": 0,
        "tail_waste_tokens": 0,
    }
    (record,) = flight.reader.poll()
    assert {name: record[name] for name in expected} == expected
    for number in (2, 3):
        sampling = SamplingParams(5)
        flight.core.accept(Request(number, [1] * 9, sampling, 0, "acme", flight.clock.monotonic_ns()))
    for number in (4, 5):
        flight.core.accept(Request(number, [1] * 9, SamplingParams(5), 0, None, flight.clock.monotonic_ns()))
    flight.step()
    expected = {
        "kv_blocks_cached": 0,
        # Of acme two shared and two tails, of nobody in particular the same.
        "kv_blocks_free": BLOCKS - 8,
        "kv_blocks_shared": 4,
        "prefix_tokens_queried_total": 9 * 5,
        "prefix_tokens_hit_total": 16,
        "prefix_mismatches_total": 0,
        "kv_blocks_pinned": 0,
        "tail_waste_tokens": 4 * 3,
    }
    (record,) = flight.reader.poll()
    assert {name: record[name] for name in expected} == expected


def test_a_tenant_is_shown_with_the_blocks_it_holds_however_many_requests_read_them() -> None:
    flight = Flight(cached=True)
    for number in range(1, 4):
        flight.core.accept(Request(number, [7] * 12, SamplingParams(60), 0, "acme", NS))
    for _ in range(SCAN_STEPS):
        flight.step()
    (row,) = flight.reader.tenants()
    assert row.kv_blocks == flight.scheduler.pool.referenced


def test_an_engine_without_a_draft_says_that_it_cannot_speculate() -> None:
    flight = Flight(draft=False)
    assert flight.manifest.knob("speculative_tokens") is None
    assert "no draft" in flight.manifest.unsupported_knobs["speculative_tokens"]
    flight.arrive(1)
    flight.step()
    assert flight.step().slices[0].drafts == 0


def test_a_step_record_says_what_the_step_did() -> None:
    """Counts by hand: a prompt of 6 and one of 5, then a decode round with two drafts accepted each."""
    flight = Flight()
    flight.arrive(1, prompt=6, output=9)
    flight.arrive(2, prompt=5, output=9, klass=1)
    flight.step()
    (first,) = flight.reader.poll()
    expected = {
        "steps_total": 1,
        "duration_ns": STEP_NS,
        "time_ns": flight.clock.monotonic_ns(),
        "prefill_tokens_total": 11,
        "decode_tokens_total": 2,
        "chunk_positions_total": 6 * 6 + 5 * 5,
        "running": 2,
        "waiting": 0,
        "kv_blocks_free": BLOCKS - 4,
        "kv_blocks_cached": 0,
        "tail_waste_tokens": 16 - 11,
        "device_free_bytes": 1 << 20,
        "device_allocated_bytes": 4,
        "knob.speculative_tokens": 4,
        "knob.max_running": 8,
    }
    assert {name: first[name] for name in expected} == expected
    flight.step()
    (second,) = flight.reader.poll()
    expected = {
        "drafted_tokens_total": 8,
        "accepted_tokens_total": 4,
        "draft_rounds_total": 2,
        "rejected_rounds_total": 2,
        "decode_sequences_total": 2,
        "context_tokens_total": (6 + 5) + (5 + 5),
        "decode_tokens_total": 8,
        "prefill_tokens_total": 11,
    }
    assert {name: second[name] for name in expected} == expected


def test_latencies_are_recorded_by_class_and_tokens_of_a_step_share_its_time() -> None:
    flight = Flight()
    flight.arrive(1, output=7)
    flight.clock.advance(0.04)
    flight.arrive(2, output=1, klass=1)
    flight.step()
    flight.step()
    flight.step()

    def counted(name: str, level: int) -> tuple[int, float | None]:
        histogram = flight.reader.histogram(name, level)
        assert histogram is not None
        return histogram.count, histogram.mean()

    assert counted("ttft", 0) == (1, pytest.approx(0.05))
    assert counted("ttft", 1) == (1, pytest.approx(0.01))
    assert counted("queue_wait", 0) == (1, pytest.approx(0.04))
    assert counted("queue_wait", 1) == (1, pytest.approx(0))
    assert counted("itl", 0) == (6, pytest.approx(0.01 / 3, rel=1e-6))
    assert counted("itl", 1)[0] == 0
    steps = flight.reader.histogram("step")
    assert steps is not None
    assert (steps.count, steps.mean()) == (3, pytest.approx(0.01))


def test_queues_and_tenants_are_shown() -> None:
    """Who waits by class; what a tenant holds, until it holds nothing."""
    flight = Flight()
    for number in range(1, 11):
        flight.arrive(number, klass=number % 2, tenant="acme", output=30)
    flight.step()
    assert [(row.waiting, row.waiting_prompt_tokens) for row in flight.reader.classes()] == [(2, 12), (0, 0)]
    for _ in range(SCAN_STEPS - 1):
        flight.step()
    (row,) = flight.reader.tenants()
    assert row.name == "acme"
    assert row.running == len(flight.scheduler.running)
    assert row.kv_blocks == flight.scheduler.pool.referenced
    while flight.core.requests:
        flight.step()
    (row,) = flight.reader.tenants()
    assert (row.running, row.waiting, row.kv_blocks) == (0, 0, 0)
    assert row.tokens_total == flight.core.totals.decode_tokens == 300
    assert row.block_ns_total > 0


def test_demand_is_predicted_every_16_steps_and_says_when() -> None:
    flight = Flight()
    flight.arrive(1, prompt=6, output=90)
    for _ in range(SCAN_STEPS + 3):
        flight.step()
    records = flight.reader.poll()
    assert [record["demand_step"] for record in records[:SCAN_STEPS]] == [0] * (SCAN_STEPS - 1) + [SCAN_STEPS]
    last = records[-1]
    assert last["demand_step"] == SCAN_STEPS
    held = BLOCKS - records[SCAN_STEPS - 1]["kv_blocks_free"]
    assert held < last["demand_16_p90_blocks"] <= BLOCKS
    assert last["demand_16_p10_blocks"] <= last["demand_16_p50_blocks"] <= last["demand_16_p90_blocks"]


@pytest.mark.parametrize("sharing", ["cached", "choices"])
def test_demand_counts_what_is_shared_once(sharing: str) -> None:
    """Two sequences of one prompt; when both go on, the 90 % quantile is what they hold 16 steps later."""
    flight = Flight(draft=False, cached=sharing == "cached")
    tails = [[1, 1], [2, 2] if sharing == "cached" else [1, 1]]
    made = [Request(number, [7] * 40 + tails[number], SamplingParams(50), 0, None, 0) for number in (0, 1)]
    if sharing == "choices":
        made[0].add_forks(made[1:])
        flight.core.accept(made[0])
    else:
        flight.core.accept(made[0])
        flight.step()
        for request in made[1:]:
            flight.core.accept(request)
    while flight.core.totals.steps < 2 * SCAN_STEPS:
        flight.step()
    records = flight.reader.poll()
    early, later = records[SCAN_STEPS - 1], records[2 * SCAN_STEPS - 1]
    held = [BLOCKS - record["kv_blocks_free"] - record["kv_blocks_cached"] for record in (early, later)]
    assert len(flight.scheduler.running) == 2
    assert early["kv_blocks_shared"] == 42 // BLOCK
    each = later["steps_total"] - early["steps_total"]
    assert held[1] == held[0] + 2 * each // BLOCK
    assert early["demand_16_p50_blocks"] < held[1] <= early["demand_16_p90_blocks"] <= held[1] + 1
    while flight.core.requests:
        flight.step()
    assert flight.reader.poll()[-1]["demand_16_p90_blocks"] == 0


def test_knobs_move_at_step_boundaries_and_are_echoed() -> None:
    """A lease is obeyed in the step after it is seen renewed, and baseline is back one ttl later."""
    flight = Flight()
    flight.arrive(1, prompt=40, output=40)
    flight.lease(1, prefill_chunk_tokens=8, speculative_tokens=0, max_running=0)
    assert flight.step().tokens == 40, "a lease found at the start is history"
    flight.arrive(2, prompt=40, output=2)
    flight.lease(2, prefill_chunk_tokens=8, speculative_tokens=0, max_running=0)
    batch = flight.step()
    assert (batch.prefill_tokens, batch.tokens) == (0, 1), "a running cap of at least one, drained"
    echo = flight.reader.poll()[-1]
    names = ("prefill_chunk_tokens", "speculative_tokens", "max_running")
    assert [echo["knob." + name] for name in names] == [8, 0, 1]
    assert echo["controls_sequence"] == 2
    flight.clock.advance(1.0)
    assert flight.step().prefill_tokens == 40
    assert flight.reader.poll()[-1]["knob.prefill_chunk_tokens"] == 64


def test_an_idle_engine_shows_when_a_lease_runs_out_or_memory_moves() -> None:
    """Without a step: a record with the same step count, no duration, and the new value."""
    flight = Flight()
    flight.arrive(1, output=1)
    flight.step()
    flight.idle()
    assert len(flight.reader.poll()) == 1, "nothing moved, nothing to say"
    flight.lease(1, max_running=2)
    flight.idle()
    flight.lease(2, max_running=2)
    flight.idle()
    assert [record["knob.max_running"] for record in flight.reader.poll()] == [2]
    wake_ns = flight.telemetry.wake_by_ns()
    assert wake_ns == flight.clock.monotonic_ns() + NS
    flight.clock.advance(1.0)
    flight.idle()
    flight.free_bytes = 1000
    flight.idle()
    flight.idle()
    records = flight.reader.poll()
    assert [(r["knob.max_running"], r["device_free_bytes"]) for r in records] == [(8, 1 << 20), (8, 1000)]
    assert {record["steps_total"] for record in records} == {1}
    steps = flight.reader.histogram("step")
    assert steps is not None
    assert steps.count == 1, "an idle record is no step"


@pytest.mark.parametrize("leave", ["cancel", "stop"])
def test_a_request_that_leaves_between_steps_is_no_longer_shown(leave: str) -> None:
    """Its client hung up, or its text reached a stop string: not running, no demand, no blocks."""
    flight = Flight()
    flight.arrive(1, output=60, tenant="acme")
    for _ in range(SCAN_STEPS):
        flight.step()
    assert flight.reader.tenants()[0].kv_blocks > 0
    assert flight.reader.poll()[-1]["running"] == 1
    getattr(flight.core, leave)(1)
    flight.idle()
    (record,) = flight.reader.poll()
    assert (record["running"], record["demand_16_p90_blocks"]) == (0, 0)
    assert record["finished_total"] + record["cancelled_total"] == 1
    (row,) = flight.reader.tenants()
    assert (row.running, row.kv_blocks) == (0, 0)


def test_a_refused_request_is_counted_while_the_engine_idles() -> None:
    flight = Flight()
    flight.idle()
    flight.reader.poll()
    flight.arrive(1, prompt=101)
    flight.idle()
    assert [record["rejected_total"] for record in flight.reader.poll()] == [1]


def test_a_tenant_is_not_charged_for_the_time_before_it_came() -> None:
    """An idle hour, then 16 steps: block-seconds are at most what all blocks could hold in those steps."""
    flight = Flight()
    flight.arrive(1, tenant="acme")
    while flight.core.requests:
        flight.step()
    flight.clock.advance(3600)
    flight.idle()
    flight.arrive(2, output=90, tenant="acme")
    for _ in range(SCAN_STEPS):
        flight.step()
    (row,) = flight.reader.tenants()
    assert row.kv_blocks > 0
    assert row.block_ns_total <= BLOCKS * flight.core.totals.steps * STEP_NS


def test_tenants_without_number_are_not_remembered_for_ever() -> None:
    flight = Flight()
    for number in range(1, 3 * MAX_TENANTS):
        flight.arrive(number, output=1, tenant=f"h-{number}")
        flight.step()
    assert len(flight.telemetry._tenants) == len(flight.telemetry._tenant_tokens) == MAX_TENANTS
    assert len(flight.reader.tenants()) == MAX_TENANTS


def test_a_step_out_of_memory_is_in_the_record() -> None:
    flight = Flight()
    flight.arrive(1)
    flight.error = DeviceOutOfMemory("full")
    flight.step()
    (record,) = flight.reader.poll()
    assert (record["oom_total"], record["failed_total"], record["running"]) == (1, 1, 0)
    assert record["kv_blocks_free"] == BLOCKS


def test_the_engine_behaves_the_same_without_a_link() -> None:
    """No environment, no telemetry: the same batches as with a pilot that holds no lease."""

    def flown(disabled: bool) -> list[tuple[int, int]]:
        flight = Flight()
        if disabled:
            hook = StepHook.open(flight.manifest, environ={})
            assert not hook.enabled
            flight.telemetry._hook = hook
        for number in range(1, 9):
            flight.arrive(number, prompt=5 + number, output=12, klass=number % 2)
        batches = []
        while flight.core.requests:
            batch = flight.step()
            batches.append((batch.tokens, batch.decode_sequences))
        return batches

    assert "KVPILOT_TELEMETRY" not in os.environ
    assert flown(disabled=True) == flown(disabled=False)


def test_what_the_prefix_cache_has_of_a_tenants_prompts_is_told_by_tenant() -> None:
    """By tenant, together what the step record counts of those with a name; without a cache there is no such
    table.
    """
    flight = Flight(cached=True)
    for number in range(1, 4):
        flight.arrive(7, prompt=2 * BLOCK + 1, output=1, tenant="acme")
        flight.arrive(50 + number, prompt=6, output=1, tenant="globex")
        while flight.core.requests:
            flight.step()
    flight.idle()
    counts = flight.reader.tenant_counts()
    names = ("prefix_tokens_queried_total", "prefix_tokens_hit_total")
    assert {tenant: tuple(row[name] for name in names) for tenant, row in counts.items()} == {
        "acme": (3 * (2 * BLOCK + 1), 2 * 2 * BLOCK),
        "globex": (18, 0),
    }
    record = flight.reader.poll()[-1]
    assert [sum(row[name] for row in counts.values()) for name in names] == [record[name] for name in names]
    assert Flight().reader.tenant_counts() == {}


def test_counts_of_tenants_are_bounded() -> None:
    """Whoever can name tenants cannot make the engine remember them all."""
    flight = Flight(cached=True)
    for number in range(3 * MAX_TENANTS):
        flight.arrive(number, prompt=2, output=1, tenant=f"t{number}")
        while flight.core.requests:
            flight.step()
    flight.idle()
    assert len(flight.scheduler.tables.prefix_by_tenant) <= MAX_TENANTS


def test_a_lease_evicts_of_those_who_opted_in_and_the_record_counts_it() -> None:
    """40 tokens in blocks of 4: at half, five blocks go of the one that opted in, and none comes back."""
    flight = Flight()
    flight.arrive(1, prompt=39, output=20)
    eviction = Eviction("window", sink=4)
    flight.core.accept(Request(2, [2] * 39, SamplingParams(20), eviction=eviction))
    flight.lease(1)
    flight.step()
    flight.step()
    flight.lease(2, kv_kept_ratio=0.5)
    flight.step()
    plain, asked = sorted(flight.scheduler.running, key=lambda one: one.id)
    *_, record = flight.reader.poll()
    assert (asked.evicted, plain.evicted) == (20, 0)
    assert (len(asked.blocks), len(plain.blocks)) == (6, 11)
    assert record["evicted_tokens_total"] == 20
    assert record["tail_waste_tokens"] == (6 + 11) * BLOCK - asked.stored - plain.computed
    assert record["knob.kv_kept_ratio"] == 0.5
    flight.lease(3)
    flight.step()
    flight.scheduler.check()
    assert asked.evicted == 20
    knob = next(knob for knob in flight.manifest.knobs if knob.name == "kv_kept_ratio")
    assert (knob.minimum, knob.maximum, knob.baseline) == (0.05, 1.0, 1.0)


def test_each_request_that_ends_is_told_once_with_lengths_and_times_and_no_text() -> None:
    flight = Flight(cached=True)
    flight.arrive(1, prompt=9, output=2, klass=0, tenant="acme")
    flight.arrive(2, prompt=9, output=50)
    flight.step()
    flight.step()
    flight.core.cancel(2)
    flight.arrive(3, prompt=6, output=4)
    flight.error = DeviceOutOfMemory("full")
    flight.step()
    done, gone, failed = flight.reader.requests()
    assert (done.tenant, done.prompt_tokens, done.output_tokens, done.fate) == ("acme", 9, 2, "finished")
    assert done.ended_ns - done.first_ns == done.first_ns - done.received_ns == STEP_NS
    assert len(done.prefix) == 2
    assert (gone.fate, gone.prompt_tokens, gone.output_tokens > 0) == ("cancelled", 9, True)
    assert (failed.fate, failed.first_ns, failed.output_tokens) == ("failed", 0, 0)
    assert flight.reader.requests() == []
