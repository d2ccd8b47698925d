"""Every metric family that leaves a pilot: name, kind, labels, meaning. One table, from which pages are made.

Names are `kvpilot_` + what it is + the unit, in base units; counters end in `_total` on the page. Every
series carries `engine` and `rank`; labels listed here come after these two. A signal of the catalogue is a
family by its own name (`RENAMED` holds those that have another name in the field). Missing is never zero: a
family whose value is not known has no sample, and `kvpilot_signal_missing` says why.
"""

from dataclasses import dataclass
from typing import Literal

from kvpilot.link.fields import KV_BITS, STEP_FIELDS
from kvpilot.signals import SIGNALS, Signal

Kind = Literal["gauge", "counter", "histogram"]

COMMON = ("engine", "rank")
RENAMED = {
    "itl_seconds": "inter_token_latency_seconds",
    "ttft_seconds": "time_to_first_token_seconds",
    "step_seconds": "step_duration_seconds",
    "kv_occupancy": "kv_used_ratio",
    "forecast.kv_exhaustion_seconds": "kv_time_to_exhaustion_seconds",
}
_UNIT_SUFFIXES = ("seconds", "bytes", "ratio")
_KIND: dict[str, Kind] = {
    "gauge": "gauge",
    "counter": "counter",
    "ratio": "gauge",
    "distribution": "histogram",
}


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """One family. `name` is without the `_total` that counters get; `labels` begin with COMMON."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    room: str
    """The heading under which docs/metrics.md shows it."""

    @property
    def shown_name(self) -> str:
        """The name on the page, by which queries know it (a histogram's is that of its `_bucket`)."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def metric_name(signal: Signal) -> str:
    """The exported name of a signal, without `_total`."""
    name = RENAMED.get(signal.name, signal.name.replace(".", "_"))
    if signal.unit in _UNIT_SUFFIXES and not name.endswith(f"_{signal.unit}"):
        name += f"_{signal.unit}"
    return f"kvpilot_{name}"


def _of_signal(signal: Signal) -> Family:
    labels = (*COMMON, "class") if signal.per_class else COMMON
    room = {"engine": "Signals of the engine", "valve": "Signals of the valve"}.get(
        signal.provider, "Signals of the pilot"
    )
    return Family(metric_name(signal), _KIND[signal.kind], labels, signal.meaning, room)


SIGNAL_FAMILIES: dict[str, Family] = {name: _of_signal(signal) for name, signal in SIGNALS.items()}
"""By the signal's name."""

_FIELDS: dict[str, str] = {
    "accepted_tokens_total": "accepted_tokens",
    "draft_rounds_total": "draft_rounds",
    "rejected_rounds_total": "rejected_draft_rounds",
    "decode_sequences_total": "decode_sequences",
    "context_tokens_total": "context_tokens",
    "prefix_tokens_queried_total": "prefix_queried_tokens",
    "prefix_tokens_hit_total": "prefix_hit_tokens",
    "rejected_total": "rejected_by_engine",
    "cancelled_total": "cancelled",
    "controls_ignored_total": "controls_ignored",
    "tail_waste_tokens": "tail_waste_tokens",
    "device_reserved_bytes": "device_reserved_bytes",
    "device_allocated_bytes": "device_allocated_bytes",
    "host_available_bytes": "host_available_bytes",
    **{f"kv_{bits}bit_blocks": f"kv_{bits}bit_blocks" for bits in KV_BITS},
}
"""Fields of the step record that are no signal by themselves, and what they are exported as."""

FIELD_FAMILIES: dict[str, Family] = {
    field: Family(
        f"kvpilot_{name}",
        "counter" if field.endswith("_total") else "gauge",
        COMMON,
        STEP_FIELDS[field].meaning,
        "Fields of the engine's step record",
    )
    for field, name in _FIELDS.items()
}
"""By the field's name."""


def _rows(room: str, *rows: tuple[str, Kind, str, str]) -> tuple[Family, ...]:
    return tuple(
        Family(f"kvpilot_{name}", kind, (*COMMON, *labels.split()), meaning, room)
        for name, kind, labels, meaning in rows
    )


_G: Kind = "gauge"
_C: Kind = "counter"
_H: Kind = "histogram"

_ROWS = (
    *_rows(
        "The pilot",
        ("build_info", _G, "version", "1; which kvpilot this is."),
        ("control_ticks", _C, "", "Ticks flown."),
        ("control_ticks_missed", _C, "", "Ticks whose time passed unused."),
        ("control_ticks_failed", _C, "", "Ticks that a defect ended."),
        ("control_tick_duration_seconds", _H, "", "What a tick took."),
        ("control_tick_lateness_seconds", _H, "", "How late a tick began."),
        ("control_publish_duration_seconds", _H, "", "What publishing took of a tick."),
        ("control_armed", _G, "", "1 when rules may act."),
        ("control_off", _G, "", "1 while a person holds the pilot off."),
        ("control_actions", _C, "", "Changes of values in force, as written for the engine or the valves."),
        ("control_unconfirmed", _G, "", "Changes without an echo yet."),
        ("page_renders", _C, "", "Pages rendered; scrapes of the same state share one."),
        ("page_render_duration_seconds", _H, "", "What rendering a page took."),
        ("journal_lost", _C, "", "Journal rows lost."),
        ("alert_firing", _G, "alertname severity", "1 for an alert of the pilot that fires."),
        ("webhook_deliveries", _C, "receiver outcome", "Alerts sent or given up."),
        ("webhook_queue_length", _G, "", "Alerts waiting to be sent."),
        ("otlp_exports", _C, "kind outcome", "Batches handed to the OTLP endpoint: sent or failed."),
        ("otlp_dropped", _C, "kind", "Rows or batches given up: the queue was full, or sending failed."),
        ("otlp_queue_length", _G, "", "Rows that wait to become spans, or to be sent."),
    ),
    *_rows(
        "Policies and decisions",
        ("policy_load_success", _G, "", "1 if the last load of policies was taken."),
        ("policy_last_reload_timestamp_seconds", _G, "", "When policies were last taken (Unix time)."),
        ("policy_mode", _G, "policy mode", "1; the mode of each policy that is flown."),
        ("rule_state", _G, "policy rule state", "1 for the state that a rule is in, 0 for the others."),
        ("rule_claim_value", _G, "policy rule knob scope shadow",
         "Value that a rule wants; shadow=true where it only says so."),
        ("control_decisions", _C, "policy rule knob verdict", "Decisions."),
        ("control_effects", _C, "policy rule outcome",
         "Changes by what came of them: the expected effect came, did_not_come, or is inconclusive."),
        ("control_effect_expected_ratio", _G, "policy rule input",
         "Share by which an input was to change with a rule's newest judged change; -0.1 is a fall by 10 %."),
        ("control_effect_realised_ratio", _G, "policy rule input",
         "Share by which it changed; absent where it was 0 before."),
    ),
    *_rows(
        "Knobs",
        ("knob_value", _G, "knob", "Value in force, as the engine echoes it."),
        ("knob_baseline", _G, "knob", "The knob's baseline."),
        ("knob_min", _G, "knob", "The knob's minimum."),
        ("knob_max", _G, "knob", "The knob's maximum."),
        ("lease_value", _G, "knob scope policy rule", "Value of a lease that this pilot holds."),
        ("lease_remaining_seconds", _G, "knob scope",
         "How long the engine keeps a lease without another renewal."),
        ("override_remaining_seconds", _G, "knob scope", "How long a person's order still holds."),
    ),
    *_rows(
        "Whether signals are there",
        ("signal_available", _G, "signal", "1 where the signal has a value now, 0 where it is missing."),
        ("signal_missing", _G, "signal reason", "1 for a signal that is missing, by why."),
        ("signal_age_seconds", _G, "signal", "Since a signal was last known to be so."),
    ),
    *_rows(
        "The engine",
        ("engine_info", _G, "kind version model device", "1; what the engine is."),
        ("engine_state", _G, "state", "1 for the engine's state, 0 for the others."),
        ("engine_age_seconds", _G, "", "How long this start of the engine has run."),
        ("engine_restarts", _C, "", "Starts of the engine that followed another one."),
        ("kv_pool_blocks", _G, "", "KV blocks that the engine has."),
        ("kv_block_tokens", _G, "", "Tokens in a KV block."),
        ("kv_block_bytes", _G, "", "Bytes of a KV block."),
        ("slo_seconds", _G, "class promise", "What kvpilot.yaml promises: promise is itl or ttft."),
    ),
    *_rows(
        "Tenants",
        ("tenant_running", _G, "tenant", "Requests of a tenant that hold KV memory."),
        ("tenant_waiting", _G, "tenant", "Requests of a tenant that wait."),
        ("tenant_kv_blocks", _G, "tenant", "KV blocks that a tenant holds."),
        ("tenant_kv_block_seconds", _C, "tenant", "KV blocks times seconds held by a tenant."),
        ("tenant_tokens", _C, "tenant", "Tokens computed for a tenant."),
        ("tenant_prefix_queried_tokens", _C, "tenant",
         "Prompt tokens of a tenant looked up in the prefix cache."),
        ("tenant_prefix_hit_tokens", _C, "tenant",
         "Those of them that were found: over those looked up, its hit ratio."),
        ("tenant_offered", _C, "tenant", "Requests of a tenant that reached the valves."),
        ("tenant_admitted", _C, "tenant", "Requests of a tenant that the valves let in."),
        ("tenant_shed", _C, "tenant", "Requests of a tenant that the valves turned away."),
    ),
    *_rows(
        "Valves",
        ("valve_processes", _G, "state", "Valves that live: they write their page, or they are silent."),
        ("valve_shed", _C, "class reason",
         "Requests turned away, by why: a fraction, no credits left, or the server is shutting down."),
        ("valve_credits_left_tokens", _G, "class",
         "Prompt tokens that may still be accepted until the next tick; absent without a limit."),
        ("valve_lease_value", _G, "knob scope", "Value of a lease that every valve obeys, by its own word."),
    ),
    *_rows(
        "GPUs, through NVML",
        ("gpu_info", _G, "gpu name mig", "1; a device that the engine computes on. gpu is its UUID."),
        ("gpu_missing", _G, "gpu reading reason", "1 for a reading that NVML does not give, by why."),
        ("gpu_memory_total_bytes", _G, "gpu", "Memory of the device (of the MIG instance)."),
        ("gpu_memory_used_bytes", _G, "gpu", "Memory in use by anybody, without what the driver keeps."),
        ("gpu_memory_driver_bytes", _G, "gpu", "Memory that the driver and firmware keep."),
        ("gpu_memory_part_bytes", _G, "gpu part",
         "What the used memory is: weights, kv, activations, fragmentation, context, others, unexplained."),
        ("gpu_utilisation_ratio", _G, "gpu", "Share of the last sample period in which a kernel ran."),
        ("gpu_memory_utilisation_ratio", _G, "gpu", "Share of it in which memory was read or written."),
        ("gpu_power_watts", _G, "gpu", "Power drawn."),
        ("gpu_power_limit_watts", _G, "gpu", "Power limit in force."),
        ("gpu_energy_joules", _C, "gpu", "Energy drawn since the driver was loaded."),
        ("gpu_temperature_celsius", _G, "gpu", "Temperature of the chip."),
        ("gpu_sm_clock_hertz", _G, "gpu", "Clock of the multiprocessors."),
        ("gpu_memory_clock_hertz", _G, "gpu", "Clock of the memory."),
        ("gpu_throttle", _G, "gpu reason", "1 for a reason why clocks are held back now, 0 for the others."),
        ("gpu_ecc_errors", _C, "gpu kind", "ECC errors since the driver was loaded: corrected, uncorrected."),
        ("gpu_xid_events", _C, "gpu xid", "XID errors that the driver told since the pilot came."),
    ),
)  # fmt: skip

TENANT_COUNTS = {
    "prefix_tokens_queried_total": "tenant_prefix_queried_tokens",
    "prefix_tokens_hit_total": "tenant_prefix_hit_tokens",
}
"""Columns of the link's counts by tenant, and what they are exported as."""

FAMILIES: dict[str, Family] = {
    family.name: family for family in (*SIGNAL_FAMILIES.values(), *FIELD_FAMILIES.values(), *_ROWS)
}
"""All of them, by name without `_total`."""
assert len(FAMILIES) == len(SIGNAL_FAMILIES) + len(FIELD_FAMILIES) + len(_ROWS), "a name is taken twice"
