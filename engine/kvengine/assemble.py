"""From a configuration to a core that is ready to step: models, memory plan, executor, scheduler, telemetry.

Everything that can be wrong with a model directory or a memory size is found here, before the engine says
that it is ready. Imports torch; runs in the core process only.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvengine.channel import Channel
from kvengine.config import EngineConfig
from kvengine.core import Core
from kvengine.errors import StartError
from kvengine.executor.cuda_memory import CudaMemory
from kvengine.executor.torch import EagerExecutor
from kvengine.kv.eviction.policy import Offer
from kvengine.kv.plan import Plan, plan
from kvengine.kv.pool import BlockPool
from kvengine.kv.tree import PrefixTree
from kvengine.loop import EngineLoop
from kvengine.manifest import build_manifest
from kvengine.memory import DeviceMemory
from kvengine.model import weights
from kvengine.model.config import ModelConfig
from kvengine.model.footprint import Footprint
from kvengine.model.llama import Llama
from kvengine.model.tokenizer import Tokenizer
from kvengine.sched.admission import Limits
from kvengine.sched.scheduler import Scheduler
from kvengine.telemetry import Telemetry, provided_fields
from kvpilot.clock import Clock
from kvpilot.inside.hook import StepHook
from kvpilot.inside.lengths import LengthPredictor


@dataclass(frozen=True, slots=True)
class Engine:
    """A loop that can run, and what to tell people about it."""

    loop: EngineLoop
    facts: dict[str, Any]


def assemble(config: EngineConfig, channel: Channel, clock: Clock) -> Engine:
    """Load, plan, connect. Raises EngineError with one line."""
    torch.set_num_threads(config.threads)
    target = ModelConfig.load(config.model)
    _check_window(config, target)
    draft = _draft_config(config, target)
    max_model_len = min(config.max_model_len or target.max_positions, target.max_positions)
    footprint = Footprint(
        target, draft, config.block_size, max_model_len, config.precisions, config.heavy_hitters
    )
    drafts = config.speculative_tokens if config.speculates else 0
    memory_plan = plan(
        memory_bytes=config.memory_bytes,
        resident_bytes=footprint.resident_bytes,
        kv_bytes_per_token=footprint.kv_bytes_per_token + footprint.score_bytes_per_token,
        block_size=config.block_size,
        worst_step_bytes=footprint.worst_step_bytes(config.step_token_budget, config.max_running, drafts),
        kv_fraction=config.kv_fraction,
    )
    device = _device(config.device)
    memory = _memory(config, device)
    executor = EagerExecutor(
        Llama(target, weights.load(config.model, target, device), max_model_len),
        Llama(draft, weights.load(config.draft, draft, device), max_model_len)
        if draft and config.draft
        else None,
        memory,
        memory_plan.blocks,
        config.block_size,
        device,
        ngrams=config.drafter == "ngram",
        precisions=config.precisions,
        heavy_hitters=config.heavy_hitters,
    )
    scheduler, limits, lengths = _scheduler(config, memory_plan, max_model_len)
    scheduler.sliding_window = target.sliding_window
    core = Core(
        scheduler,
        executor,
        limits,
        Tokenizer.load(config.model).eos_ids,
        lengths,
        clock,
        _offer(config, target),
    )
    manifest = build_manifest(
        config,
        memory_plan,
        fields=provided_fields(core, executor, lengths),
        max_model_len=max_model_len,
        activation_bytes_per_token=footprint.step.token_bytes,
        device=config.device,
        device_uuids=_device_uuids(config.device),
    )
    telemetry = Telemetry(core, executor, lengths, StepHook.open(manifest, clock=clock))
    external = (config.external, memory) if config.external else None
    loop = EngineLoop(core, telemetry, channel, clock, external, config.evict_tenants)
    return Engine(loop, _facts(memory_plan, limits, target))


def _device_uuids(device: str) -> tuple[str, ...]:
    """As torch writes them; empty without a CUDA device."""
    if not device.startswith("cuda"):
        return ()
    return (str(torch.cuda.get_device_properties(device).uuid),)


def _scheduler(
    config: EngineConfig, memory_plan: Plan, max_model_len: int
) -> tuple[Scheduler, Limits, LengthPredictor]:
    pool, pinned = BlockPool(memory_plan.blocks), int(memory_plan.blocks * config.pinned_share)
    tree = None
    if config.prefix_cache:
        tree = PrefixTree(pool, config.block_size, config.name, max_pinned_blocks=pinned)
    # What may be pinned is no request's: one that needs it would wait for ever.
    limits = Limits(max_model_len, memory_plan.kv_tokens - pinned * config.block_size)
    lengths = LengthPredictor(limits.tokens)
    ahead = lengths if config.admission == "predicted" else None
    scheduler = Scheduler(pool, config.block_size, len(config.classes), tree, config.precisions, ahead)
    if scheduler.peak is not None:
        scheduler.peak.floor = config.admission_watermark
    return scheduler, limits, lengths


def _offer(config: EngineConfig, target: ModelConfig) -> Offer:
    own = config.precisions.own
    return Offer(config.block_size, config.heavy_hitters, own.name, not own.scaled, target.sliding_window)


def _check_window(config: EngineConfig, target: ModelConfig) -> None:
    window = target.sliding_window
    if window is None:
        return
    if window < config.block_size:
        raise StartError(
            f"{config.model}: sliding_window is {window} tokens and a block holds {config.block_size}; "
            f"use --block-size {1 << (window.bit_length() - 1)} or less"
        )
    if config.draft is not None and config.speculative_tokens:
        raise StartError(
            f"{config.model}: sliding_window={window}, and a draft model needs the KV that it gives up; "
            "use --draft ngram or --draft none"
        )


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise StartError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device(name)


def _memory(config: EngineConfig, device: torch.device) -> DeviceMemory | CudaMemory:
    """The account that bounds the engine: our own on a CPU, the device's on CUDA."""
    if device.type == "cpu":
        return DeviceMemory(config.memory_bytes)
    if config.external is not None:
        raise StartError("--external-memory is for --device cpu; on CUDA start another process instead")
    return CudaMemory(config.memory_bytes, device)


def _draft_config(config: EngineConfig, target: ModelConfig) -> ModelConfig | None:
    if config.draft is None or config.speculative_tokens == 0:
        return None
    draft = ModelConfig.load(config.draft)
    if draft.vocab_size != target.vocab_size:
        raise StartError(
            f"{config.draft}: a draft of {draft.vocab_size} tokens for a target of {target.vocab_size}; "
            "both need the same vocabulary, or use --draft none"
        )
    return draft


def _facts(memory_plan: Plan, limits: Limits, target: ModelConfig) -> dict[str, Any]:
    """What the API process needs to know, and prints."""
    return {
        "plan": asdict(memory_plan),
        "limits": asdict(limits),
        "vocabulary": target.vocab_size,
    }
