"""What the hook costs a real vLLM's engine core: `python bench/vllm_overhead.py`.

Batches of 1 to 32 requests decode on one server while a pilot's leases are renewed ten times a second. The
cost is CPU time of the engine core's thread between the outside and the inside of our wraps: reading the
controls, applying knobs, counting, writing the record and the histograms. The share is over all steps of 4 ms
and more.

Needs vLLM's environment (`make vllm`). About three minutes; `--quick` one.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from frame import Bar, run
from vllm_lab.leases import Hold
from vllm_lab.load import Ask, prompt
from vllm_lab.load import run as send
from vllm_lab.server import Settings, VllmServer

ENVIRON_ROWS = "KVPILOT_BENCH_ROWS"
SCHEDULER = "vllm_lab.timed_scheduler.TimedAsyncScheduler"
BATCHES = (1, 8, 16, 32)
PROMPT_TOKENS = 100
SLOW_STEP_NS = 4_000_000


def steps(output_tokens: int) -> dict[int, list[tuple[int, int]]]:
    """(hook ns, step ns) of the steps of each batch size."""
    with tempfile.TemporaryDirectory(prefix="kvpilot-bench-") as folder:
        path = Path(folder) / "rows.json"
        settings = Settings(
            max_num_seqs=32,
            max_model_len=2048,
            blocks=2048,
            environ={ENVIRON_ROWS: str(path)},
            python_path=(Path(__file__).parent,),
            arguments=("--scheduler-cls", SCHEDULER),
        )
        with VllmServer(settings, Path(folder)) as server, Hold(server.place) as hold:
            hold.set(admission_watermark=0.95)
            for batch in BATCHES:
                asks = [Ask(prompt(PROMPT_TOKENS, number), output_tokens) for number in range(batch)]
                send(server.url, asks, at_once=batch)
            rows = json.loads(path.read_text())
    return {batch: [(hook, step) for requests, hook, step in rows if requests == batch] for batch in BATCHES}


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    tokens = 300 if arguments.quick else 900
    rows = steps(tokens)
    p50 = {batch: statistics.median(hook for hook, _ in rows[batch]) / 1e3 for batch in BATCHES}
    p99 = {batch: statistics.quantiles([h for h, _ in rows[batch]], n=100)[98] / 1e3 for batch in BATCHES}
    slow = [(hook, step) for batch in BATCHES for hook, step in rows[batch] if step >= SLOW_STEP_NS]
    share = sum(hook for hook, _ in slow) / sum(step for _, step in slow)
    results = {
        "hook_us_p50": {str(batch): round(value, 1) for batch, value in p50.items()},
        "hook_us_p99": {str(batch): round(value, 1) for batch, value in p99.items()},
        "us_per_sequence": (p50[BATCHES[-1]] - p50[1]) / (BATCHES[-1] - 1),
        "step_ms_p50": {
            str(batch): round(statistics.median(step for _, step in rows[batch]) / 1e6, 1)
            for batch in BATCHES
        },
        "steps": {str(batch): len(rows[batch]) for batch in BATCHES},
    }
    bars = [
        Bar("hook_us_p50", max(p50.values()), at_most=20),
        Bar("hook_share_of_step", share, at_most=0.005),
    ]
    return {"vllm": "0.32.0, CPU, eager", "batches": list(BATCHES), "output_tokens": tokens}, results, bars


if __name__ == "__main__":
    run("vllm_overhead", 1, measure, __doc__ or "")
