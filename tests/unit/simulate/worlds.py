"""A linear plant, arrivals of a seed, and short runs, for tests of virtual time."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvpilot.score import Slo
from kvpilot.simulate.deployment import Deployment, Promises
from kvpilot.simulate.plants.plant import StepFeatures
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.client import Patience

SHIPPED = Path(__file__).parents[3] / "policies"
SMALL = Deployment(blocks=400, max_model_len=2048, speculative_tokens=3, max_running=32)
PROMISES = Promises(
    {"batch": Slo(4.0, 0.1), "interactive": Slo(0.5, 0.03)},
    {"batch": Patience(30.0), "interactive": Patience(8.0, retries=2)},
)


@dataclass
class Linear:
    """Seconds and bytes for each thing that a step does."""

    step_s: float = 0.002
    prompt_token_s: float = 66e-6
    sequence_s: float = 150e-6
    draft_s: float = 60e-6
    position_bytes: float = 0.0

    def step_seconds(self, features: StepFeatures) -> float:
        return (
            self.step_s
            + self.prompt_token_s * features.prefill_tokens
            + self.sequence_s * features.decode_sequences
            + self.draft_s * features.drafted_tokens
        )

    def activation_bytes(self, features: StepFeatures) -> int:
        return round(self.position_bytes * features.chunk_positions)


def arrivals(seed: int, seconds: float, per_s: float, longest: int = 1200) -> list[Arrival]:
    """A third of them long and patient."""
    dice, made, at_s = random.Random(seed), list[Arrival](), 0.0
    while (at_s := at_s + dice.expovariate(per_s)) < seconds:
        batch = dice.random() < 0.3
        prompt = min(longest, max(1, round(dice.lognormvariate(6.0 if batch else 4.5, 0.6))))
        output = max(1, round(dice.lognormvariate(4.0, 0.5)))
        klass = "batch" if batch else "interactive"
        tenant, domain = dice.choice(("acme", "globex")), dice.choice(("json", "python"))
        made.append(Arrival(at_s, prompt, output, klass, tenant, domain, dice.getrandbits(31)))
    return made


def small(**changes: Any) -> Deployment:
    return replace(SMALL, **changes)
