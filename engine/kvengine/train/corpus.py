"""Training and held-out windows of byte tokens, drawn from seeded text.

A window starts anywhere inside a document. Documents are separated by end and begin tokens, so both are
learned. The held-out text shares no seed (`json`) and no file (`python`) with the training text.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from kvengine.model.domains import log_lines, read_ascii, source_files
from kvengine.model.vocabulary import BOS_ID, EOS_ID

_LINES_A_LOG = 250
_TRAIN_LOGS = 64
_HELD_OUT_LOGS = 8


class Corpus:
    """One split of the text: domain -> one long token tensor."""

    def __init__(self, *, held_out: bool) -> None:
        self.streams = {
            "json": _join(_logs(held_out)),
            "python": _join(read_ascii(path) for path in source_files(held_out=held_out)),
        }

    def window(self, domain: str, rows: int, length: int, rng: random.Random) -> Tensor:
        """Random windows [rows, length + 1]: inputs and, shifted by one, targets."""
        stream = self.streams[domain]
        starts = [rng.randrange(len(stream) - length - 1) for _ in range(rows)]
        return torch.stack([stream[start : start + length + 1] for start in starts])

    def mixed(self, domains: tuple[str, ...], rows: int, length: int, rng: random.Random) -> Tensor:
        """Windows whose domains alternate by a seeded draw; a domain named twice is drawn twice as often."""
        return torch.cat([self.window(rng.choice(domains), 1, length, rng) for _ in range(rows)])


def _logs(held_out: bool) -> Iterable[str]:
    split, count = ("held-out", _HELD_OUT_LOGS) if held_out else ("train", _TRAIN_LOGS)
    for number in range(count):
        yield "".join(islice(log_lines(random.Random(f"{split}/{number}")), _LINES_A_LOG))


def _join(documents: Iterable[str]) -> Tensor:
    tokens: list[int] = []
    for document in documents:
        tokens += [BOS_ID, *document.encode("ascii"), EOS_ID]
    return torch.tensor(tokens, dtype=torch.int16).long()
