"""What reading KV in fewer bits costs a decode step on a CPU, against fp32.

`python bench/kv_decode_cpu.py [--quick] [--json]`

Paged decode attention of one layer in the shipped model's shape over shuffled blocks, one thread, CPU time.
Both sides gather in groups, and fp32 is taken at the better of two group budgets. Precisions take turns
within a repeat; ratios are formed there, and bars stand on their medians.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import frame
import torch

from kvengine.config import SHIPPED_TARGET
from kvengine.kv.precisions import FULL, Precisions
from kvengine.kv.storage import KvStorage, Stored
from kvengine.model.config import ModelConfig
from kvkernels.cpu import DecodeGroup, grouped
from kvkernels.geometry import GATHER_BYTES, Geometry, Span
from kvkernels.precision import FP8
from kvkernels.scratch import Scratch, indices

BLOCK_SIZE = 16
SHAPES = [(8, 256), (32, 256), (32, 1024), (8, 2000)]
BARRED = (32, 1024)
MODES = {"bf16": (FULL, 2), "fp8": (Precisions(eight=FP8), 4), "int8": (FULL, 4), "int4": (FULL, 8)}
CALLS = 6
Run = Callable[[], None]


def prepared(geometry: Geometry, precisions: Precisions, packing: int, batch: int, context: int) -> Stored:
    """A pool of written KV: random, in no particular order."""
    blocks = batch * geometry.packed(packing).blocks_for(context)
    storage = KvStorage(1, blocks, geometry, "cpu", precisions)
    storage.claim(packing, range(blocks))
    stored = storage.at(packing)
    scratch = Scratch.for_geometries([geometry], 2048, torch.device("cpu"))
    slots = len(stored.tokens[0])
    for first in range(0, slots, 1024):
        rows = indices(list(range(first, min(slots, first + 1024))), torch.device("cpu"))
        stored.write(0, rows, torch.randn(len(rows), geometry.token_floats), scratch)
    return stored


def attending(stored: Stored, batch: int, context: int, gather_bytes: int = GATHER_BYTES) -> Run:
    """A layer's attention as a step calls it, with what a step makes once already made."""
    geometry = stored.geometry
    each = geometry.blocks_for(context)
    table = random.Random(1).sample(range(batch * each), batch * each)
    spans = [Span(row, 1, context, table[row * each : (row + 1) * each]) for row in range(batch)]
    query = torch.randn(batch, geometry.heads, geometry.head_dim)
    scratch = Scratch.for_geometries([geometry], 2048, torch.device("cpu"))
    out = torch.empty_like(query)
    groups = [
        DecodeGroup(group, geometry, scratch, query, out, stored.precision)
        for group in grouped(spans, geometry, gather_bytes)
    ]
    fresh = query.clone()

    def run() -> None:
        query.copy_(fresh)  # codes use it up
        for group in groups:
            group.attend(stored.blocks[0], stored.scales(0), stored.fine(0))

    return run


def timed_ms(run: Run) -> float:
    begun = time.thread_time()
    for _ in range(CALLS):
        run()
    return (time.thread_time() - begun) * 1e3 / CALLS


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[frame.Bar]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ModelConfig.load(SHIPPED_TARGET)
    geometry = Geometry(config.heads, config.kv_heads, config.head_dim, BLOCK_SIZE)
    repeats = 9 if arguments.quick else 31
    results: dict[str, Any] = {}
    bars: list[frame.Bar] = []
    for batch, context in [BARRED] if arguments.quick else SHAPES:
        own = prepared(geometry, FULL, 1, batch, context)
        runs = {
            "fp32": attending(own, batch, context),
            "fp32_small_groups": attending(own, batch, context, GATHER_BYTES // 3),
        }
        for name, (precisions, packing) in MODES.items():
            runs[name] = attending(prepared(geometry, precisions, packing, batch, context), batch, context)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(repeats + 1):
            order = list(runs)
            random.Random(repeat).shuffle(order)
            for name in order:
                spent = timed_ms(runs[name])
                if repeat:  # the first one warms up
                    times[name].append(spent)
        best = min(("fp32", "fp32_small_groups"), key=lambda name: statistics.median(times[name]))
        for name, values in times.items():
            results[f"{name}_ms_b{batch}_{context}"] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
        for name in MODES:
            ratios = [a / b for a, b in zip(times[name], times[best], strict=True)]
            if name == "int8" and (batch, context) == BARRED:
                bars.append(frame.median_bar("int8_vs_fp32_time", ratios, at_most=1.2))
            results[f"{name}_vs_fp32_b{batch}_{context}"] = statistics.median(ratios)
    settings = {
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "block_size": BLOCK_SIZE,
        "block_tables": "shuffled",
        "threads": 1,
        "bar": f"batch {BARRED[0]}, context {BARRED[1]}",
        "repeats": repeats,
    }
    return settings, results, bars


if __name__ == "__main__":
    frame.run("kv_decode_cpu", 1, measure, __doc__ or "")
