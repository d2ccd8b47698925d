"""How fast is this plant? What loads and promises are relative to, so that they mean the same anywhere."""

from dataclasses import dataclass

from kvpilot.simulate.plants.plant import Features, Plant
from kvpilot.workload.arrival import Speed

BATCH = 128
CONTEXT_TOKENS = 1000
CHUNK_TOKENS = 2048
_STEPS = 9
"""Timed, for the median: a plant may be noisy."""


@dataclass(frozen=True, slots=True)
class Pace:
    """`step_s`: of `BATCH` sequences decoding at `CONTEXT_TOKENS` each."""

    step_s: float
    prompt_token_s: float
    """In a chunk of `CHUNK_TOKENS` and nothing else."""

    @property
    def speed(self) -> Speed:
        """Load 1.0 is a second of it every second. Its `r` is what an output token costs in prompt tokens."""
        return Speed(1 / self.prompt_token_s, BATCH / self.step_s)


def pace(plant: Plant) -> Pace:
    """Uses up some of the plant's dice: measure a plant of its own, not one that is going to fly."""
    decode = Features(0, BATCH, BATCH * CONTEXT_TOKENS)
    prompt = Features(CHUNK_TOKENS, 0, 0, CHUNK_TOKENS**2)
    return Pace(_median_s(plant, decode), _median_s(plant, prompt) / CHUNK_TOKENS)


def _median_s(plant: Plant, step: Features) -> float:
    return sorted(plant.step_seconds(step) for _ in range(_STEPS))[_STEPS // 2]
