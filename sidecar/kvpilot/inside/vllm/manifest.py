"""The manifest of one vLLM engine core: what it is, which knobs the probe found, which signals it fills."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from kvpilot.inside.vllm.probe import Probe
from kvpilot.link.fields import STEP_FIELDS
from kvpilot.link.manifest import Manifest


def build_manifest(
    scheduler: Any,
    probe: Probe,
    fields: Iterable[str],
    unsupported_signals: Mapping[str, str],
    classes: tuple[str, ...],
    block_size: int,
) -> Manifest:
    """The manifest of the engine core that `scheduler` drives. Sizes are bytes, lengths tokens."""
    config = scheduler.vllm_config
    parallel = config.parallel_config
    # A rank of a model without experts is told that it is alone; its index among them stays.
    rank = getattr(parallel, "data_parallel_index", None)
    return Manifest(
        engine="vllm",
        engine_version=_version(),
        model=_model_name(config.model_config),
        block_size=block_size,
        # One block is never handed out: it stands for "no block".
        blocks=int(scheduler.kv_cache_manager.block_pool.num_gpu_blocks) - 1,
        bytes_per_block=_bytes_per_block(scheduler.kv_cache_config),
        max_model_len=int(scheduler.max_model_len),
        device=str(getattr(config.device_config, "device_type", "unknown")),
        knobs=tuple(probe.knobs),
        fields=tuple(STEP_FIELDS[name] for name in fields),
        classes=classes,
        rank=int(parallel.data_parallel_rank if rank is None else rank),
        world={
            "dp": int(parallel.data_parallel_size),
            "tp": int(parallel.tensor_parallel_size),
            "pp": int(parallel.pipeline_parallel_size),
        },
        unsupported_knobs=dict(probe.unsupported),
        unsupported_signals=dict(unsupported_signals),
    )


def _model_name(model: Any) -> str:
    """As clients name it."""
    served = getattr(model, "served_model_name", None) or model.model
    return str(served[0] if isinstance(served, list) else served)


def _bytes_per_block(cache: Any) -> int:
    """KV bytes of one block in all layers; 0 where this version does not say."""
    with suppress(AttributeError, TypeError, ZeroDivisionError):
        return sum(int(tensor.size) for tensor in cache.kv_cache_tensors) // int(cache.num_blocks)
    return 0


def _version() -> str:
    with suppress(Exception):
        import vllm

        return str(vllm.__version__)
    return "unknown"
