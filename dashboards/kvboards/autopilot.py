"""Autopilot: what the pilot holds, why, what came of it, and how it flies itself."""

from kvboards.board import SELECT, Board, Row, Variable
from kvboards.palette import BAD, CAUTION, EXPECTED, GOOD, HELD, MEASURED, REFERENCE, REST, SHADOW
from kvboards.panels import QUANTILES, Panel, Query, bands

KNOB = f'{SELECT}, knob=~"$knob"'

_VERDICTS = (
    ("applied", "applied", GOOD),
    ("shadowed|suspended", "shadowed or suspended", SHADOW),
    ("clamped|overruled|rate_limited|cooling_down", "held back", CAUTION),
    ("missing_input|inconclusive", "input missing", REFERENCE),
    ("unconfirmed|unsupported|rejected_by_engine|lease_expired|undone", "refused, expired, undone", BAD),
)


def _new(metric: str) -> str:
    """What a counter grew by since the last point, its first appearance included (`increase` misses that)."""
    return f"sum(clamp_min({metric} - ({metric} offset $__interval or {metric} * 0), 0))"


_STATES = " or ".join(
    f'kvpilot_rule_state{{{SELECT}, state="{state}"}} * {number}'
    for number, state in ((1, "pending"), (2, "active"), (3, "leaving"))
)

_STIRRED = (
    "max by (policy, rule) "
    f'(max_over_time(kvpilot_rule_state{{{SELECT}, state!="inactive"}}[$__range] @ end()))'
)
"""`@ end()`: the whole of the time shown, at each of its points, and worked out once."""

KNOBS = Row(
    "Knobs",
    (
        Panel(
            "lines",
            "$knob",
            "In force, against its baseline; purple: what shadowed rules would have it at.",
            (
                Query(f"max by (engine, rank) (kvpilot_knob_value{{{KNOB}}})", "in force", MEASURED, width=3),
                Query(f"max(kvpilot_knob_baseline{{{KNOB}}})", "baseline", REFERENCE, width=1, dash=(6, 4)),
                Query(
                    f'min(kvpilot_rule_claim_value{{{KNOB}, shadow="true"}})',
                    "shadow",
                    SHADOW,
                    dash=(2, 4),
                    sparse=True,
                ),
            ),
            least=0,
            repeat="knob",
            width=8,
            height=7,
        ),
        Panel(
            "states",
            "Leases held",
            "Which knobs are held away from baseline. Renewed every tick: gone seconds after the pilot.",
            (
                Query(
                    f"max by (knob, scope) (kvpilot_lease_remaining_seconds{{{SELECT}}} > bool 0)",
                    "{{knob}} ({{scope}})",
                ),
            ),
            mapping=(("1", "held", MEASURED), ("0", "run out", BAD)),
            width=12,
            height=7,
        ),
        Panel(
            "lines",
            "Least time left on a lease",
            "Falls from its full length only while the pilot does not renew.",
            (Query(f"min(kvpilot_lease_remaining_seconds{{{SELECT}}})", "least", MEASURED, fill=15),),
            unit="s",
            least=0,
            width=12,
            height=7,
        ),
    ),
)

RULES = Row(
    "Rules and decisions",
    (
        Panel(
            "states",
            "Rules that stirred",
            "The state of each rule that left `inactive` within the time shown.",
            (
                Query(
                    f"max by (policy, rule) ({_STATES}) and on (policy, rule) ({_STIRRED} > 0)",
                    "{{policy}} / {{rule}}",
                ),
            ),
            mapping=(
                ("0", "inactive", REST),
                ("1", "pending", CAUTION),
                ("2", "active", MEASURED),
                ("3", "leaving", HELD),
            ),
            width=24,
            height=9,
            link=("Runbooks of the policies", "${docs}/policies.md"),
        ),
        Panel(
            "lines",
            "Decisions by verdict",
            "New decisions in each interval: taken, shadowed, held back by a guard, without an input, "
            "or refused.",
            tuple(
                Query(
                    _new(f'kvpilot_control_decisions_total{{{SELECT}, verdict=~"{verdicts}"}}'),
                    legend,
                    color,
                    bars=True,
                    stack=True,
                    sparse=True,
                )
                for verdicts, legend, color in _VERDICTS
            ),
            link=("Why, decision by decision", "${console}"),
            unit="short",
            least=0,
            decimals=0,
        ),
        Panel(
            "lines",
            "Shadow against actual: decisions in all",
            "What rules did, and what shadowed rules would have done, since the pilots started.",
            (
                Query(
                    f'sum(kvpilot_control_decisions_total{{{SELECT}, verdict="applied"}})',
                    "applied",
                    GOOD,
                    width=3,
                ),
                Query(
                    f'sum(kvpilot_control_decisions_total{{{SELECT}, verdict="shadowed"}})',
                    "shadowed",
                    SHADOW,
                    dash=(2, 4),
                ),
            ),
            unit="short",
            least=0,
        ),
    ),
)

EFFECTS = Row(
    "What came of it",
    (
        Panel(
            "table",
            "Expected against realised, newest judged change of each rule",
            "By how much the input that a rule watches was to change, and by how much it did: "
            "-10 % is a fall.",
            (
                Query(f"max by (policy, rule, input) (kvpilot_control_effect_expected_ratio{{{SELECT}}})"),
                Query(f"max by (policy, rule, input) (kvpilot_control_effect_realised_ratio{{{SELECT}}})"),
            ),
            columns=(
                ("policy", "Policy", ""),
                ("rule", "Rule", ""),
                ("input", "Input", ""),
                ("Value #A", "Expected", "percentunit"),
                ("Value #B", "Realised", "percentunit"),
            ),
            needs="judged",
            no_value="No change was judged yet",
        ),
        Panel(
            "lines",
            "Changes judged",
            "New judgements in each interval: the effect came, did not come, or could not be told.",
            (
                Query(
                    _new(f'kvpilot_control_effects_total{{{SELECT}, outcome="came"}}'),
                    "came",
                    GOOD,
                    bars=True,
                    stack=True,
                    sparse=True,
                ),
                Query(
                    _new(f'kvpilot_control_effects_total{{{SELECT}, outcome="did_not_come"}}'),
                    "did not come",
                    BAD,
                    bars=True,
                    stack=True,
                    sparse=True,
                ),
                Query(
                    _new(f'kvpilot_control_effects_total{{{SELECT}, outcome="inconclusive"}}'),
                    "inconclusive",
                    REFERENCE,
                    bars=True,
                    stack=True,
                    sparse=True,
                ),
            ),
            unit="short",
            least=0,
            decimals=0,
            needs="judged",
        ),
        Panel(
            "lines",
            "Time to exhaustion",
            "p50 between one chance in ten of sooner and of later; 60 s means none in sight.",
            (
                Query(
                    f"clamp_max(min(kvpilot_kv_time_to_exhaustion_seconds{{{SELECT}}}), 60)", "p50", EXPECTED
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
            "Wait of a request that comes now",
            "Forecast until it is admitted, in the class for which that is longest: p50 and p90. "
            "60 s stands for anything longer.",
            (
                Query(
                    f"clamp_max(max(kvpilot_forecast_queue_wait_seconds{{{SELECT}}}), 60)", "p50", EXPECTED
                ),
                Query(
                    f"clamp_max(max(kvpilot_forecast_queue_wait_p90_seconds{{{SELECT}}}), 60)",
                    "p90",
                    CAUTION,
                    width=1,
                    dash=(6, 4),
                ),
            ),
            unit="s",
            least=0,
        ),
    ),
)

ITSELF = Row(
    "The pilot itself",
    (
        Panel(
            "lines",
            "Tick lateness",
            "How late ticks begin; at 100 ms one is missed.",
            bands(QUANTILES, f"kvpilot_control_tick_lateness_seconds_bucket{{{SELECT}}}"),
            unit="s",
            least=0,
            width=8,
            height=7,
        ),
        Panel(
            "lines",
            "Tick duration",
            "What one tick takes, from looking to acting.",
            bands(QUANTILES, f"kvpilot_control_tick_duration_seconds_bucket{{{SELECT}}}"),
            unit="s",
            least=0,
            width=8,
            height=7,
        ),
        Panel(
            "lines",
            "Ticks missed and failed; alerts waiting",
            "All three should be 0.",
            (
                Query(
                    f"sum(rate(kvpilot_control_ticks_missed_total{{{SELECT}}}[$__rate_interval]))",
                    "missed/s",
                    CAUTION,
                ),
                Query(
                    f"sum(rate(kvpilot_control_ticks_failed_total{{{SELECT}}}[$__rate_interval]))",
                    "failed/s",
                    BAD,
                    width=3,
                    dash=(6, 4),
                ),
                Query(
                    f"sum(kvpilot_webhook_queue_length{{{SELECT}}})",
                    "alerts waiting",
                    MEASURED,
                    width=1,
                    dash=(2, 4),
                ),
            ),
            unit="short",
            least=0,
            soft_most=1,
            width=8,
            height=7,
        ),
    ),
)

BOARD = Board(
    "autopilot",
    "Autopilot",
    "What the pilot holds, why, what came of it, and how it flies itself.",
    (KNOBS, RULES, EFFECTS, ITSELF),
    (Variable("knob", "Knob", 'label_values(kvpilot_knob_value{engine=~"$engine"}, knob)'),),
)
