"""Does the model use its context? The same held-out bytes, scored with little text before them and with much.

Scoring the same bytes both ways leaves the difference to the context alone: text drawn separately for each
position would differ by more than what is measured. O(windows x full length).
"""

import random

import torch
from torch import Tensor
from torch.nn import functional as F

from kvengine.train.corpus import Corpus
from kvengine.train.dense import DenseLlama

NEAR = range(100, 160)
FAR = range(1500, 1980)
"""Positions: eight stretches as long as NEAR, at 1,500 to 2,000."""


@torch.no_grad()
def near_and_far(
    model: DenseLlama, corpus: Corpus, domain: str, windows: int, seed: int
) -> tuple[float, float]:
    """Mean nats a byte of the same bytes at positions NEAR and at positions FAR."""
    rng = random.Random(seed)
    near = far = 0.0
    for _ in range(windows):
        window = corpus.window(domain, 1, FAR.stop, rng)[0]
        starts = range(FAR.start - NEAR.start, FAR.stop - NEAR.start, len(NEAR))
        short = torch.stack([window[start : start + NEAR.stop + 1] for start in starts])
        near += _losses(model, short)[:, NEAR.start :].mean().item()
        far += _losses(model, window.unsqueeze(0))[:, FAR.start :].mean().item()
    return near / windows, far / windows


def _losses(model: DenseLlama, windows: Tensor) -> Tensor:
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
