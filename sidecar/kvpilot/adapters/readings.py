"""What one look at an engine's page says about each signal of the catalogue.

Pure: a manifest, a step record, class rows and histograms in; a reading, or why there is none, out. A field
that the engine does not provide makes its signals missing, never zero.
"""

import math
from collections.abc import Callable, Iterable, Mapping

from kvpilot.adapters.windows import Key, Reading, Value
from kvpilot.link.fields import HORIZONS, KV_BITS
from kvpilot.link.manifest import Manifest
from kvpilot.link.records import StepRecord
from kvpilot.link.telemetry import ClassRow, TelemetryReader
from kvpilot.signals import SIGNALS, Missing

NOT_PROVIDED = Missing("not_provided")

FIELD_OF = {
    "requests_running": "running",
    "requests_waiting": "waiting",
    "waiting_prompt_tokens": "waiting_prompt_tokens",
    "kv_free_blocks": "kv_blocks_free",
    "kv_cached_blocks": "kv_blocks_cached",
    "kv_shared_blocks": "kv_blocks_shared",
    "kv_pinned_blocks": "kv_blocks_pinned",
    "prefix_mismatches": "prefix_mismatches_total",
    "evicted_tokens": "evicted_tokens_total",
    "preemptions": "preemptions_total",
    "recomputed_tokens": "recomputed_tokens_total",
    "kv_limited_steps": "kv_limited_steps_total",
    "budget_limited_steps": "budget_limited_steps_total",
    "steps": "steps_total",
    "prefill_tokens": "prefill_tokens_total",
    "decode_tokens": "decode_tokens_total",
    "finished": "finished_total",
    "failed": "failed_total",
    "oom": "oom_total",
    "drafted_tokens": "drafted_tokens_total",
    "device_free_bytes": "device_free_bytes",
}
"""Signals that are one field of the step record."""

HISTOGRAM_OF = {
    "itl_seconds": "itl",
    "ttft_seconds": "ttft",
    "queue_wait_seconds": "queue_wait",
    "step_seconds": "step",
}

_ROW_OF: dict[str, Callable[[ClassRow], int]] = {
    "requests_waiting": lambda row: row.waiting,
    "waiting_prompt_tokens": lambda row: row.waiting_prompt_tokens,
}


def available_blocks(record: StepRecord) -> float | None:
    """KV blocks that a request could still get: free ones, and cached ones that would be given up for it."""
    free = record.get("kv_blocks_free")
    return None if free is None else free + (record.get("kv_blocks_cached") or 0)


def _kv_occupancy(manifest: Manifest, record: StepRecord) -> float | Missing:
    available = available_blocks(record)
    if available is None or not manifest.blocks:
        return NOT_PROVIDED
    return (manifest.blocks - available) / manifest.blocks


def _kv_demand_ratio(manifest: Manifest, record: StepRecord) -> float | Missing:
    available, waiting_tokens = available_blocks(record), record.get("waiting_prompt_tokens")
    if available is None or waiting_tokens is None or not manifest.blocks:
        return NOT_PROVIDED
    return (manifest.blocks - available + waiting_tokens / manifest.block_size) / manifest.blocks


def _kv_peak_ratio(manifest: Manifest, record: StepRecord) -> float | Missing:
    ahead = [record.get(f"demand_{horizon}_p90_blocks") for horizon in HORIZONS]
    occupancy = _kv_occupancy(manifest, record)
    if None in ahead or isinstance(occupancy, Missing):
        return NOT_PROVIDED
    # What is held now is a peak too: a batch may be about to shrink.
    return max(occupancy, max(blocks or 0.0 for blocks in ahead) / manifest.blocks)


def _tail_waste_ratio(manifest: Manifest, record: StepRecord) -> float | Missing:
    available, waste = available_blocks(record), record.get("tail_waste_tokens")
    if available is None or waste is None:
        return NOT_PROVIDED
    slots = (manifest.blocks - available) * manifest.block_size
    return waste / slots if slots > 0 else Missing("no_samples")


def _spec_acceptance_ratio(manifest: Manifest, record: StepRecord) -> Value | Missing:
    accepted, drafted = record.get("accepted_tokens_total"), record.get("drafted_tokens_total")
    return NOT_PROVIDED if accepted is None or drafted is None else (accepted, drafted)


def _prefix_hit_ratio(manifest: Manifest, record: StepRecord) -> Value | Missing:
    hit, queried = record.get("prefix_tokens_hit_total"), record.get("prefix_tokens_queried_total")
    return NOT_PROVIDED if hit is None or queried is None else (hit, queried)


def _kv_bytes(bits: int) -> Callable[[Manifest, StepRecord], Value | Missing]:
    def read(manifest: Manifest, record: StepRecord) -> Value | Missing:
        blocks = record.get(f"kv_{bits}bit_blocks")
        return NOT_PROVIDED if blocks is None else blocks * manifest.bytes_per_block

    return read


def _device_fragmentation_ratio(manifest: Manifest, record: StepRecord) -> float | Missing:
    reserved, allocated = record.get("device_reserved_bytes"), record.get("device_allocated_bytes")
    if reserved is None or allocated is None:
        return NOT_PROVIDED
    return (reserved - allocated) / reserved if reserved else Missing("no_samples")


def _device_headroom_tokens(manifest: Manifest, record: StepRecord) -> float | Missing:
    free = record.get("device_free_bytes")
    if free is None or not manifest.activation_bytes_per_token:
        return NOT_PROVIDED
    return free / manifest.activation_bytes_per_token


DERIVED: dict[str, Callable[[Manifest, StepRecord], Value | Missing]] = {
    "kv_occupancy": _kv_occupancy,
    "kv_demand_ratio": _kv_demand_ratio,
    "kv_peak_ratio": _kv_peak_ratio,
    "tail_waste_ratio": _tail_waste_ratio,
    "spec_acceptance_ratio": _spec_acceptance_ratio,
    "prefix_hit_ratio": _prefix_hit_ratio,
    **{f"kv_{bits}bit_bytes": _kv_bytes(bits) for bits in KV_BITS},
    "device_fragmentation_ratio": _device_fragmentation_ratio,
    "device_headroom_tokens": _device_headroom_tokens,
}

ENGINE_SIGNALS = tuple(name for name, signal in SIGNALS.items() if signal.provider == "engine")


def read_signals(
    wanted: Iterable[Key], reader: TelemetryReader, record: StepRecord, at_ns: int
) -> dict[Key, Reading | Missing]:
    """Readings of those `wanted` that an engine provides. What could not be read just now is left out."""
    manifest = reader.manifest
    rows: Mapping[str, ClassRow] | None = None
    readings: dict[Key, Reading | Missing] = {}
    for key in wanted:
        signal, klass = key
        if signal in HISTOGRAM_OF:
            value = _histogram(reader, signal, klass)
        elif klass is not None and signal in _ROW_OF:
            if rows is None:
                rows = {row.name: row for row in reader.classes()}
            row = rows.get(klass)
            value = NOT_PROVIDED if row is None else float(_ROW_OF[signal](row))
        else:
            value = read_field(manifest, record, signal)
        if value is not None:
            readings[key] = value if isinstance(value, Missing) else Reading(at_ns, value)
    return readings


def read_field(manifest: Manifest, record: StepRecord, signal: str) -> Value | Missing | None:
    """One signal of the step record; None for a signal that is not an engine's."""
    if signal in manifest.unsupported_signals:
        return NOT_PROVIDED
    field, derive = FIELD_OF.get(signal), DERIVED.get(signal)
    value: Value | Missing | None
    if field is not None:
        value = record.get(field)
        value = NOT_PROVIDED if value is None else value
    elif derive is not None:
        value = derive(manifest, record)
    else:
        return None
    return Missing("not_finite") if isinstance(value, float) and not math.isfinite(value) else value


def _histogram(reader: TelemetryReader, signal: str, klass: str | None) -> Value | Missing | None:
    if signal in reader.manifest.unsupported_signals:
        return NOT_PROVIDED
    index = None
    if klass is not None:
        if klass not in reader.manifest.classes:
            return NOT_PROVIDED
        index = reader.manifest.classes.index(klass)
    return reader.histogram(HISTOGRAM_OF[signal], index)
