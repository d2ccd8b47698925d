"""What each engine is known to give and take, before any is running: the capability table.

People choose by it; what an engine in front of us really has, its manifest says (`capabilities`). `run` means
that a test moved or read it in a real engine of the version named; `read` that its source was understood, no
more. What is said of versions before the one that was run was only read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from kvpilot.knobs import KNOBS
from kvpilot.link.fields import KV_BITS
from kvpilot.signals import SIGNALS

Shown = Literal["run", "read"]

TENANTS = "tenants"
"""Not a signal by itself: whether memory, queue and tokens can be told apart by tenant."""


@dataclass(frozen=True, slots=True)
class Capability:
    """One knob or signal in one kind of engine. `how`: what moves or fills it, or why nothing does."""

    supported: bool
    how: str
    shown: Shown = "run"
    since: str = ""
    """First version that has it; empty where all that were looked at do."""
    needs: str = ""
    """What must be configured for it; without, the manifest says unsupported."""


@dataclass(frozen=True, slots=True)
class KnownEngine:
    """One kind. `knobs` and `signals` have every name of the catalogues that is an engine's or a valve's."""

    kind: str
    run: str
    """Versions that were run, and how."""
    read: str
    """Versions whose source was read only."""
    knobs: Mapping[str, Capability]
    signals: Mapping[str, Capability]
    notes: tuple[str, ...] = field(default=())


_VALVE_SIGNALS = tuple(name for name, signal in SIGNALS.items() if signal.provider == "valve")
_ENGINE_SIGNALS = tuple(name for name, signal in SIGNALS.items() if signal.provider == "engine")
_VALVE_KNOBS = tuple(name for name, knob in KNOBS.items() if knob.where == "valve")


def _all(names: Iterable[str], how: str, **more: str) -> dict[str, Capability]:
    return {name: Capability(True, how, **more) for name in names}  # type: ignore[arg-type]


_STEP = "the step hook's record"
_CACHE_SIGNALS = ("prefix_hit_ratio", "prefix_mismatches", "kv_pinned_blocks")
_KVENGINE = KnownEngine(
    kind="kvengine",
    run="this release, CPU",
    read="",
    knobs={
        "step_token_budget": Capability(True, "per step"),
        "prefill_chunk_tokens": Capability(True, "per step, over all requests"),
        "speculative_tokens": Capability(True, "per sequence and step", needs="a draft model"),
        "max_running": Capability(True, "gates admission, drains"),
        "admission_watermark": Capability(True, "at admission"),
        "kv_element_bits": Capability(True, "sequences admitted from then on: 32, 16, 8 or 4 bits"),
        "kv_kept_ratio": Capability(True, "requests and tenants that opted in", needs="an opt-in"),
        **_all(_VALVE_KNOBS, "the valve in front of its server"),
    },
    signals={
        **_all(_ENGINE_SIGNALS, _STEP),
        **{name: Capability(True, _STEP, needs="the prefix cache") for name in _CACHE_SIGNALS},
        **{
            f"kv_{bits}bit_bytes": Capability(True, _STEP, needs="a pool of so many bits or more")
            for bits in KV_BITS
        },
        "device_fragmentation_ratio": Capability(True, _STEP, shown="read", needs="--device cuda"),
        **_all(_VALVE_SIGNALS, "the valve's page"),
        TENANTS: Capability(True, "the valve's tag on each request"),
    },
)

_WORKERS = "the device's memory belongs to vLLM's worker processes"
_ONE_DTYPE = "one --kv-cache-dtype for the engine's life"
_VLLM = KnownEngine(
    kind="vllm",
    run="0.32.0, CPU, eager",
    read="0.14.0, 0.17.0, 0.20.0, 0.24.0, 0.28.0",
    knobs={
        "step_token_budget": Capability(
            True, "scheduler.max_num_scheduled_tokens, per step", needs="chunked prefill"
        ),
        "prefill_chunk_tokens": Capability(
            True,
            "scheduler.max_num_scheduled_tokens and scheduler_config.long_prefill_token_threshold; per step,"
            " over all requests",
            needs="chunked prefill",
        ),
        "speculative_tokens": Capability(
            True,
            "scheduler.dynamic_sd_lookup; drafts already attached are trimmed",
            since="0.24.0",
            needs="a drafter, one data-parallel rank",
        ),
        "max_running": Capability(
            True,
            "scheduler.max_num_active_reqs gates admission, never preempts; before 0.32.0 a cap under what"
            " runs would lift the limit or kill the engine, so it is not moved there",
            since="0.32.0",
        ),
        "admission_watermark": Capability(
            True, "kv_cache_manager.watermark_blocks, while requests run", shown="run", since="0.32.0"
        ),
        "kv_element_bits": Capability(False, _ONE_DTYPE, shown="read"),
        "kv_kept_ratio": Capability(False, "it evicts nothing of a sequence that runs", shown="read"),
        **_all(_VALVE_KNOBS, "the valve, by --middleware kvpilot.inside.valve.Valve", needs="--middleware"),
    },
    signals={
        **_all(_ENGINE_SIGNALS, _STEP),
        **_all(_VALVE_SIGNALS, "the valve's page", needs="--middleware"),
        "kv_limited_steps": Capability(True, _STEP, since="0.32.0"),
        "prefix_mismatches": Capability(False, "it trusts its hashes: no token ids", shown="read"),
        "evicted_tokens": Capability(False, "it evicts nothing of a sequence that runs", shown="read"),
        "oom": Capability(False, _WORKERS),
        "device_free_bytes": Capability(False, _WORKERS),
        "device_headroom_tokens": Capability(False, _WORKERS),
        "device_fragmentation_ratio": Capability(False, _WORKERS),
        "kv_pinned_blocks": Capability(False, "it pins nothing", shown="read"),
        **{f"kv_{bits}bit_bytes": Capability(False, _ONE_DTYPE, shown="read") for bits in KV_BITS},
        TENANTS: Capability(True, "the valve's tag in a request's trace_headers", needs="--middleware"),
    },
    notes=(
        "No CLI flag but --middleware, no fork: the plugin hooks whatever scheduler class runs.",
        "A version that was not looked at gets what the probe understands of it, and no knob by guess.",
        "GPUs, CUDA graphs, tensor and pipeline parallelism were read, not run.",
    ),
)

KNOWN: dict[str, KnownEngine] = {engine.kind: engine for engine in (_KVENGINE, _VLLM)}
