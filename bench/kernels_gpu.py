"""How near the Triton kernels come to what a GPU's memory gives. Needs a CUDA device; without one it says so.

`python bench/kernels_gpu.py [--quick] [--json]`

Decode attention reads KV once; its bandwidth is KV bytes over time, and the bar compares it with a plain copy
of as many bytes in the same run. fp8 reads half of what bf16 does: the bar is on the time at long context.
"""

import argparse
import random
import statistics
from collections.abc import Callable
from typing import Any

import frame
import torch

from kvengine.kv.precisions import Precisions
from kvengine.kv.storage import KvStorage, Stored
from kvkernels import attention
from kvkernels.geometry import Geometry, Span
from kvkernels.precision import BF16, FP8
from kvkernels.scratch import Scratch

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
BATCH, CONTEXT = 64, 16_384
QUICK_CONTEXT = 8_192
NO_DEVICE = "kernels_gpu needs a CUDA device, and torch sees none here: nothing was measured"


def prepared(packing: int, context: int) -> Stored:
    """A bf16 pool full of KV, seen at a packing; what the bytes mean does not matter to time."""
    geometry = Geometry(HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE)
    precisions = Precisions(BF16, FP8)
    blocks = BATCH * geometry.packed(packing).blocks_for(context)
    storage = KvStorage(1, blocks, geometry, "cuda", precisions)
    stored = storage.at(packing)
    scratch = Scratch(1 << 20, 128, torch.device("cuda"))
    slots = len(stored.tokens[0])
    for first in range(0, slots, 1 << 16):
        rows = torch.arange(first, min(slots, first + (1 << 16)), device="cuda")
        kv = torch.randn(len(rows), geometry.token_floats, device="cuda")
        stored.write(0, rows, kv, scratch)
    return stored


def attending(stored: Stored, context: int) -> Callable[[], None]:
    geometry = stored.geometry
    each = geometry.blocks_for(context)
    table = random.Random(1).sample(range(BATCH * each), BATCH * each)
    spans = [Span(row, 1, context, table[row * each : (row + 1) * each]) for row in range(BATCH)]
    query = torch.randn(BATCH, HEADS, HEAD_DIM, device="cuda")
    scratch = Scratch(1, 128, torch.device("cuda"))
    paged = attention.PagedAttention(
        spans, geometry, scratch, query, torch.empty_like(query), stored.precision
    )
    return lambda: paged.attend(stored.blocks[0], stored.scales(0), stored.fine(0))


def timed_ms(run: Callable[[], object]) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    run()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended)


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[frame.Bar]]:
    context = QUICK_CONTEXT if arguments.quick else CONTEXT
    repeats = 11 if arguments.quick else 51
    wide, narrow = prepared(1, context), prepared(2, context)
    source = torch.empty(wide.blocks[0].numel() // 2, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)  # a copy reads and writes: half the bytes each way
    runs = {
        "bf16": attending(wide, context),
        "fp8": attending(narrow, context),
        "copy": lambda: target.copy_(source),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 3):
        for name, run in runs.items():
            spent = timed_ms(run)
            if repeat >= 3:
                times[name].append(spent)
    # As many bytes cross the memory's pins in `copy` as in `bf16`.
    share = [a / b for a, b in zip(times["copy"], times["bf16"], strict=True)]
    gain = [a / b for a, b in zip(times["bf16"], times["fp8"], strict=True)]
    results = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    results["kv_bytes"] = wide.blocks[0].nbytes
    settings = {
        "device": torch.cuda.get_device_name(),
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "block_size": BLOCK_SIZE,
        "batch": BATCH,
        "context": context,
        "repeats": repeats,
    }
    bars = [
        frame.median_bar("decode_vs_copy_bandwidth", share, at_least=0.8),
        frame.median_bar("fp8_vs_bf16", gain, at_least=1.7),
    ]
    return settings, results, bars


def without_device(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[frame.Bar]]:
    """Nothing measured, nothing claimed: no bar."""
    return {"device": None}, {"skipped": NO_DEVICE}, []


if __name__ == "__main__":
    chosen = measure if torch.cuda.is_available() else without_device
    frame.run("kernels_gpu", 1, chosen, __doc__ or "")
