"""What the hook costs a real vLLM's engine core: `python bench/vllm_overhead.py`.

Batches of 1 to 32 requests decode on one server while a pilot's leases are renewed ten times a second. The
cost is CPU time of the engine core's thread between the outside and the inside of our wraps: reading the
controls, applying knobs, counting, writing the record and the histograms. A second server without a hook,
whose wraps do nothing, says what the stopwatch costs; its median is taken off. The share is over all steps of
4 ms and more. Beside it stands what vLLM's own scheduling takes in the same steps, on the same caches.

Needs vLLM's environment (`make vllm`). About four minutes; `--quick` two.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from frame import Bar, run
from vllm_lab.leases import Hold
from vllm_lab.load import Ask, prompt
from vllm_lab.load import run as send
from vllm_lab.server import Settings, VllmServer

ENVIRON_ROWS = "KVPILOT_BENCH_ROWS"
HOOKED = "vllm_lab.timed_scheduler.TimedAsyncScheduler"
STOPWATCH = "vllm_lab.timed_scheduler.StopwatchAlone"
BATCHES = (1, 8, 16, 32)
PROMPT_TOKENS = 100
SLOW_STEP_NS = 4_000_000


class Row(NamedTuple):
    """One step, in ns: of the hook, of vLLM's own scheduling, and since the step before."""

    hook: float
    own: float
    step: float


def steps(output_tokens: int, hooked: bool) -> dict[int, list[Row]]:
    """The steps of each batch size."""
    with tempfile.TemporaryDirectory(prefix="kvpilot-bench-") as folder:
        path = Path(folder) / "rows.json"
        settings = Settings(
            max_num_seqs=32,
            max_model_len=2048,
            blocks=2048,
            link=hooked,
            drop_in=hooked,
            environ={ENVIRON_ROWS: str(path)},
            python_path=(Path(__file__).parent,),
            arguments=("--scheduler-cls", HOOKED if hooked else STOPWATCH),
        )
        with VllmServer(settings, Path(folder)) as server, ExitStack() as stack:
            if hooked:
                stack.enter_context(Hold(server.place)).set(admission_watermark=0.95)
            for batch in BATCHES:
                asks = [Ask(prompt(PROMPT_TOKENS, number), output_tokens) for number in range(batch)]
                send(server.url, asks, at_once=batch)
            rows = json.loads(path.read_text())
    return {batch: [Row(*row) for requests, *row in rows if requests == batch] for batch in BATCHES}


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    tokens = 300 if arguments.quick else 900
    stopwatch = {
        batch: statistics.median(row.hook for row in rows) for batch, rows in steps(tokens, False).items()
    }
    rows = {
        batch: [row._replace(hook=row.hook - stopwatch[batch]) for row in found]
        for batch, found in steps(tokens, True).items()
    }

    def median(batch: int, name: str, unit_ns: float) -> float:
        return statistics.median(getattr(row, name) for row in rows[batch]) / unit_ns

    def each(name: str, unit_ns: float) -> dict[str, float]:
        return {str(batch): round(median(batch, name, unit_ns), 1) for batch in BATCHES}

    slow = [row for found in rows.values() for row in found if row.step >= SLOW_STEP_NS]
    share = sum(row.hook for row in slow) / sum(row.step for row in slow)
    worst_us = max(median(batch, "hook", 1e3) for batch in BATCHES)
    results = {
        "hook_us_p50": each("hook", 1e3),
        "hook_us_p99": {
            str(batch): round(statistics.quantiles([row.hook for row in found], n=100)[98] / 1e3, 1)
            for batch, found in rows.items()
        },
        "us_per_sequence": (median(BATCHES[-1], "hook", 1e3) - median(1, "hook", 1e3)) / (BATCHES[-1] - 1),
        "vllm_scheduling_us_p50": each("own", 1e3),
        "stopwatch_us_p50": {str(batch): round(ns / 1e3, 1) for batch, ns in stopwatch.items()},
        "step_ms_p50": each("step", 1e6),
        "steps": {str(batch): len(found) for batch, found in rows.items()},
    }
    bars = [Bar("hook_us_p50", worst_us, at_most=20), Bar("hook_share_of_step", share, at_most=0.005)]
    return {"vllm": "0.32.0, CPU, eager", "batches": list(BATCHES), "output_tokens": tokens}, results, bars


if __name__ == "__main__":
    run("vllm_overhead", 1, measure, __doc__ or "")
