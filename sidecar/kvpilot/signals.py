"""The signal catalogue: everything kvpilot can see, by one name, in one unit.

The policy schema, the exporter and the reference page are all derived from this table. A signal is a value or
*missing* with a reason; nothing here or downstream turns missing into a number.

Kinds decide which aggregations make sense over a window:

- `gauge`: a level, sampled once a tick: `last`, `mean`, `min`, `max`.
- `counter`: cumulative, only ever read as a difference: `rate` (per second), `increase`.
- `ratio`: two counters, numerator over denominator, differenced over the window: `mean`.
- `distribution`: a cumulative histogram differenced over the window: `p50`, `p90`, `p95`, `p99`, `mean`.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "ratio", "distribution"]
Provider = Literal["engine", "valve", "pilot"]

AGGREGATIONS: dict[Kind, tuple[str, ...]] = {
    "gauge": ("last", "mean", "min", "max"),
    "counter": ("rate", "increase"),
    "ratio": ("mean",),
    "distribution": ("p50", "p90", "p95", "p99", "mean"),
}


@dataclass(frozen=True, slots=True)
class Missing:
    """Why there is no value. `reason` is one of `REASONS`; `age_s` is the age of the last value, if any."""

    reason: str
    age_s: float | None = None


REASONS = (
    "no_samples",
    "too_few_samples",
    "too_old",
    "restarted",
    "reset",
    "not_provided",
    "not_finite",
    "eval_error",
)
"""`eval_error`: an expression over signals gave no value; every other reason is a signal's own."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One row. `plausible` is what a threshold may be compared with, in `unit`; outside it is a mistake."""

    name: str
    kind: Kind
    unit: str
    plausible: tuple[float, float]
    provider: Provider
    meaning: str
    per_class: bool = False
    """Whether an input may narrow it with `class:`."""


_INF = float("inf")
_COUNT = (0.0, 1e12)
_RATIO = (0.0, 1.0)
_LATENCY = (0.0, 1000.0)
_BYTES = (0.0, 1e15)


def _table(*rows: Signal) -> dict[str, Signal]:
    return {row.name: row for row in rows}


SIGNALS: dict[str, Signal] = _table(
    # Latency, as the engine measures it.
    Signal("itl_seconds", "distribution", "seconds", _LATENCY, "engine", "Time between two tokens of a request.", True),
    Signal("ttft_seconds", "distribution", "seconds", _LATENCY, "engine", "Request received to its first token.", True),
    Signal("queue_wait_seconds", "distribution", "seconds", _LATENCY, "engine", "Request received to admitted.", True),
    Signal("step_seconds", "distribution", "seconds", _LATENCY, "engine", "Duration of one engine step."),
    # Queues.
    Signal("requests_running", "gauge", "requests", _COUNT, "engine", "Requests that hold KV memory."),
    Signal("requests_waiting", "gauge", "requests", _COUNT, "engine", "Requests accepted and not admitted.", True),
    Signal("waiting_prompt_tokens", "gauge", "tokens", _COUNT, "engine", "Prompt tokens of waiting requests.", True),
    # KV memory.
    Signal("kv_occupancy", "gauge", "ratio", _RATIO, "engine", "Referenced KV blocks over all KV blocks."),
    Signal("kv_demand_ratio", "gauge", "ratio", (0.0, 1e6), "engine", "KV blocks held and those that waiting prompts need, over all KV blocks."),
    Signal("kv_peak_ratio", "gauge", "ratio", (0.0, 1e6), "engine", "KV blocks that running requests are predicted to hold at their peak (p90), over all KV blocks."),
    Signal("kv_free_blocks", "gauge", "blocks", _COUNT, "engine", "KV blocks that nothing holds."),
    Signal("kv_cached_blocks", "gauge", "blocks", _COUNT, "engine", "Unreferenced KV blocks kept for reuse."),
    Signal("kv_shared_blocks", "gauge", "blocks", _COUNT, "engine", "KV blocks that more than one sequence reads."),
    Signal("kv_pinned_blocks", "gauge", "blocks", _COUNT, "engine", "KV blocks of pinned prompts: never given up."),
    *(Signal(f"kv_{bits}bit_bytes", "gauge", "bytes", _BYTES, "engine", f"KV memory in use that stores tokens in {bits} bits an element.") for bits in (32, 16, 8, 4)),
    Signal("tail_waste_ratio", "gauge", "ratio", _RATIO, "engine", "Fragmentation inside KV blocks: allocated but unfilled token slots over all allocated slots."),
    Signal("evicted_tokens", "counter", "tokens", _COUNT, "engine", "Tokens whose KV running requests gave up, having opted in to that."),
    Signal("preemptions", "counter", "requests", _COUNT, "engine", "Running requests sent back to the queue for want of KV blocks."),
    Signal("recomputed_tokens", "counter", "tokens", _COUNT, "engine", "Tokens computed again after a preemption."),
    Signal("kv_limited_steps", "counter", "steps", _COUNT, "engine", "Steps in which KV memory kept a request waiting."),
    Signal("budget_limited_steps", "counter", "steps", _COUNT, "engine", "Steps whose token budget was used up."),
    # Work.
    Signal("steps", "counter", "steps", _COUNT, "engine", "Engine steps."),
    Signal("prefill_tokens", "counter", "tokens", _COUNT, "engine", "Prompt tokens computed."),
    Signal("decode_tokens", "counter", "tokens", _COUNT, "engine", "Output tokens emitted."),
    Signal("finished", "counter", "requests", _COUNT, "engine", "Requests that finished normally."),
    Signal("failed", "counter", "requests", _COUNT, "engine", "Requests that ended in an error."),
    Signal("oom", "counter", "events", _COUNT, "engine", "Steps that ran out of device memory."),
    # Speculation. Silent, so missing, while speculation is off.
    Signal("spec_acceptance_ratio", "ratio", "ratio", _RATIO, "engine", "Draft tokens accepted over draft tokens proposed."),
    Signal("drafted_tokens", "counter", "tokens", _COUNT, "engine", "Draft tokens proposed."),
    # Prefix cache.
    Signal("prefix_hit_ratio", "ratio", "ratio", _RATIO, "engine", "Prompt tokens found in the prefix cache over those looked up."),
    Signal("prefix_mismatches", "counter", "events", _COUNT, "engine", "Cached blocks that were not what their key said: dropped, and not served."),
    # Device memory.
    Signal("device_free_bytes", "gauge", "bytes", _BYTES, "engine", "Device memory nobody holds, between steps."),
    Signal("device_fragmentation_ratio", "gauge", "ratio", _RATIO, "engine", "Fragmentation of the device's allocator: memory that it holds and no tensor uses, over what it holds."),
    Signal("device_headroom_tokens", "gauge", "tokens", _COUNT, "engine", "Free device memory over the manifest's activation bytes per token."),
    Signal("device_unexplained_bytes", "gauge", "bytes", (-1e15, 1e15), "pilot", "Device memory in use that is neither the engine's, by its allocator, nor another process's, nor what the engine's process held outside its allocator when it started."),
    Signal("gpu_throttled", "gauge", "state", _RATIO, "pilot", "1 while heat or a failing supply holds back the clocks of one of the engine's GPUs; else 0."),
    Signal("gpu_busy_ratio", "gauge", "ratio", _RATIO, "pilot", "Share of time in which a kernel ran, as NVML samples it; mean of the engine's GPUs."),
    # The engine as a whole, as the pilot sees it; told also while the engine itself is silent.
    Signal("engine_stalled", "gauge", "state", _RATIO, "pilot", "1 while the engine has work and makes no step for longer than five slow ones, and 2 s; else 0."),
    Signal("output_wedged", "gauge", "state", _RATIO, "pilot", "1 while answers do not leave, whatever the health endpoint says; else 0."),
    Signal("telemetry_silent_seconds", "gauge", "seconds", (0.0, _INF), "pilot", "Since the engine's last record, while it or a valve has work; 0 while it has none."),
    Signal("rank_load_ratio", "gauge", "ratio", (0.0, 1e4), "pilot", "Requests running and waiting in this rank over the mean of the engine's ranks; missing where there is one."),
    # The valve.
    Signal("offered", "counter", "requests", _COUNT, "valve", "Requests that reached the valve.", True),
    Signal("admitted", "counter", "requests", _COUNT, "valve", "Requests that the valve let in.", True),
    Signal("shed", "counter", "requests", _COUNT, "valve", "Requests that the valve answered with 429 or 503.", True),
    Signal("offered_prompt_tokens", "counter", "tokens", _COUNT, "valve", "Prompt tokens asked of the valve, judged by the length of bodies.", True),
    Signal("admitted_prompt_tokens", "counter", "tokens", _COUNT, "valve", "Those of the requests that the valve let in.", True),
    Signal("in_flight", "gauge", "requests", _COUNT, "valve", "Admitted requests whose response has not ended."),
    # Forecasts.
    Signal("forecast.kv_exhaustion_seconds", "gauge", "seconds", (0.0, _INF), "pilot", "Time until no KV block is free (p50): by what the engine predicts of running requests, and by what waits and comes; else by the slope of free blocks. Infinite where that is not in sight."),
    Signal("forecast.kv_exhaustion_p10_seconds", "gauge", "seconds", (0.0, _INF), "pilot", "The same, early: one time in ten it comes sooner."),
    Signal("forecast.kv_exhaustion_p90_seconds", "gauge", "seconds", (0.0, _INF), "pilot", "The same, late: one time in ten it comes later."),
    Signal("forecast.queue_wait_seconds", "gauge", "seconds", (0.0, _INF), "pilot", "What a request that comes now will wait to be admitted (p50), by the rate of service under backlog; without class: of the lowest.", True),
    Signal("forecast.queue_wait_p90_seconds", "gauge", "seconds", (0.0, _INF), "pilot", "The same, late: one time in ten it is longer.", True),
    Signal("forecast.ttft_miss_ratio", "gauge", "ratio", _RATIO, "pilot", "Probability that a request that comes now misses its class's TTFT; without class: of the lowest.", True),
    Signal("forecast.ttft_ratio", "gauge", "ratio", (0.0, _INF), "pilot", "Predicted time to the first token of a request that comes now, over its class's target; of the class for which that is worst."),
    Signal("forecast.wait_ratio", "gauge", "ratio", (0.0, _INF), "pilot", "Predicted wait to be admitted of a request that comes now, over its TTFT target, of the class with the tightest one; 0 while nobody is ahead of it."),
    Signal("forecast.service_tokens_per_second", "gauge", "tokens", _COUNT, "pilot", "Prompt tokens a second that the engine serves while requests wait."),
    Signal("forecast.step_seconds", "gauge", "seconds", _LATENCY, "pilot", "Time of the mean step of late, by the step-time model."),
    Signal("forecast.step_p97_seconds", "gauge", "seconds", _LATENCY, "pilot", "Time that 97 in 100 such steps do not exceed."),
    Signal("forecast.step_residual_ratio", "gauge", "ratio", (0.0, 1000.0), "pilot", "97 % quantile of actual over predicted step time."),
    Signal("forecast.acceptance_ratio", "gauge", "ratio", _RATIO, "pilot", "Probability that a draft token is accepted, if all before it were; stays while nothing is drafted."),
    Signal("forecast.seconds_per_token", "gauge", "seconds", _LATENCY, "pilot", "Predicted time for each output token at the number of drafts in force."),
    Signal("forecast.device_headroom_bytes", "gauge", "bytes", (-1e15, 1e15), "pilot", "Device memory that the largest step allowed now will leave; below 0 it does not fit."),
)  # fmt: skip
