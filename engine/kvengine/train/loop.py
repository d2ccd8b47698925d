"""The optimisation loop: Muon on the matrices of the layers, AdamW on the rest, phases of growing windows.

Everything is drawn from one seed. With one thread the same Python and torch give the same weights; another
Python version has another standard library and so gives another, equally good pair.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvengine.train.corpus import Corpus
from kvengine.train.dense import DenseLlama

MUON_RATE = 0.02
ADAM_RATE = 3e-3
GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Phase:
    """`steps` optimiser steps on `rows` windows of `length` tokens; the rate falls from `start` to `end`."""

    steps: int
    rows: int
    length: int
    start: float
    end: float


class Optimizers:
    """Both optimisers behind one step, with one multiplier on both rates."""

    def __init__(self, model: DenseLlama) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
        self._muon = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.0, momentum=0.95)
        self._adam = torch.optim.AdamW(others, lr=ADAM_RATE, weight_decay=0.0, betas=(0.9, 0.95))
        self._parameters = [*matrices, *others]

    def step(self, multiplier: float) -> None:
        nn.utils.clip_grad_norm_(self._parameters, GRADIENT_NORM)
        for optimizer, rate in ((self._muon, MUON_RATE), (self._adam, ADAM_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = rate * multiplier
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def train(
    model: DenseLlama,
    corpus: Corpus,
    domains: tuple[str, ...],
    phases: tuple[Phase, ...],
    seed: int,
    say: Callable[[str], None],
    teacher: DenseLlama | None = None,
) -> None:
    """Run the phases in place. With a teacher the loss is taken against its distribution, not the text."""
    rng = random.Random(seed)
    optimizers = Optimizers(model)
    model.train()
    began_s = time.process_time()
    for number, phase in enumerate(phases, 1):
        total = 0.0
        for step in range(phase.steps):
            windows = corpus.mixed(domains, phase.rows, phase.length, rng)
            loss = _loss(model, windows, teacher)
            loss.backward()
            done = step / phase.steps
            optimizers.step(phase.start + (phase.end - phase.start) * done)
            total += loss.item()
            if (step + 1) % 50 == 0 or step + 1 == phase.steps:
                mean = total / (step % 50 + 1)
                used_s = time.process_time() - began_s
                say(f"phase {number}/{len(phases)} step {step + 1}: loss {mean:.3f}, {used_s:.0f} cpu s")
                total = 0.0
    model.eval()


def _loss(model: DenseLlama, windows: Tensor, teacher: DenseLlama | None) -> Tensor:
    inputs, targets = windows[:, :-1], windows[:, 1:]
    logits = model(inputs).flatten(0, 1)
    if teacher is None:
        return F.cross_entropy(logits, targets.flatten())
    with torch.no_grad():
        wanted = teacher(inputs).flatten(0, 1).softmax(-1)
    return F.cross_entropy(logits, wanted)
