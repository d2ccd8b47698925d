"""Engine: KV memory, latency, and what steps are made of, of the engines and ranks chosen."""

from kvboards.board import SELECT, Board, Row, Variable
from kvboards.palette import BAD, CAUTION, EXPECTED, GOOD, HELD, MEASURED, REFERENCE
from kvboards.panels import QUANTILES, Panel, Query, bands

POOL = f"sum(kvpilot_kv_pool_blocks{{{SELECT}}})"
WASTE = f"avg(kvpilot_tail_waste_ratio{{{SELECT}}})"
FREE = f"sum(kvpilot_kv_free_blocks{{{SELECT}}})"
CACHED = f"sum(kvpilot_kv_cached_blocks{{{SELECT}}})"


def _per_step(metric: str) -> str:
    return (
        f"sum(rate({metric}{{{SELECT}}}[$__rate_interval])) / "
        f"(sum(rate(kvpilot_steps_total{{{SELECT}}}[$__rate_interval])) > 0)"
    )


def _rate(metric: str) -> str:
    return f"sum(rate({metric}{{{SELECT}}}[$__rate_interval]))"


LATENCY = Row(
    "Latency by class",
    (
        Panel(
            "lines",
            "ITL: $class",
            "Time between two tokens of a request. Grey: what the class is promised.",
            (
                *bands(QUANTILES, f'kvpilot_inter_token_latency_seconds_bucket{{{SELECT}, class=~"$class"}}'),
                Query(
                    f'max(kvpilot_slo_seconds{{{SELECT}, class=~"$class", promise="itl"}})',
                    "target",
                    REFERENCE,
                    width=1,
                    dash=(2, 6),
                ),
            ),
            unit="s",
            least=0,
            repeat="class",
            width=12,
        ),
        Panel(
            "lines",
            "TTFT: $class",
            "Request received to its first token. Grey: what the class is promised.",
            (
                *bands(QUANTILES, f'kvpilot_time_to_first_token_seconds_bucket{{{SELECT}, class=~"$class"}}'),
                Query(
                    f'max(kvpilot_slo_seconds{{{SELECT}, class=~"$class", promise="ttft"}})',
                    "target",
                    REFERENCE,
                    width=1,
                    dash=(2, 6),
                ),
            ),
            unit="s",
            least=0,
            repeat="class",
            width=12,
        ),
    ),
)

MEMORY = Row(
    "KV memory",
    (
        Panel(
            "lines",
            "KV pool: used, wasted, cached, free",
            "The whole pool as 100 %. Used: tokens that running requests need. Tail waste: the unfilled "
            "ends of their last blocks. Cached: given up at once when blocks are needed.",
            (
                Query(
                    f"(1 - ({FREE} + {CACHED}) / {POOL}) * (1 - {WASTE})",
                    "used",
                    HELD,
                    width=0,
                    fill=80,
                    stack=True,
                ),
                Query(
                    f"(1 - ({FREE} + {CACHED}) / {POOL}) * {WASTE}",
                    "tail waste",
                    CAUTION,
                    width=0,
                    fill=80,
                    stack=True,
                ),
                Query(f"{CACHED} / {POOL}", "cached", MEASURED, width=0, fill=45, stack=True),
                Query(f"{FREE} / {POOL}", "free", REFERENCE, width=0, fill=20, stack=True),
            ),
            unit="percentunit",
            least=0,
            most=1,
        ),
        Panel(
            "lines",
            "Time to exhaustion",
            "When no KV block will be free: p50, between one chance in ten of sooner and of later. "
            "60 s means that none is in sight within a minute.",
            (
                Query(
                    f"clamp_max(min(kvpilot_kv_time_to_exhaustion_seconds{{{SELECT}}}), 60)",
                    "p50",
                    EXPECTED,
                ),
                Query(
                    f"clamp_max(min(kvpilot_forecast_kv_exhaustion_p90_seconds{{{SELECT}}}), 60)",
                    "p90 (later)",
                    EXPECTED,
                    width=1,
                    dash=(2, 4),
                    fill=15,
                    below_to="p10 (sooner)",
                ),
                Query(
                    f"clamp_max(min(kvpilot_forecast_kv_exhaustion_p10_seconds{{{SELECT}}}), 60)",
                    "p10 (sooner)",
                    CAUTION,
                    width=1,
                    dash=(6, 4),
                ),
            ),
            unit="s",
            least=0,
            most=60,
        ),
        Panel(
            "lines",
            "Fragmentation: tail waste",
            "Allocated KV token slots that hold no token, over all allocated: the only fragmentation that a "
            "paged pool has. Smaller blocks make it less.",
            (
                Query(
                    f"max(kvpilot_tail_waste_ratio{{{SELECT}}})", "tail waste, worst rank", CAUTION, fill=20
                ),
            ),
            unit="percentunit",
            least=0,
            width=8,
            height=7,
        ),
        Panel(
            "lines",
            "Prefix cache: hits",
            "Prompt tokens found in the prefix cache, over those looked up.",
            (Query(f"avg(kvpilot_prefix_hit_ratio{{{SELECT}}})", "hit ratio", GOOD, fill=20),),
            unit="percentunit",
            least=0,
            most=1,
            width=8,
            height=7,
        ),
        Panel(
            "lines",
            "Preempted and computed again",
            "Requests sent back to the queue for want of blocks, and the tokens that this made the engine "
            "compute twice: both should be 0.",
            (
                Query(_rate("kvpilot_preemptions_total"), "preemptions", BAD, unit="reqps"),
                Query(
                    _rate("kvpilot_recomputed_tokens_total"),
                    "tokens again",
                    CAUTION,
                    width=1,
                    dash=(6, 4),
                    right=True,
                    unit="suffix:tok/s",
                ),
            ),
            unit="reqps",
            least=0,
            soft_most=1,
            width=8,
            height=7,
        ),
    ),
)

WORK = Row(
    "Batch and queue",
    (
        Panel(
            "lines",
            "Batch composition: tokens in a step",
            "The mean step: prompt tokens, output tokens, and draft tokens proposed.",
            (
                Query(
                    _per_step("kvpilot_prefill_tokens_total"),
                    "prompt",
                    MEASURED,
                    width=0,
                    fill=60,
                    stack=True,
                ),
                Query(_per_step("kvpilot_decode_tokens_total"), "output", GOOD, width=0, fill=60, stack=True),
                Query(
                    _per_step("kvpilot_drafted_tokens_total"),
                    "drafts",
                    EXPECTED,
                    width=0,
                    fill=60,
                    stack=True,
                ),
            ),
            unit="short",
            least=0,
        ),
        Panel(
            "lines",
            "Requests: running and waiting",
            "Running requests hold KV memory; waiting ones are accepted and not admitted.",
            (
                Query(f"sum(kvpilot_requests_running{{{SELECT}}})", "running", MEASURED, fill=15),
                Query(f"sum(kvpilot_requests_waiting{{{SELECT}}})", "waiting", CAUTION, fill=30),
            ),
            unit="short",
            least=0,
        ),
        Panel(
            "lines",
            "Tokens a second",
            "Prompt tokens computed and output tokens emitted.",
            (
                Query(_rate("kvpilot_prefill_tokens_total"), "prompt", MEASURED),
                Query(_rate("kvpilot_decode_tokens_total"), "output", GOOD, width=3),
            ),
            unit="suffix:tok/s",
            least=0,
            width=8,
            height=7,
        ),
        Panel(
            "lines",
            "Step time",
            "How long a step takes, and what the step-time model expects of the mean one.",
            (
                *bands(QUANTILES, f"kvpilot_step_duration_seconds_bucket{{{SELECT}}}"),
                Query(
                    f"max(kvpilot_forecast_step_seconds{{{SELECT}}})", "model", EXPECTED, width=1, dash=(2, 4)
                ),
            ),
            unit="s",
            least=0,
            width=8,
            height=7,
        ),
        Panel(
            "lines",
            "Drafts accepted",
            "Draft tokens accepted over proposed, as measured; and what the forecast holds while none "
            "are drafted.",
            (
                Query(
                    f"avg(kvpilot_spec_acceptance_ratio{{{SELECT}}})",
                    "measured",
                    MEASURED,
                    width=3,
                    sparse=True,
                ),
                Query(
                    f"avg(kvpilot_forecast_acceptance_ratio{{{SELECT}}})",
                    "forecast, each token",
                    EXPECTED,
                    dash=(2, 4),
                ),
            ),
            unit="percentunit",
            least=0,
            most=1,
            width=8,
            height=7,
            needs="speculation",
        ),
    ),
)

BOARD = Board(
    "engine",
    "Engine",
    "KV memory, latency and what steps are made of.",
    (LATENCY, MEMORY, WORK),
    (Variable("class", "Class", 'label_values(kvpilot_requests_waiting{engine=~"$engine"}, class)'),),
)
