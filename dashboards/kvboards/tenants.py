"""Tenants: who holds memory, who asks, and who is turned away. Small multiples: names have no colours."""

from kvboards.board import SELECT, Board, Row, Variable
from kvboards.palette import BAD, CAUTION, HELD, MEASURED, REFERENCE
from kvboards.panels import Panel, Query

TENANT = f'{SELECT}, tenant=~"$tenant"'
HELD_BLOCKS = f"sum by (tenant) (rate(kvpilot_tenant_kv_block_seconds_total{{{TENANT}}}[1m]))"
POOL = f"scalar(sum(kvpilot_kv_pool_blocks{{{SELECT}}}))"

MOST = Row(
    "Most first",
    (
        Panel(
            "bars",
            "KV memory held",
            "Share of all KV blocks, mean of the last minute. A block that tenants share counts for each.",
            (
                Query(
                    f"topk(8, {HELD_BLOCKS}) / {POOL}",
                    "{{tenant}}",
                    HELD,
                ),
            ),
            unit="percentunit",
            least=0,
            most=1,
            width=8,
        ),
        Panel(
            "bars",
            "Tokens a second",
            "Computed for each tenant, over the last minute.",
            (
                Query(
                    f"topk(8, sum by (tenant) (rate(kvpilot_tenant_tokens_total{{{TENANT}}}[1m])))",
                    "{{tenant}}",
                    MEASURED,
                ),
            ),
            unit="suffix:tok/s",
            least=0,
            width=8,
        ),
        Panel(
            "bars",
            "Requests shed",
            "Turned away, of what each tenant offered in the last 5 minutes.",
            (
                Query(
                    f"topk(8, sum by (tenant) (rate(kvpilot_tenant_shed_total{{{TENANT}}}[5m])) / "
                    f"(sum by (tenant) (rate(kvpilot_tenant_offered_total{{{TENANT}}}[5m])) > 0))",
                    "{{tenant}}",
                    BAD,
                ),
            ),
            unit="percentunit",
            least=0,
            most=1,
            width=8,
        ),
        Panel(
            "table",
            "All tenants, largest holder first",
            "At most 20 tenants are told apart; (other) is the rest, (none) callers that nobody named.",
            (
                Query(f"sum by (tenant) (kvpilot_tenant_kv_blocks{{{TENANT}}})"),
                Query(HELD_BLOCKS),
                Query(f"sum by (tenant) (kvpilot_tenant_running{{{TENANT}}})"),
                Query(f"sum by (tenant) (kvpilot_tenant_waiting{{{TENANT}}})"),
                Query(f"sum by (tenant) (rate(kvpilot_tenant_offered_total{{{TENANT}}}[1m]))"),
                Query(f"sum by (tenant) (rate(kvpilot_tenant_shed_total{{{TENANT}}}[1m]))"),
            ),
            columns=(
                ("tenant", "Tenant", ""),
                ("Value #A", "KV blocks now", "none"),
                ("Value #B", "KV blocks, mean", "short"),
                ("Value #C", "Running", "none"),
                ("Value #D", "Waiting", "none"),
                ("Value #E", "Offered/s", "reqps"),
                ("Value #F", "Shed/s", "reqps"),
            ),
            sort="KV blocks, mean",
            width=24,
            height=8,
        ),
    ),
)

EACH = Row(
    "Each tenant",
    (
        Panel(
            "lines",
            "$tenant: KV held",
            "KV blocks that the tenant's running requests hold.",
            (Query(f"sum(kvpilot_tenant_kv_blocks{{{TENANT}}})", "KV blocks", HELD, fill=25),),
            unit="short",
            least=0,
            repeat="tenant",
            width=6,
            height=6,
        ),
        Panel(
            "lines",
            "$tenant: requests",
            "Offered, and shed of them, a second.",
            (
                Query(
                    f"sum(rate(kvpilot_tenant_offered_total{{{TENANT}}}[$__rate_interval]))",
                    "offered",
                    REFERENCE,
                    width=1,
                    dash=(6, 4),
                ),
                Query(
                    f"sum(rate(kvpilot_tenant_shed_total{{{TENANT}}}[$__rate_interval]))",
                    "shed",
                    BAD,
                    fill=40,
                ),
            ),
            unit="reqps",
            least=0,
            repeat="tenant",
            width=6,
            height=6,
        ),
    ),
)

CLASSES = Row(
    "Each class",
    (
        Panel(
            "lines",
            "$class: requests",
            "What the valves were offered, let in and turned away.",
            (
                Query(
                    f'sum(rate(kvpilot_offered_total{{{SELECT}, class=~"$class"}}[$__rate_interval]))',
                    "offered",
                    REFERENCE,
                    width=1,
                    dash=(6, 4),
                ),
                Query(
                    f'sum(rate(kvpilot_admitted_total{{{SELECT}, class=~"$class"}}[$__rate_interval]))',
                    "admitted",
                    MEASURED,
                ),
                Query(
                    f'sum(rate(kvpilot_shed_total{{{SELECT}, class=~"$class"}}[$__rate_interval]))',
                    "shed",
                    BAD,
                    fill=40,
                ),
            ),
            unit="reqps",
            least=0,
            repeat="class",
            width=12,
            height=7,
        ),
        Panel(
            "lines",
            "$class: waiting",
            "Requests accepted and not admitted.",
            (
                Query(
                    f'sum(kvpilot_requests_waiting{{{SELECT}, class=~"$class"}})', "waiting", CAUTION, fill=30
                ),
            ),
            unit="short",
            least=0,
            repeat="class",
            width=12,
            height=7,
        ),
    ),
)

BOARD = Board(
    "tenants",
    "Tenants",
    "Who holds memory, who asks, and who is turned away.",
    (MOST, EACH, CLASSES),
    (
        Variable("tenant", "Tenant", 'label_values(kvpilot_tenant_offered_total{engine=~"$engine"}, tenant)'),
        Variable("class", "Class", 'label_values(kvpilot_requests_waiting{engine=~"$engine"}, class)'),
    ),
)
