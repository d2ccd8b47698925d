"""Fleet: are promises kept, by whom not, and what is turned away? The page to open first."""

from kvboards.board import SELECT, Board, Row, Target
from kvboards.palette import BAD, CAUTION, GOOD, HELD, MEASURED, REFERENCE
from kvboards.panels import Panel, Query

BY = "cluster, engine, rank"


def _rate(metric: str) -> str:
    return f"rate({metric}{{{SELECT}}}[$__rate_interval])"


WITHIN_ITL = 'le=~"$itl_target([.]0)?"'
WITHIN_TTFT = 'le=~"$ttft_target([.]0)?"'
"""The bucket that ends at the target; some scrapes write its edge as 1, some as 1.0."""
ON_TIME = f"sum(rate(kvpilot_inter_token_latency_seconds_bucket{{{SELECT}, {WITHIN_ITL}}}[$__rate_interval]))"

NOW = Row(
    "Now",
    (
        Panel(
            "stat",
            "Replicas up",
            "Ranks whose engine is live or idle. A rank counts once, by its own pilot.",
            (Query(f'sum(kvpilot_engine_state{{{SELECT}, state=~"live|idle"}})', "up"),),
            unit="none",
            width=4,
            height=4,
            steps=((None, BAD), (1, GOOD)),
        ),
        Panel(
            "stat",
            "Replicas not serving",
            "Ranks whose engine is dead, stalled or wedged, or has not been seen yet.",
            (Query(f'sum(kvpilot_engine_state{{{SELECT}, state!~"live|idle"}})', "not serving"),),
            unit="none",
            width=4,
            height=4,
            steps=((None, GOOD), (1, BAD)),
        ),
        Panel(
            "stat",
            "First tokens on time",
            "Share of the first tokens of the last 5 minutes that came within the target chosen above.",
            (
                Query(
                    f"sum(rate(kvpilot_time_to_first_token_seconds_bucket{{{SELECT}, {WITHIN_TTFT}}}[5m])) / "
                    f"(sum(rate(kvpilot_time_to_first_token_seconds_count{{{SELECT}}}[5m])) > 0)",
                    "on time",
                ),
            ),
            unit="percentunit",
            width=4,
            height=4,
            decimals=1,
            steps=((None, BAD), (0.95, CAUTION), (0.99, GOOD)),
        ),
        Panel(
            "stat",
            "Requests shed",
            "Share of the requests of the last 5 minutes that valves answered with 429 or 503.",
            (
                Query(
                    f"sum(rate(kvpilot_shed_total{{{SELECT}}}[5m])) / "
                    f"(sum(rate(kvpilot_offered_total{{{SELECT}}}[5m])) > 0) or "
                    f"0 * sum(kvpilot_offered_total{{{SELECT}}})",
                    "shed",
                ),
            ),
            unit="percentunit",
            width=4,
            height=4,
            decimals=1,
            steps=((None, GOOD), (0.01, CAUTION), (0.1, BAD)),
        ),
        Panel(
            "stat",
            "Fullest KV pool",
            "Referenced KV blocks over all, in the rank where that is highest.",
            (Query(f"max(kvpilot_kv_used_ratio{{{SELECT}}})", "fullest"),),
            unit="percentunit",
            width=4,
            height=4,
            decimals=0,
            steps=((None, GOOD), (0.85, CAUTION), (0.97, BAD)),
        ),
        Panel(
            "stat",
            "Pilots held off",
            "Pilots that a person switched off: their engines fly on baselines.",
            (Query(f"sum(kvpilot_control_off{{{SELECT}}})", "off"),),
            unit="none",
            width=4,
            height=4,
            steps=((None, GOOD), (1, CAUTION)),
        ),
    ),
)

TRAFFIC = Row(
    "Traffic",
    (
        Panel(
            "lines",
            "Requests: offered, admitted, shed",
            "What reached the valves, what they let in, and what they turned away.",
            (
                Query(f"sum({_rate('kvpilot_offered_total')})", "offered", REFERENCE, width=1, dash=(6, 4)),
                Query(f"sum({_rate('kvpilot_shed_total')})", "shed", BAD, fill=25),
                Query(f"sum({_rate('kvpilot_admitted_total')})", "admitted", MEASURED, width=3),
            ),
            unit="reqps",
            least=0,
        ),
        Panel(
            "lines",
            "Goodput: tokens within $itl_target s",
            "Output tokens a second, and those of them that followed the one before within the target "
            "chosen above.",
            (
                Query(
                    f"sum({_rate('kvpilot_inter_token_latency_seconds_count')})",
                    "all tokens",
                    REFERENCE,
                    width=1,
                    dash=(6, 4),
                ),
                Query(ON_TIME, "on time", GOOD, fill=20),
            ),
            unit="suffix:tok/s",
            least=0,
        ),
    ),
)

WORST = Row(
    "Worst first",
    (
        Panel(
            "table",
            "Replicas, fullest first",
            "One row for each rank: how full it is, how much it sheds, how long tokens take, what waits.",
            (
                Query(f"sum by ({BY}) (kvpilot_kv_used_ratio{{{SELECT}}})"),
                Query(
                    f"histogram_quantile(0.95, sum by (le, {BY}) "
                    f"(rate(kvpilot_inter_token_latency_seconds_bucket{{{SELECT}}}[1m]))) >= 0"
                ),
                Query(
                    f"histogram_quantile(0.95, sum by (le, {BY}) "
                    f"(rate(kvpilot_time_to_first_token_seconds_bucket{{{SELECT}}}[1m]))) >= 0"
                ),
                Query(f"sum by ({BY}) (kvpilot_requests_waiting{{{SELECT}}})"),
                Query(f"sum by ({BY}) (rate(kvpilot_shed_total{{{SELECT}}}[1m]))"),
                Query(f"sum by ({BY}) (rate(kvpilot_preemptions_total{{{SELECT}}}[1m]))"),
            ),
            columns=(
                ("cluster", "Cluster", ""),
                ("engine", "Engine", ""),
                ("rank", "Rank", ""),
                ("Value #A", "KV used", "percentunit"),
                ("Value #B", "ITL p95", "s"),
                ("Value #C", "TTFT p95", "s"),
                ("Value #D", "Waiting", "none"),
                ("Value #E", "Shed/s", "reqps"),
                ("Value #F", "Preempted/s", "reqps"),
            ),
            sort="KV used",
            width=24,
            height=5,
        ),
        Panel(
            "bars",
            "Slowest: ITL p95",
            "The five ranks whose tokens take longest, over the last minute.",
            (
                Query(
                    f"topk(5, histogram_quantile(0.95, sum by (le, {BY}) "
                    f"(rate(kvpilot_inter_token_latency_seconds_bucket{{{SELECT}}}[1m]))) >= 0)",
                    "{{engine}} / {{rank}}",
                    HELD,
                ),
            ),
            unit="s",
            least=0,
            width=8,
            height=5,
        ),
        Panel(
            "bars",
            "Fullest: KV used",
            "The five fullest ranks.",
            (
                Query(
                    f"topk(5, sum by ({BY}) (kvpilot_kv_used_ratio{{{SELECT}}}))",
                    "{{engine}} / {{rank}}",
                    HELD,
                ),
            ),
            unit="percentunit",
            least=0,
            most=1,
            width=8,
            height=5,
        ),
        Panel(
            "bars",
            "Shedding most",
            "The five ranks that turn away most requests a second, over the last minute.",
            (
                Query(
                    f"topk(5, sum by ({BY}) (rate(kvpilot_shed_total{{{SELECT}}}[1m])))",
                    "{{engine}} / {{rank}}",
                    BAD,
                ),
            ),
            unit="reqps",
            least=0,
            width=8,
            height=5,
        ),
    ),
)

BOARD = Board(
    "fleet",
    "Fleet",
    "Are promises kept, by whom not, and what is turned away?",
    (NOW, TRAFFIC, WORST),
    targets=(
        Target("ttft_target", "First token within (s)", ("0.1", "0.2", "0.5", "1", "2.5", "5", "10"), "1"),
        Target("itl_target", "Token within (s)", ("0.01", "0.02", "0.03", "0.05", "0.1", "0.2"), "0.05"),
    ),
)
