"""The manifest of this engine: what it is, which knobs it has and how far they go, which fields it fills.

Every knob's maximum is what the operator configured: memory was planned for that, so a lease can only ask for
less (the watermark, a share, goes up to the whole pool). `shed_fraction` is applied by the valve in front.
"""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from kvengine.config import EngineConfig
from kvengine.kv.plan import Plan
from kvpilot.knobs import KNOBS
from kvpilot.link.fields import KV_BITS, STEP_FIELDS
from kvpilot.link.manifest import Manifest, ManifestKnob
from kvpilot.link.requests import REQUEST_COLUMNS, REQUEST_RECORDS

AT_STEP = "at the next step boundary"

PREFIX_FIELDS = (
    "prefix_tokens_queried_total",
    "prefix_tokens_hit_total",
    "prefix_mismatches_total",
    "kv_blocks_pinned",
)
TENANT_COLUMNS = ("prefix_tokens_queried_total", "prefix_tokens_hit_total")
"""What `Telemetry` counts by tenant, in its order."""
PREFIX_SIGNALS = (*PREFIX_FIELDS, "prefix_hit_ratio", "prefix_mismatches", "kv_pinned_blocks")


def build_manifest(
    config: EngineConfig,
    plan: Plan,
    *,
    fields: Iterable[str],
    max_model_len: int,
    activation_bytes_per_token: int,
    device: str,
    device_uuids: tuple[str, ...] = (),
    request_records: int = REQUEST_RECORDS,
) -> Manifest:
    """The manifest of an engine that runs `config` in the memory of `plan`."""
    widest, *narrower = config.precisions.offered
    narrowest = narrower[-1] if narrower else widest
    stored = [f"{one.bits} ({one.name})" for one in config.precisions.offered]
    knobs = (
        _knob("step_token_budget", 1, config.step_token_budget, config.step_token_budget, AT_STEP),
        _knob(
            "prefill_chunk_tokens",
            1,
            config.step_token_budget,
            config.prefill_chunk_tokens,
            f"per step, over all requests, {AT_STEP}",
        ),
        _knob("speculative_tokens", 0, config.speculative_tokens, config.speculative_tokens, AT_STEP),
        _knob("max_running", 1, config.max_running, config.max_running, f"{AT_STEP}; lowering it drains"),
        _knob(
            "admission_watermark",
            0.05,
            1.0,
            config.admission_watermark,
            f"to what is held{_peak_too(config)}, {AT_STEP}",
            granularity=0.01,
        ),
        _knob(
            "kv_element_bits",
            narrowest.bits,
            widest.bits,
            widest.bits,
            "to sequences admitted from the next step on; " + ", ".join(stored) + ", rounded down",
            granularity=4,
        ),
        _knob("kv_kept_ratio", 0.05, 1.0, 1.0, f"to requests that opted in, {AT_STEP}", granularity=0.01),
        _knob("shed_fraction", 0.0, 1.0, 0.0, "by the valve, at the next request", granularity=0.01),
    )
    lacking = {}
    if not config.speculates:
        lacking["speculative_tokens"] = "no draft model is loaded"
    if not narrower:
        lacking["kv_element_bits"] = f"the KV pool is {widest.name} already, the narrowest there is"
    fields = tuple(fields)
    cached = PREFIX_FIELDS[0] in fields
    return Manifest(
        engine="kvengine",
        engine_version=_version(),
        model=config.name,
        block_size=plan.block_size,
        blocks=plan.blocks,
        bytes_per_block=plan.block_bytes,
        max_model_len=max_model_len,
        device=device,
        knobs=tuple(knob for knob in knobs if knob.name not in lacking),
        fields=tuple(STEP_FIELDS[name] for name in fields),
        classes=config.classes,
        queue_order="class",
        activation_bytes_per_token=activation_bytes_per_token,
        device_memory_bytes=plan.memory_bytes,
        device_uuids=device_uuids,
        weights_bytes=plan.resident_bytes,
        tenant_columns=TENANT_COLUMNS if cached else (),
        request_columns=REQUEST_COLUMNS if request_records else (),
        request_records=request_records,
        unsupported_knobs=lacking,
        unsupported_signals=_unsupported(cached, device, [one.bits for one in config.precisions.offered]),
    )


def _peak_too(config: EngineConfig) -> str:
    return " and, from the baseline up, to the predicted peak" if config.admission == "predicted" else ""


def _unsupported(cached: bool, device: str, offered_bits: Iterable[int]) -> dict[str, str]:
    """Signals that this engine does not have, and why."""
    reasons = {} if cached else dict.fromkeys(PREFIX_SIGNALS, "its prefix cache is off")
    if device == "cpu":
        reasons["device_fragmentation_ratio"] = "on a CPU memory is counted, not taken from an allocator"
    for bits in sorted({*KV_BITS} - {*offered_bits}):
        reasons[f"kv_{bits}bit_bytes"] = f"its KV pool stores nothing in {bits} bits"
    return reasons


def _knob(
    name: str, minimum: float, maximum: float, baseline: float, applied: str, granularity: float = 1
) -> ManifestKnob:
    return ManifestKnob(name, KNOBS[name].unit, minimum, maximum, baseline, granularity, applied)


def _version() -> str:
    try:
        return version("kvpilot")
    except PackageNotFoundError:
        return "0"
