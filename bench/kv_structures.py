"""The prefix tree and block tables against vLLM's KVCacheManager, in one process and run.

3,000 requests of 64 tenants; each tenant's begin with the same 512 tokens, go on with 64 of their own and
generate 64 (blocks of 16, 16,384 of them, 16 requests at a time). Both keep tenants apart, vLLM by its
cache_salt; ours verifies the token ids of every hit, vLLM trusts a SHA-256. Times are CPU time of one thread;
`vs_vllm_requests` is the ratio of requests a second, all operations together. `append_us` is one more token.
`evict_growth` is the time to evict a block from 65,536 cached ones over that from 4,096.

Needs vLLM's environment (`make vllm`). About two minutes; `--quick` half a minute.
"""

import argparse
import json
import os
import statistics
import subprocess
from typing import Any

from frame import Bar, median_bar, run
from vllm_lab import environment

TREES = ("engine", "kernels", "sidecar", "bench")


def rows(count: int, repeats: int) -> dict[str, list[float]]:
    path = os.pathsep.join(str(environment.ROOT / tree) for tree in TREES)
    command = [str(environment.python()), "-m", "vllm_lab.structures", str(count), str(repeats)]
    environ = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    count, repeats = (1_000, 3) if arguments.quick else (3_000, 5)
    seen = rows(count, repeats)

    def ratios(over: str, under: str) -> list[float]:
        return [a / b for a, b in zip(seen[over], seen[under], strict=True)]

    settings = {"requests": count, "repeats": repeats, "vllm": environment.VLLM_VERSION, "block_size": 16}
    results = {name: statistics.median(values) for name, values in seen.items()}
    bars = [
        median_bar("vs_vllm_requests", ratios("ours_requests_per_s", "vllm_requests_per_s"), at_least=3.0),
        median_bar("append_us", seen["ours_append_us"], at_most=1.0),
        median_bar("evict_growth", ratios("evict_us_65536", "evict_us_4096"), at_most=1.3),
    ]
    return settings, results, bars


if __name__ == "__main__":
    run("kv_structures", 1, measure, __doc__ or "")
