"""A KV pool of requests whose truth is known: they come, are taken in, emit a token a step, and end."""

import math
import random
from dataclasses import dataclass, field

from kvpilot.forecast.estimate import Estimate
from kvpilot.inside.lengths import LengthPredictor
from kvpilot.link.fields import HORIZONS

BLOCK = 16
STEP_S = 0.02


@dataclass
class Sequence:
    prompt: int
    output: int
    tenant: str
    generated: int = 0

    @property
    def blocks(self) -> int:
        return -(-(self.prompt + self.generated) // BLOCK)


@dataclass
class Pool:
    """Nothing limits what is held: `held` may exceed any pool, so that the time of an exhaustion is seen.

    Two tenants: short answers and long ones.
    """

    seed: int
    arrivals_per_s: float = 6.0
    serves_per_s: float = 8000.0
    """Prompt tokens taken in per second."""
    running: list[Sequence] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)
    step: int = 0
    served: float = 0.0

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)
        self._budget = 0.0
        outputs = [self._new().output for _ in range(1000)]
        self.mean_output = sum(outputs) / len(outputs)
        self.lengths = LengthPredictor(2048)
        for _ in range(400):
            one = self._new()
            self.lengths.observe(one.output, one.tenant)

    def _new(self) -> Sequence:
        dice = self._dice
        tenant, middle = ("chat", 80) if dice.random() < 0.7 else ("report", 600)
        output = min(2048, max(1, int(middle * math.exp(dice.gauss(0, 0.6)))))
        return Sequence(max(4, int(200 * math.exp(dice.gauss(0, 0.7)))), output, tenant)

    @property
    def at_s(self) -> float:
        return self.step * STEP_S

    @property
    def held(self) -> int:
        return sum(one.blocks for one in self.running)

    def waiting_tokens(self) -> float:
        return float(sum(one.prompt for one in self.waiting))

    def advance(self) -> None:
        dice = self._dice
        chance = self.arrivals_per_s * STEP_S
        self.waiting += [self._new() for _ in range(int(chance) + (dice.random() < chance % 1))]
        self._budget = min(self._budget, 0.0) + self.serves_per_s * STEP_S
        while self.waiting and self._budget > 0:
            one = self.waiting.pop(0)
            self._budget -= one.prompt
            self.served += one.prompt
            self.running.append(one)
        for one in self.running:
            one.generated += 1
        for one in self.running:
            if one.generated >= one.output:
                self.lengths.observe(one.output, one.tenant)
        self.running = [one for one in self.running if one.generated < one.output]
        self.step += 1

    def ahead(self) -> list[tuple[float, Estimate]]:
        """What an engine would publish."""
        held = [(one.prompt + one.generated, one.generated, one.tenant) for one in self.running]
        demands = self.lengths.demand(held, BLOCK, HORIZONS)
        return [(float(h), Estimate(*demand)) for h, demand in zip(HORIZONS, demands, strict=True)]
