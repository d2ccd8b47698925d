"""What KV in fewer bits costs in quality and saves in memory, on the shipped model.

`python bench/kv_quality.py [--quick] [--json]`

Held-out text of both domains, 200 and 2,000 tokens at a time, goes through the engine's own forward pass once
a precision; every position attends to KV as that precision stored it. `nll_delta` is nats a token more than
fp32; `top1_agreement` the share of positions whose likeliest next token is fp32's. Bars are on the worst of
the four. Then eviction, see `evicted.py`: 47 tokens after a prompt of 2,000 of which each policy keeps 400,
against full KV, with the prompt in chunks of 128 and whole. The model is small (`parameters`): what larger
ones lose is not measured here.

fp8 stands just above its bar: 0.991 where int8 has 0.995. e4m3 rounds each value by a share of itself, and
under the scales of heads alone it is 0.98 (`fp8_frontier.py`); what takes it over is a scale for each token
and head, searched for the least error, of which one byte is stored. `compression` counts those bytes.
"""

import argparse
import random
from typing import Any

import evicted
import frame
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kvengine.config import SHIPPED_TARGET
from kvengine.kv.precisions import FULL, Precisions, scale_bytes
from kvengine.kv.storage import KvStorage
from kvengine.model import weights
from kvengine.model.config import ModelConfig
from kvengine.model.domains import DOMAINS, prompt
from kvengine.model.llama import Llama, Span
from kvkernels.precision import FP8
from kvkernels.scratch import Scratch

BLOCK_SIZE = 16
LENGTHS = (200, 2000)
CHUNK = 128
WINDOWS = {200: 30, 2000: 8}
QUICK_WINDOWS = {200: 10, 2000: 3}
REFERENCE_BITS = 16
LEVELS = {"bf16": FULL, "fp8": Precisions(eight=FP8), "int8": FULL, "int4": FULL}


class Scorer:
    """The engine's forward pass over one text at a time, at any precision. Scales live as long as it does."""

    def __init__(self, model: Llama, precisions: Precisions) -> None:
        geometry = model.geometry(BLOCK_SIZE)
        blocks = geometry.blocks_for(model.max_tokens)
        self._model, self._precisions = model, precisions
        self.storage = KvStorage(model.config.layers, blocks, geometry, "cpu", precisions)
        self._scratch = Scratch.for_geometries([geometry], model.max_tokens, torch.device("cpu"))
        self._rng = random.Random(5)

    @torch.inference_mode()
    def logits(self, tokens: list[int], packing: int) -> Tensor:
        """Of every position; prefilled in chunks, as an engine does."""
        blocks = self._rng.sample(
            range(len(self.storage.memory[0])), -(-len(tokens) // (BLOCK_SIZE * packing))
        )
        parts = []
        for start in range(0, len(tokens), CHUNK):
            piece = tokens[start : start + CHUNK]
            span = Span(piece, start, blocks, len(piece), packing)
            parts.append(self._model.forward([span], self.storage, self._scratch).clone())
        return torch.cat(parts)

    def bytes_per_token(self, packing: int) -> float:
        """What the pool really gives a token."""
        return self.storage.block_bytes / self.storage.at(packing).geometry.block_size


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[frame.Bar]]:
    torch.set_num_threads(1)
    config = ModelConfig.load(SHIPPED_TARGET)
    model = Llama(config, weights.load(SHIPPED_TARGET, config))
    windows = QUICK_WINDOWS if arguments.quick else WINDOWS
    texts = {
        (domain, length): [
            list(prompt(domain, length + 1, 9000 + i).encode()) for i in range(windows[length])
        ]
        for domain in DOMAINS
        for length in LENGTHS
    }
    rows = {name: compare(model, name, texts) for name in LEVELS}
    evictions = evicted.compare(model, evicted.texts(windows[2000]))
    h2o_dropped = min(cell["dropped"] for cell in evictions["h2o"].values())
    exact = config.kv_bytes_per_token * REFERENCE_BITS / 32
    bars = [
        *(
            frame.Bar(f"{name}_compression", exact / rows[name]["bytes_per_token"], 1.9)
            for name in ("fp8", "int8")
        ),
        *(frame.Bar(f"{name}_top1", rows[name]["worst_top1"], 0.99) for name in ("int8", "fp8")),
        frame.Bar("h2o_dropped", h2o_dropped, 0.79),
    ]
    results = {}
    for name, row in rows.items():
        results[f"{name}_bytes_per_token"] = row["bytes_per_token"]
        results[f"{name}_compression"] = exact / row["bytes_per_token"]
        results |= {f"{name}_{cell}": values for cell, values in row["cells"].items()}
    for name, cells in evictions.items():
        results |= {f"{name}_{cell}": values for cell, values in cells.items()}
    settings = {
        "model": "kvpilot-tiny",
        "parameters": config.parameters,
        "layers": config.layers,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "compression": f"against {REFERENCE_BITS} bits",
        "scale_bytes": scale_bytes(FULL, config.layers, config.kv_width),
        "windows": {str(length): count for length, count in windows.items()},
        "chunk": CHUNK,
    }
    return settings, results, bars


def compare(model: Llama, name: str, texts: dict[tuple[str, int], list[list[int]]]) -> dict[str, Any]:
    """One precision against fp32 on every text."""
    precisions = LEVELS[name]
    packing = next(32 // one.bits for one in precisions.offered if one.name == name)
    exact, stored = Scorer(model, FULL), Scorer(model, precisions)
    cells: dict[str, Any] = {}
    for (domain, length), windows in texts.items():
        losses, agreed = [], []
        for window in windows:
            tokens, following = window[:-1], torch.tensor(window[1:])
            a, b = exact.logits(tokens, 1), stored.logits(tokens, packing)
            losses.append((cross_entropy(a, following).item(), cross_entropy(b, following).item()))
            agreed.append((a.argmax(-1) == b.argmax(-1)).float().mean().item())
        full, less = (sum(column) / len(losses) for column in zip(*losses, strict=True))
        cells[f"{domain}_{length}"] = {
            "nll": full,
            "nll_delta": less - full,
            "top1_agreement": sum(agreed) / len(agreed),
        }
    worst = min(cell["top1_agreement"] for cell in cells.values())
    return {"cells": cells, "worst_top1": worst, "bytes_per_token": stored.bytes_per_token(packing)}


if __name__ == "__main__":
    frame.run("kv_quality", 1, measure, __doc__ or "")
