"""What this scheduler lets us move, and how: found by looking at it, knob by knob.

Each knob gets a port or one sentence about why it has none. A number that the scheduler reads in a way that
is not understood is left alone: wrong by a guess would kill the engine.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvpilot.inside.vllm.drafts import DraftPort
from kvpilot.inside.vllm.port import Port
from kvpilot.inside.vllm.source import Methods, module_mentions
from kvpilot.inside.vllm.step_tokens import BudgetPort, ChunkPort, StepTokens
from kvpilot.knobs import KNOBS
from kvpilot.link.manifest import ManifestKnob

AT_STEP = "at the next step boundary"

_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
_COUNT = "num_spec_tokens_to_schedule"
_METHODS = ("ngram", "draft_model", "eagle", "eagle3", "mtp", "medusa", "suffix")
"""Drafting methods whose proposer was read to honour the number of drafts that it is given."""


class Unsupported(Exception):
    """The knob cannot be moved here; the message says why, for an operator."""


@dataclass
class Probe:
    """What was found."""

    knobs: list[ManifestKnob] = field(default_factory=list)
    ports: list[Port] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)


def probe_knobs(scheduler: Any) -> Probe:
    """Look at every engine knob of the catalogue. Never raises: what is not understood is unsupported."""
    found = Probe()
    seen = _Scheduler(scheduler)
    for name, knob in KNOBS.items():
        if knob.where != "engine":
            continue
        try:
            looked = _KNOBS.get(name, _not_known)(seen)
            found.ports.append(looked.port)
            found.knobs.append(looked.knob)
        except Unsupported as reason:
            found.unsupported[name] = str(reason)
        except Exception as error:
            found.unsupported[name] = f"this scheduler was not understood ({type(error).__name__})"
    return found


class _Found:
    """A port and its row in the manifest."""

    def __init__(
        self, port: Port, minimum: float, maximum: float, applied: str, granularity: float = 1
    ) -> None:
        self.port = port
        if minimum > maximum:
            raise Unsupported(f"nothing to move: it is {port.baseline:g} and at least {minimum:g}")
        unit = KNOBS[port.name].unit
        self.knob = ManifestKnob(
            port.name, unit, minimum, maximum, port.baseline, granularity, f"{applied}, {AT_STEP}"
        )


class _Scheduler:
    """The scheduler under the probe, with what several knobs ask of it."""

    def __init__(self, scheduler: Any) -> None:
        self.it = scheduler
        self.config = scheduler.vllm_config
        self.schedule = Methods(scheduler, "schedule")
        self.drafts = int(getattr(scheduler, "num_spec_tokens", 0))
        self._tokens: StepTokens | None = None

    @property
    def tokens(self) -> StepTokens:
        """What two knobs share. Raises AttributeError where this version has no such budget."""
        if self._tokens is None:
            self._tokens = StepTokens(self.it)
        return self._tokens

    def need(self, condition: object, why: str) -> None:
        if not condition:
            raise Unsupported(why)

    def need_source(self) -> None:
        self.need(self.schedule.known, "the source of schedule() cannot be read")

    def smallest_chunk(self) -> int:
        """Tokens a request must be able to get in one step, or it could wait for ever."""
        self.need(
            self.it.scheduler_config.enable_chunked_prefill, "chunked prefill is off: a prompt runs whole"
        )
        mixed = getattr(self.config.model_config, "supports_multimodal_inputs", False)
        self.need(
            not (mixed and self.it.scheduler_config.disable_chunked_mm_input),
            "a multimodal input runs whole here (disable_chunked_mm_input)",
        )
        # A resumed request is padded to a whole draft round, which must not be cut; a drafter that reads
        # ahead needs its run-up.
        least = max(1 + self.drafts, int(getattr(self.it, "num_prefill_lookahead", 0)))
        if getattr(self.it, "need_mamba_block_aligned_split", False):
            least = max(least, int(self.it.cache_config.block_size))
        return least


def _step_token_budget(seen: _Scheduler) -> _Found:
    seen.need_source()
    uses = seen.schedule.uses("self.max_num_scheduled_tokens")
    seen.need(uses.reads and not uses.writes, "schedule() does not read max_num_scheduled_tokens")
    port = BudgetPort(seen.tokens)
    baseline = int(port.baseline)
    applied = "scheduler.max_num_scheduled_tokens; running requests are served in order until it is used up"
    return _Found(port, min(seen.smallest_chunk(), baseline), baseline, applied)


def _prefill_chunk(seen: _Scheduler) -> _Found:
    seen.need_source()
    config = seen.it.scheduler_config
    uses = seen.schedule.uses("self.scheduler_config.long_prefill_token_threshold")
    seen.need(uses.reads and not uses.writes, "schedule() does not read long_prefill_token_threshold")
    own = int(config.long_prefill_token_threshold)
    # 0 is vLLM's word for no limit of its own: then the step's budget is the limit.
    baseline = own if own > 0 else int(seen.it.max_num_scheduled_tokens)
    places: list[tuple[Any, str, Callable[[float], object]]] = [(config, "long_prefill_token_threshold", int)]
    adaptive = seen.schedule.uses("self.adaptive_long_prefill_threshold")
    if adaptive.reads:
        seen.need(not adaptive.writes, "schedule() writes adaptive_long_prefill_threshold")
        # It would raise our value to a fair share of the budget; it returns with baseline.
        places.append((seen.it, "adaptive_long_prefill_threshold", lambda _value: False))
    uses = seen.schedule.uses("self.max_num_scheduled_tokens")
    seen.need(uses.reads and not uses.writes, "schedule() does not read max_num_scheduled_tokens")
    port = ChunkPort(baseline, seen.tokens, *places)
    applied = (
        "per step, over all requests, beside what decoding takes: scheduler.max_num_scheduled_tokens and"
        " scheduler_config.long_prefill_token_threshold"
    )
    return _Found(port, min(seen.smallest_chunk(), baseline), baseline, applied)


def _max_running(seen: _Scheduler) -> _Found:
    seen.need_source()
    if hasattr(seen.it, "max_num_active_reqs"):
        uses = seen.schedule.uses("self.max_num_active_reqs")
        tested = uses.compared and set(uses.compared) == {"GtE"} and uses.reads == len(uses.compared)
        seen.need(
            tested and not uses.writes and not uses.asserted,
            "max_num_active_reqs is not used as an admission test alone",
        )
        baseline = int(seen.it.max_num_active_reqs)
        return _Found(
            RunningCap(seen.it, baseline),
            1,
            baseline,
            "gates admission, never preempts: scheduler.max_num_active_reqs; paused streaming sessions come"
            " on top",
        )
    uses = seen.schedule.uses("self.max_num_running_reqs")
    if "Eq" in uses.compared:
        raise Unsupported("admission tests for equality: a cap under what runs would lift it altogether")
    if uses.asserted:
        raise Unsupported("schedule() asserts that no more run: a cap under what runs would kill the engine")
    raise Unsupported("schedule() has no running cap of its own")


class RunningCap(Port):
    """The running cap. Paused streaming sessions take slots too, and may pause for ever: were they counted, a
    low cap could hold everybody else's requests back with nothing running.
    """

    def __init__(self, scheduler: Any, baseline: int) -> None:
        super().__init__("max_running", baseline, (scheduler, "max_num_active_reqs", self._cap))
        self._scheduler = scheduler

    def _cap(self, value: float) -> int:
        paused = getattr(self._scheduler, "num_waiting_for_streaming_input", 0)
        return min(int(value) + paused, int(self.baseline))

    def each_step(self) -> None:
        if getattr(self._scheduler, "num_waiting_for_streaming_input", 0) or self._adjusted:
            cap = self._cap(self.value)
            self._adjusted = cap != int(self.value)
            self._scheduler.max_num_active_reqs = cap

    _adjusted = False


def _speculative_tokens(seen: _Scheduler) -> _Found:
    speculation = seen.config.speculative_config
    seen.need(speculation is not None and seen.drafts > 0, "speculation is off: start it with a drafter")
    seen.need_source()
    uses = seen.schedule.uses("self.dynamic_sd_lookup")
    seen.need(uses.reads and not uses.writes, "schedule() has no table of drafts by batch size")
    seen.need(
        seen.schedule.names(_COUNT) and any(module_mentions(runner, _COUNT) for runner in _RUNNERS),
        "the model runner does not take a number of drafts from the scheduler",
    )
    prepared = getattr(speculation, "num_speculative_tokens_per_batch_size", None) is not None
    way = 'start vLLM with "num_speculative_tokens_per_batch_size" in --speculative-config'
    seen.need(
        seen.config.parallel_config.data_parallel_size <= 1,
        "ranks that step together must draft together (vLLM itself refuses it with data parallelism)",
    )
    method = str(speculation.method)
    seen.need(prepared or method in _METHODS, f"drafting by {method} was not checked: {way}")
    parallel = getattr(speculation, "parallel_drafting", False)
    seen.need(prepared or not parallel, f"the drafter works in parallel: {way}")
    graphs = seen.config.compilation_config.cudagraph_mode
    full = graphs is not None and graphs.has_full_cudagraphs()
    seen.need(prepared or not full, f"full CUDA graphs are recorded for one number of drafts: {way}")
    batch = max(int(seen.it.max_num_running_reqs), int(seen.it.scheduler_config.max_num_seqs))
    port = DraftPort(seen.it, seen.drafts, batch)
    return _Found(port, 0, seen.drafts, "scheduler.dynamic_sd_lookup; drafts already attached are trimmed")


def _admission_watermark(seen: _Scheduler) -> _Found:
    manager = seen.it.kv_cache_manager
    allocate = Methods(manager, "allocate_slots")
    seen.need(allocate.known, "the source of allocate_slots() cannot be read")
    uses = allocate.uses("self.watermark_blocks")
    seen.need(uses.reads and not uses.writes, "this version keeps no free blocks back at admission")
    # Without it a request larger than the share would never be admitted, not even into an empty pool.
    seen.need(allocate.names("has_scheduled_reqs"), "the watermark would hold even with nothing running")
    blocks = int(manager.kv_cache_config.num_blocks)
    baseline = 1.0 - int(manager.watermark_blocks) / blocks

    def kept_free(share: float) -> int:
        return int((1.0 - share) * blocks)

    port = Port("admission_watermark", baseline, (manager, "watermark_blocks", kept_free))
    applied = "with requests running, the pool after an admission: kv_cache_manager.watermark_blocks"
    return _Found(port, min(0.05, baseline), baseline, applied, granularity=0.01)


def _kv_element_bits(_seen: _Scheduler) -> _Found:
    raise Unsupported("vLLM has one --kv-cache-dtype for the engine's life")


def _kv_kept_ratio(_seen: _Scheduler) -> _Found:
    raise Unsupported("vLLM keeps every token of a running request")


def _not_known(_seen: _Scheduler) -> _Found:
    raise Unsupported("kvpilot does not know how to move it in vLLM")


_KNOBS: dict[str, Callable[[_Scheduler], _Found]] = {
    "step_token_budget": _step_token_budget,
    "prefill_chunk_tokens": _prefill_chunk,
    "max_running": _max_running,
    "speculative_tokens": _speculative_tokens,
    "admission_watermark": _admission_watermark,
    "kv_element_bits": _kv_element_bits,
    "kv_kept_ratio": _kv_kept_ratio,
}
