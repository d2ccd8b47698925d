"""What e4m3 KV could keep of the output, by how finely and how well its scales are chosen.

`python bench/fp8_frontier.py [--quick] [--json]`

What the engine does is `searched_256`, by a table in place of trying all out (`kvkernels.fine`); before it
had one scale for K and one for V of each head and layer. Here each alternative rounds KV on its way into a
pool of fp32, so that only the rounding differs; text, chunks and measures are those of
`kv_quality.py`, on fewer windows. `top1` is the worst of the four agreements with fp32, `kl_nats` the mean
divergence at 2,000 tokens, `compression` is against 16 bits with side information counted.

What it shows: e4m3 rounds each value by a share of itself, 2.6 % root mean square, whatever the scale. So no
amount of finer scales by head or channel helps, nor taking means off, nor turning the basis (`hadamard`);
int8, at the same bytes, is more exact because KV has few outliers. What helps is a scale for each token and
head that is *searched* within its octave for the least error, at 4 to 8 bits a vector.
"""

import argparse
from collections.abc import Callable
from typing import Any

import frame
import torch
from kv_quality import LENGTHS, REFERENCE_BITS, Scorer
from torch import Tensor

from kvengine.config import SHIPPED_TARGET
from kvengine.kv.precisions import FULL
from kvengine.kv.storage import Stored
from kvengine.model import weights
from kvengine.model.config import ModelConfig
from kvengine.model.domains import DOMAINS, prompt
from kvengine.model.llama import Llama
from kvkernels.precision import FP8, INT8, Precision
from kvkernels.scratch import Scratch

WINDOWS = {200: 12, 2000: 4}
QUICK_WINDOWS = {200: 4, 2000: 1}
ROOM = {FP8: 4.0, INT8: 1.2}
"""A scale reaches this much further than the largest of the first values. The engine's grow instead, so that
nothing is clipped; to e4m3 more room costs nothing, as float codes are as exact two octaves down.
"""
LIMIT = FP8.limit or 0.0

Rounding = Callable[[int, Tensor], Tensor]
"""(layer, [tokens, 2, kv_heads, head_dim]) to what is kept of it."""


def e4m3(codes: Tensor) -> Tensor:
    return codes.clamp(-LIMIT, LIMIT).to(torch.float8_e4m3fn).float()


class Calibrated:
    """What the first tokens of each layer set, once."""

    def __init__(self, found: Callable[[Tensor], Tensor]) -> None:
        self._found = found
        self._by_layer: dict[int, Tensor] = {}

    def __call__(self, layer: int, kv: Tensor) -> Tensor:
        if layer not in self._by_layer:
            self._by_layer[layer] = self._found(kv)
        return self._by_layer[layer]


def by(dimensions: tuple[int, ...], precision: Precision = FP8) -> Calibrated:
    """A scale shared over these dimensions."""
    factor = ROOM[precision] / (precision.limit or 1.0)
    return Calibrated(lambda kv: kv.abs().amax(dimensions, keepdim=True) * factor)


def scaled(dimensions: tuple[int, ...]) -> Rounding:
    scales = by(dimensions)
    return lambda layer, kv: e4m3(kv / scales(layer, kv)) * scales(layer, kv)


def centred() -> Rounding:
    """Less the mean of each channel: of K that changes no attention, of V it is added to the result."""
    means, scales = Calibrated(lambda kv: kv.mean(0, keepdim=True)), by((0, 3))

    def rounded(layer: int, kv: Tensor) -> Tensor:
        mean = means(layer, kv)
        scale = scales(layer, kv - mean)
        return e4m3((kv - mean) / scale) * scale + mean

    return rounded


def turned(dim: int) -> Rounding:
    """Every channel a sum over all of them, with signs: no outliers, and no structure either."""
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix, inner = matrix / dim**0.5, scaled((0, 3))
    return lambda layer, kv: inner(layer, kv @ matrix) @ matrix.T


def by_token(layer: int, kv: Tensor) -> Tensor:
    scale = kv.abs().amax(3, keepdim=True).clamp_min(1e-30) / LIMIT
    return e4m3(kv / scale) * scale


def searched(steps: int) -> Rounding:
    """Of so many scales within an octave, for each vector the one that errs least."""
    scales = by((0, 3))

    def rounded(layer: int, kv: Tensor) -> Tensor:
        best, least = kv, torch.full((*kv.shape[:3], 1), torch.inf)
        for step in range(steps):
            scale = scales(layer, kv) * 2 ** (step / steps)
            tried = e4m3(kv / scale) * scale
            error = (tried - kv).square().sum(3, keepdim=True)
            best = torch.where(error < least, tried, best)
            least = torch.minimum(error, least)
        return best

    return rounded


def integers() -> Rounding:
    limit = INT8.limit or 0.0
    scales = by((0, 3), INT8)
    return lambda layer, kv: (kv / scales(layer, kv)).round().clamp(-limit, limit) * scales(layer, kv)


class Rounded:
    """A pool of fp32 into which KV goes as something else would have kept it."""

    def __init__(self, stored: Stored, shape: tuple[int, int, int], rounding: Rounding) -> None:
        self._stored, self._shape, self._rounding = stored, shape, rounding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)

    def write(self, layer: int, slots: Tensor, kv: Tensor, scratch: Scratch) -> None:
        kept = self._rounding(layer, kv.unflatten(1, self._shape))
        self._stored.write(layer, slots, kept.flatten(1), scratch)


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[frame.Bar]]:
    torch.set_num_threads(1)
    config = ModelConfig.load(SHIPPED_TARGET)
    model = Llama(config, weights.load(SHIPPED_TARGET, config))
    windows = QUICK_WINDOWS if arguments.quick else WINDOWS
    cells = {
        (domain, length): [list(prompt(domain, length, 9000 + i).encode()) for i in range(windows[length])]
        for domain in DOMAINS
        for length in LENGTHS
    }
    schemes: dict[str, tuple[Rounding, float]] = {
        "scale_by_head": (scaled((0, 3)), 0),
        "scale_by_channel": (scaled((0,)), 0),
        "mean_off": (centred(), 0),
        "hadamard": (turned(config.head_dim), 0),
        "scale_by_token": (by_token, 8),
        "searched_16": (searched(16), 4),
        "searched_64": (searched(64), 6),
        "searched_256": (searched(256), 8),
        "int8": (integers(), 0),
    }
    shape = (2, config.kv_heads, config.head_dim)
    exact = Scorer(model, FULL)
    references = {cell: [exact.logits(text, 1) for text in texts] for cell, texts in cells.items()}
    results = {
        name: {
            "compression": REFERENCE_BITS / (FP8.bits + side_bits / config.head_dim),
            **closeness(model, shape, rounding, cells, references),
        }
        for name, (rounding, side_bits) in schemes.items()
    }
    settings = {
        "model": "kvpilot-tiny",
        "parameters": config.parameters,
        "head_dim": config.head_dim,
        "windows": {str(length): count for length, count in windows.items()},
    }
    return settings, results, []


def closeness(
    model: Llama,
    shape: tuple[int, int, int],
    rounding: Rounding,
    cells: dict[tuple[str, int], list[list[int]]],
    references: dict[tuple[str, int], list[Tensor]],
) -> dict[str, float]:
    """To fp32, on the same texts."""
    scorer = Scorer(model, FULL)
    # Scorer and forward pass stay what they are: only what is written changes.
    scorer.storage._stored[1] = Rounded(scorer.storage.at(1), shape, rounding)  # type: ignore[assignment]
    agreements, divergences = [], []
    for (domain, length), texts in cells.items():
        pairs = list(zip(references[domain, length], (scorer.logits(text, 1) for text in texts), strict=True))
        agreed = [(a.argmax(-1) == b.argmax(-1)).float().mean().item() for a, b in pairs]
        agreements.append(sum(agreed) / len(agreed))
        if length == max(LENGTHS):
            divergences += [divergence(a, b) for a, b in pairs]
    return {"top1": min(agreements), "kl_nats": sum(divergences) / len(divergences)}


def divergence(exact: Tensor, other: Tensor) -> float:
    """Kullback-Leibler, mean over positions."""
    difference = exact.log_softmax(-1) - other.log_softmax(-1)
    return (exact.softmax(-1) * difference).sum(-1).mean().item()


if __name__ == "__main__":
    frame.run("fp8_frontier", 1, measure, __doc__ or "")
