"""GPU: who holds its memory, what part nobody can explain, and what its driver complains of."""

from kvboards.board import SELECT, Board, Row, Variable
from kvboards.palette import BAD, CAUTION, GOOD, HELD, MEASURED, OTHERS, REFERENCE, REST
from kvboards.panels import Panel, Query

GPU = f'{SELECT}, gpu=~"$gpu"'

_PARTS = (
    ("weights", HELD, 80),
    ("kv", MEASURED, 65),
    ("activations", GOOD, 65),
    ("context", REFERENCE, 50),
    ("others", OTHERS, 60),
    ("fragmentation", CAUTION, 80),
    ("unexplained", BAD, 90),
)

MEMORY = Row(
    "Memory",
    (
        Panel(
            "lines",
            "Device memory: who holds it",
            "Used memory as NVML counts it, divided: weights, KV pool, activations, what the allocator "
            "wastes, the CUDA context, other processes - and what none of these explains.",
            (
                *(
                    Query(
                        f'sum(kvpilot_gpu_memory_part_bytes{{{GPU}, part="{part}"}})',
                        part,
                        color,
                        width=0,
                        fill=fill,
                        stack=True,
                        sparse=True,
                    )
                    for part, color, fill in _PARTS
                ),
                Query(
                    f"sum(kvpilot_gpu_memory_total_bytes{{{GPU}}})", "all", REFERENCE, width=1, dash=(6, 4)
                ),
            ),
            unit="bytes",
            least=0,
            width=16,
            height=9,
            needs="gpu",
        ),
        Panel(
            "bars",
            "Unexplained, worst device first",
            "Used memory that no account explains; it should stay below 2 % of the device.",
            (
                Query(
                    f'topk(8, max by (gpu) (kvpilot_gpu_memory_part_bytes{{{GPU}, part="unexplained"}}))',
                    "{{gpu}}",
                    BAD,
                ),
            ),
            unit="bytes",
            least=0,
            width=8,
            height=9,
            needs="gpu",
        ),
    ),
)

WORK = Row(
    "Work and power",
    (
        Panel(
            "lines",
            "Busy",
            "Share of time in which a kernel ran, and in which memory was read or written.",
            (
                Query(f"avg(kvpilot_gpu_utilisation_ratio{{{GPU}}})", "kernels", MEASURED, fill=15),
                Query(
                    f"avg(kvpilot_gpu_memory_utilisation_ratio{{{GPU}}})",
                    "memory",
                    HELD,
                    width=2,
                    dash=(6, 4),
                ),
            ),
            unit="percentunit",
            least=0,
            most=1,
            width=8,
            needs="gpu",
        ),
        Panel(
            "lines",
            "Power",
            "Drawn, against the limit in force.",
            (
                Query(f"sum(kvpilot_gpu_power_watts{{{GPU}}})", "drawn", MEASURED, fill=15),
                Query(
                    f"sum(kvpilot_gpu_power_limit_watts{{{GPU}}})", "limit", REFERENCE, width=1, dash=(6, 4)
                ),
            ),
            unit="watt",
            least=0,
            width=8,
            needs="gpu",
        ),
        Panel(
            "lines",
            "Clocks",
            "Of the multiprocessors and of the memory, slowest device.",
            (
                Query(f"min(kvpilot_gpu_sm_clock_hertz{{{GPU}}})", "multiprocessors", MEASURED),
                Query(f"min(kvpilot_gpu_memory_clock_hertz{{{GPU}}})", "memory", HELD, width=2, dash=(6, 4)),
            ),
            unit="hertz",
            least=0,
            width=8,
            needs="gpu",
        ),
    ),
)

HEALTH = Row(
    "Health",
    (
        Panel(
            "states",
            "Why clocks are held back",
            "Reasons that the driver gives now, and in the time shown.",
            (
                Query(
                    f"max by (reason) (kvpilot_gpu_throttle{{{GPU}}}) and on (reason) "
                    f"(max by (reason) (max_over_time(kvpilot_gpu_throttle{{{GPU}}}[$__range] @ end())) > 0)",
                    "{{reason}}",
                ),
            ),
            mapping=(("0", "no", REST), ("1", "held back", CAUTION)),
            no_value="Clocks were not held back",
            width=8,
            needs="gpu",
        ),
        Panel(
            "lines",
            "Temperature",
            "Of the hottest chip.",
            (Query(f"max(kvpilot_gpu_temperature_celsius{{{GPU}}})", "hottest", MEASURED, fill=10),),
            unit="celsius",
            least=0,
            width=8,
            needs="gpu",
        ),
        Panel(
            "lines",
            "Errors: ECC and XID",
            "Errors in all: corrected ones come, an uncorrected one or an XID is a reason to drain the node.",
            (
                Query(
                    f'sum(kvpilot_gpu_ecc_errors_total{{{GPU}, kind="corrected"}})',
                    "ECC corrected",
                    CAUTION,
                    dash=(6, 4),
                    sparse=True,
                ),
                Query(
                    f'sum(kvpilot_gpu_ecc_errors_total{{{GPU}, kind="uncorrected"}})',
                    "ECC uncorrected",
                    BAD,
                    width=3,
                    sparse=True,
                ),
                Query(
                    f"sum(kvpilot_gpu_xid_events_total{{{GPU}}}) or 0 * sum(kvpilot_gpu_info{{{GPU}}})",
                    "XID",
                    BAD,
                    width=1,
                    dash=(2, 4),
                ),
            ),
            unit="short",
            least=0,
            decimals=0,
            width=8,
            needs="gpu",
        ),
    ),
)

BOARD = Board(
    "gpu",
    "GPU",
    "Who holds the device's memory, how hard it works, and what its driver complains of.",
    (MEMORY, WORK, HEALTH),
    (Variable("gpu", "GPU", 'label_values(kvpilot_gpu_info{engine=~"$engine"}, gpu)'),),
)
