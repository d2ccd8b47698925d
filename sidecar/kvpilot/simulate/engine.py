"""The reference engine in virtual time: its own loop, core, scheduler, pool, tables, telemetry and hook, over
a plant.

Only the forward pass, the socket and the files are replaced: `kvengine.executor.virtual` takes as long as the
plant says, `wire` hands messages over as values, pages are bytes in memory. `kvengine` is imported by whoever
builds one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from kvpilot.clock import NS, VirtualClock
from kvpilot.inside.hook import StepHook, with_hook_fields
from kvpilot.inside.lengths import LengthPredictor
from kvpilot.link.telemetry import TelemetryWriter, plan_page
from kvpilot.simulate.conservation import Conservation
from kvpilot.simulate.deployment import Deployment
from kvpilot.simulate.faults import Fault, Now, usable_share
from kvpilot.simulate.pages import IDENTITY, MemoryPage
from kvpilot.simulate.plants.acceptance import Acceptance, accepted
from kvpilot.simulate.plants.plant import Plant

if TYPE_CHECKING:
    from kvengine.core import Core
    from kvengine.executor.virtual import StepMemory, VirtualExecutor
    from kvengine.loop import EngineLoop
    from kvengine.memory import MemoryReading
    from kvengine.request import Request
    from kvengine.sched.batch import Batch

RING_RECORDS = 64
"""More than a pilot reads at one look."""
REQUEST_RECORDS = 1_024
"""More than end in a tick."""

Domain = Callable[[int], str]
"""What a request, by its id, is about."""


class Headroom:
    """Device memory of which steps take what the plant says, and give it back. Where the plant says nothing,
    every step fits.
    """

    def __init__(
        self,
        plant: Plant,
        headroom_bytes: int,
        used_bytes: int,
        faults: Sequence[Fault] = (),
        now_s: Now = lambda: 0.0,
    ) -> None:
        from kvengine.memory import MemoryReading

        self._plant = plant
        self._faults = faults
        self._now_s = now_s
        self._headroom_bytes = headroom_bytes
        self._reading = MemoryReading(free=headroom_bytes, reserved=used_bytes, allocated=used_bytes)

    def reading(self) -> "MemoryReading":
        if not self._faults:
            return self._reading
        left = usable_share(self._faults, self._now_s(), ("neighbour_memory",))
        return replace(self._reading, free=round(left * self._reading.free))

    def lacking_bytes(self, batch: "Batch") -> int:
        usable = self._headroom_bytes
        if self._faults:
            usable = int(usable * usable_share(self._faults, self._now_s()))
        return (self._plant.activation_bytes(batch) or 0) - usable


@dataclass(frozen=True, slots=True)
class VirtualEngine:
    """One start of the engine."""

    loop: "EngineLoop"
    core: "Core"
    executor: "VirtualExecutor"
    page: MemoryPage
    conservation: Conservation


def build_engine(
    deployment: Deployment,
    plant: Plant,
    wire: Any,
    spend: Callable[[float], None],
    clock: VirtualClock,
    controls: bytearray,
    acceptance: Acceptance,
    domain: Domain,
    piloted: bool = True,
    faults: Sequence[Fault] = (),
    requests: bool = False,
) -> VirtualEngine:
    """Put it together. Without a pilot nobody reads telemetry, and none is written; `requests`: whether it
    tells of each one that ends, as recordings need it.
    """
    from kvengine.core import Core
    from kvengine.executor.virtual import VirtualExecutor
    from kvengine.kv.pool import BlockPool
    from kvengine.kv.tree import PrefixTree
    from kvengine.loop import EngineLoop
    from kvengine.sched.admission import Limits
    from kvengine.sched.scheduler import Scheduler
    from kvengine.telemetry import Telemetry

    pool = BlockPool(deployment.blocks)
    tree = None
    if deployment.prefix_cache:
        tree = PrefixTree(pool, deployment.block_size, deployment.name, salt=b"virtual")
    limits = Limits(deployment.max_model_len, deployment.pool_tokens)
    lengths = LengthPredictor(limits.tokens)
    ahead = lengths if deployment.admission == "predicted" else None
    scheduler = Scheduler(pool, deployment.block_size, len(deployment.classes), tree, lengths=ahead)
    if scheduler.peak is not None:
        scheduler.peak.floor = deployment.admission_watermark
    started_ns = clock.monotonic_ns()

    def now_s() -> float:
        return (clock.monotonic_ns() - started_ns) / NS

    def accepts(request: "Request", drafts: int) -> int:
        at_s = (clock.monotonic_ns() - started_ns) / NS
        position = len(request.tokens) - len(request.prompt)
        return accepted(acceptance, domain(request.id), request.sampling.seed, position, drafts, at_s)

    def step_seconds(batch: "Batch") -> float:
        conservation.of_batch(batch)
        return plant.step_seconds(batch)

    executor: Any = VirtualExecutor(step_seconds, spend, accepts, _memory(deployment, plant, faults, now_s))
    core = Core(scheduler, executor, limits, frozenset(), lengths, clock)
    conservation = Conservation(core, deployment)
    hook, page = _hook(deployment, core, executor, lengths, controls, piloted, requests)
    loop = EngineLoop(core, Telemetry(core, executor, lengths, hook), wire, clock)
    return VirtualEngine(loop, core, executor, page, conservation)


def _memory(deployment: Deployment, plant: Plant, faults: Sequence[Fault], now_s: Now) -> "StepMemory | None":
    if deployment.headroom_bytes is None:
        return None
    used_bytes = deployment.memory_bytes - deployment.headroom_bytes
    return cast("StepMemory", Headroom(plant, deployment.headroom_bytes, used_bytes, faults, now_s))


def _hook(
    deployment: Deployment,
    core: "Core",
    executor: Any,
    lengths: LengthPredictor,
    controls: bytearray,
    piloted: bool,
    requests: bool,
) -> tuple[StepHook, MemoryPage]:
    from kvengine.config import EngineConfig
    from kvengine.kv.plan import Plan
    from kvengine.manifest import build_manifest
    from kvengine.telemetry import provided_fields

    speculates = deployment.speculative_tokens > 0
    config = EngineConfig(
        draft=None,
        drafter="ngram" if speculates else "model",
        name=deployment.name,
        block_size=deployment.block_size,
        step_token_budget=deployment.step_token_budget,
        prefill_chunk_tokens=deployment.prefill_chunk_tokens,
        max_running=deployment.max_running,
        speculative_tokens=deployment.speculative_tokens,
        admission_watermark=deployment.admission_watermark,
        admission=deployment.admission,
        classes=deployment.classes,
        prefix_cache=deployment.prefix_cache,
    )
    resident_bytes = deployment.memory_bytes - deployment.blocks * deployment.block_bytes
    plan = Plan(
        deployment.memory_bytes,
        max(0, resident_bytes - (deployment.headroom_bytes or 0)),
        deployment.block_size,
        deployment.block_bytes,
        deployment.blocks,
        0,
    )
    described = build_manifest(
        config,
        plan,
        fields=provided_fields(core, executor, lengths),
        max_model_len=deployment.max_model_len,
        activation_bytes_per_token=deployment.activation_bytes_per_token,
        device="virtual",
        request_records=REQUEST_RECORDS if requests else 0,
    )
    if not piloted:
        return StepHook(described), MemoryPage(bytearray(0), "telemetry", alive=False)
    whole = with_hook_fields(described)
    page = MemoryPage(bytearray(plan_page(whole, RING_RECORDS).page_bytes), "telemetry")
    writer = TelemetryWriter(page.buffer, whole, nonce=1, identity=IDENTITY, record_count=RING_RECORDS)
    view = memoryview(controls)
    return StepHook(described, writer, lambda now_ns: view), page
