"""Which fields of the step record this scheduler can fill, and why not the others."""

from typing import Any

from kvpilot.inside.vllm.layout import Layout
from kvpilot.inside.vllm.record import FIELDS
from kvpilot.inside.vllm.scan import DEMAND_FIELDS

NEEDED = (
    "schedule",
    "update_from_output",
    "add_request",
    "finish_requests",
    "_free_request",
    "get_request_counts",
    "requests",
    "running",
    "waiting",
    "max_num_scheduled_tokens",
    "max_model_len",
    "kv_cache_manager",
    "scheduler_config",
    "vllm_config",
)
"""What a scheduler must have for a hook to be of any use."""

_QUEUE_REASONS = (
    "deferred_waiting",
    "num_waiting_for_streaming_input",
    "max_num_active_reqs",
    "pause_state",
)

IN_WORKERS = "the device's memory belongs to vLLM's worker processes"


def strange(scheduler: Any) -> str | None:
    """What is missing for this object to be a scheduler that we know; None where nothing is."""
    missing = [name for name in NEEDED if not hasattr(scheduler, name)]
    return f"its scheduler has no {', '.join(missing)}" if missing else None


class Outlook:
    """`fields` that are filled, in record order, and by signal why one is not provided."""

    def __init__(self, scheduler: Any, layout: Layout, tags_unsupported: str | None) -> None:
        self.unsupported: dict[str, str] = dict.fromkeys(
            ("device_free_bytes", "device_headroom_tokens", "oom"), IN_WORKERS
        )
        dropped: set[str] = set()
        if layout.blocks_unclear is not None:
            dropped |= {"tail_waste_tokens", "demand_step", *DEMAND_FIELDS}
            for signal in ("tail_waste_ratio", "kv_peak_ratio"):
                self.unsupported[signal] = layout.blocks_unclear
        if not layout.caching:
            dropped |= {"prefix_tokens_queried_total", "prefix_tokens_hit_total"}
        if not all(hasattr(scheduler, name) for name in _QUEUE_REASONS):
            dropped.add("kv_limited_steps_total")
            self.unsupported["kv_limited_steps"] = "this version does not tell what a request waits for"
        if not hasattr(scheduler, "_preempt_request"):
            dropped |= {"preemptions_total", "recomputed_tokens_total"}
            for signal in ("preemptions", "recomputed_tokens"):
                self.unsupported[signal] = "this version has no one place where it preempts"
        if tags_unsupported is not None:
            self.unsupported["tenants"] = tags_unsupported
        self.fields = tuple(name for name in FIELDS if name not in dropped)
