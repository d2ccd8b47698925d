"""What is simulated: one engine's sizes and baselines, and the promises it is held to. Plain values.

Knob values here are baselines and, as in a real engine, the most that leases may ask for; the defaults are
vLLM 0.32's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from kvpilot.policy.context import Slo as PolicySlo
from kvpilot.score import Slo
from kvpilot.workload.client import Patience

USUAL_CLASSES = ("batch", "interactive")
"""Lowest first."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """One engine rank. Raises ValueError for sizes that cannot be."""

    blocks: int
    block_size: int = 16
    max_model_len: int = 8192
    step_token_budget: int = 2048
    prefill_chunk_tokens: int = 2048
    speculative_tokens: int = 0
    max_running: int = 256
    admission_watermark: float = 1.0
    admission: Literal["predicted", "held"] = "held"
    """What the watermark is of: blocks in use, or what runs is predicted to hold at its peak (the reference
    engine's own default)."""
    prefix_cache: bool = False
    classes: tuple[str, ...] = USUAL_CLASSES
    in_order: bool = True
    """Whether the engine serves the higher class first, or all as they come."""
    queue_caps: Mapping[str, int] = field(default_factory=dict)
    """By class: with so many waiting, whoever comes is turned away. For static settings; none by default."""
    memory_bytes: int = 80 * 2**30
    block_bytes: int = 2 * 2**20
    activation_bytes_per_token: int = 0
    """What the manifest says to the pilot; 0 where nothing is known."""
    headroom_bytes: int | None = None
    """Memory for steps: one that needs more fails, with all of its requests. None: never too little."""
    name: str = "virtual"

    def __post_init__(self) -> None:
        for name in ("blocks", "block_size", "max_model_len", "step_token_budget", "max_running"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 1 <= self.prefill_chunk_tokens <= self.step_token_budget:
            raise ValueError(
                f"prefill_chunk_tokens={self.prefill_chunk_tokens}: 1 to step_token_budget="
                f"{self.step_token_budget}"
            )
        if unknown := self.queue_caps.keys() - set(self.classes):
            raise ValueError(f"queue_caps: no class is called {', '.join(sorted(unknown))}")

    @property
    def pool_tokens(self) -> int:
        return self.blocks * self.block_size


@dataclass(frozen=True, slots=True)
class Promises:
    """What each class is promised, how its clients behave, and what an output token costs in prompt tokens
    (`r`).
    """

    slos: Mapping[str, Slo]
    patience: Mapping[str, Patience]
    r: float = 3.0

    def for_policies(self, classes: tuple[str, ...]) -> PolicySlo:
        """As policies see it: tightest over classes, by class, and of the lowest class (`Config.slo`)."""
        by_class = {name: {"itl": self.slos[name].itl_s, "ttft": self.slos[name].ttft_s} for name in classes}
        tightest = {key: min(each[key] for each in by_class.values()) for key in ("itl", "ttft")}
        return {**tightest, **by_class, "lowest": by_class[classes[0]]}


USUAL_PROMISES = Promises(
    slos={"interactive": Slo(2.0, 0.050, 0.0003), "batch": Slo(30.0, 0.200, 0.0003)},
    patience={"interactive": Patience(30.0, retries=2), "batch": Patience(120.0)},
)
"""Of a chat service with batch work behind it."""
