"""Synthetic engines whose truth is known: step times with noise and hiccups, and batches that move."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvpilot.forecast.work import Work, WorkedStep


@dataclass
class Plant:
    """Step times: the mean of a known law, times lognormal noise, plus a 30 ms hiccup now and then."""

    sigma: float = 0.05
    seed: int = 1
    scale: float = 1.0
    kind: str = "gpu"
    hiccups: float = 0.002

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)

    def mean_s(self, work: Work) -> float:
        tokens = work.prefill + work.decodes + work.drafted
        depth = work.drafted / work.decodes if work.decodes else 0.0
        if (
            self.kind == "gpu"
        ):  # A roofline: the weights are read in 5.5 ms, a token's arithmetic takes 28 us.
            forward = ((28e-6 * tokens) ** 4 + 5.5e-3**4) ** 0.25
            seconds = 1.5e-3 + 8e-6 * work.decodes + forward + 49e-9 * work.context
            seconds += 1.31e-9 * work.chunk_positions + depth * (0.35e-3 + 2e-6 * work.decodes)
        else:
            seconds = 0.4e-3 + 0.2e-3 * work.decodes + 60e-6 * tokens + 0.2e-6 * work.context
            seconds += 5e-9 * work.chunk_positions + depth * (0.3e-3 + 20e-6 * work.decodes)
        return seconds * self.scale

    def step(self, work: Work) -> WorkedStep:
        seconds = self.mean_s(work) * math.exp(self._dice.gauss(0, self.sigma))
        return WorkedStep(work, seconds + (0.03 if self._dice.random() < self.hiccups else 0.0))


@dataclass
class Batches:
    """Steps of a server: decodes come and go, prompts are computed in chunks of `chunk`."""

    seed: int = 1
    chunk: int = 512
    drafts: int = 4
    decodes: int = 32
    prompts: float = 0.15
    """Chance that a step without a prompt begins one."""
    steady: bool = False
    """Nothing varies: the batch says nothing about what each of its parts costs."""
    _left: int = field(default=0, init=False)
    _position: int = field(default=0, init=False)
    _context: float = field(default=600.0, init=False)

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)

    def next(self) -> Work:
        dice = self._dice
        if self.steady:
            return Work(0, self.decodes, self.decodes * 600, 0, self.decodes * self.drafts)
        if not self._left and dice.random() < self.prompts:
            self._left, self._position = 1 + int(math.exp(dice.gauss(6.5, 1))), 0
        chunk = min(self._left, self.chunk)
        self._left -= chunk
        self._position += chunk
        if dice.random() < 0.05:
            self.decodes = max(1, min(128, self.decodes + dice.choice([-1, 1])))
        self._context = min(3000.0, max(100.0, self._context + dice.gauss(0, 3)))
        drafts = self.drafts if dice.random() < 0.9 else dice.randrange(self.drafts + 1)
        return Work(
            chunk,
            self.decodes,
            int(self.decodes * self._context),
            chunk * self._position,
            self.decodes * drafts,
        )


def ticks(plant: Plant, batches: Batches, steps: int, tick_s: float = 0.1) -> Iterator[list[WorkedStep]]:
    """`steps` steps, in lists of about a tick each."""
    batch: list[WorkedStep] = []
    passed_s = 0.0
    for _ in range(steps):
        batch.append(plant.step(batches.next()))
        passed_s += batch[-1].seconds
        if passed_s >= tick_s:
            yield batch
            batch, passed_s = [], 0.0
    yield batch
