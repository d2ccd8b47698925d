"""What a request that gives up KV asks for: which policy, and how many tokens of each part. No torch.

A sequence keeps its first tokens (`sink`), its latest (`recent`) and, under `h2o`, those in between that have
drawn most attention (`heavy`). Sizes are tokens; storage rounds them to blocks.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

WINDOW, STREAMING, H2O, FASTGEN = "window", "streaming", "h2o", "fastgen"
POLICIES = (WINDOW, STREAMING, H2O, FASTGEN)
SINK_TOKENS = 4
RECOVERY = 0.95


class EvictionError(ValueError):
    """An eviction that means nothing; one line with the numbers."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """`recent` None: everything is kept until the knob `kv_kept_ratio` asks for less."""

    policy: str
    sink: int = SINK_TOKENS
    recent: int | None = None
    heavy: int = 0
    by_head: bool = False
    """Whether each KV head of each layer keeps tokens of its own; `fastgen` always does."""
    recovery: float = RECOVERY
    """`fastgen`: the share of its attention that a head's policy must keep."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise EvictionError(f"policy {self.policy!r} is unknown: choose one of {', '.join(POLICIES)}")
        for name in ("sink", "heavy"):
            if getattr(self, name) < 0:
                raise EvictionError(f"{name} is {getattr(self, name)}: must be at least 0")
        if self.recent is not None and self.recent < 1:
            raise EvictionError(f"recent is {self.recent}: must be at least 1")
        if self.heavy and self.policy in (WINDOW, STREAMING):
            raise EvictionError(
                f"heavy is {self.heavy}: policy {self.policy!r} keeps no heavy hitters; use h2o"
            )
        if self.by_head and self.policy in (WINDOW, STREAMING):
            raise EvictionError(
                f"by_head: every head keeps the same under policy {self.policy!r}; leave it out"
            )
        if self.heavy and self.recent is None:
            raise EvictionError(f"heavy is {self.heavy} and recent is not given: give both, or neither")
        if self.exact and self.recent is None:
            raise EvictionError(f"recent is not given: {self.policy!r} by head needs its sizes")
        if not 0 < self.recovery <= 1:
            raise EvictionError(f"recovery is {self.recovery:g}: a share, above 0 and at most 1")

    @property
    def kept(self) -> int | None:
        """Tokens that are kept at most; None: all of them."""
        return None if self.recent is None else self.sink + self.recent + self.heavy

    @property
    def exact(self) -> bool:
        """Whether tokens are chosen one by one and head by head, not block by block."""
        return self.by_head or self.policy == FASTGEN

    @property
    def scored(self) -> bool:
        """Whether it has to know which tokens draw attention."""
        return self.policy in (H2O, FASTGEN)

    @property
    def alone(self) -> bool:
        """Whether the sequence takes nothing from the prefix cache and puts nothing in.

        Scores follow from its own queries over all of its prompt, and rotated sinks are no prefix any more.
        """
        return self.scored or self.policy == STREAMING

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any] | None) -> "Eviction | None":
        return None if wire is None else cls(**wire)


UNDER_PRESSURE = Eviction(WINDOW)
"""Of a tenant that opted in: its first and latest tokens stay, and nothing goes before the knob asks."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What an engine can do for those who evict."""

    block_size: int
    heavy_hitters: bool = False
    """Whether its memory plan has room for scores."""
    precision: str = "fp32"
    """Of its KV pool."""
    stores_values: bool = True
    """Whether that precision stores values, and not codes that a scale gives meaning."""
    sliding_window: int | None = None
    """Of its model, which evicts by itself then."""

    def beam_refusal(self) -> str | None:
        """Why beams cannot be searched here: they come back on common blocks, which must all be there."""
        if self.sliding_window is None:
            return None
        return (
            f"This model attends to the latest {self.sliding_window} tokens only and gives up the others by "
            "itself: beam search needs them; leave use_beam_search out."
        )

    def refusal(self, eviction: Eviction, choices: int = 1) -> str | None:
        """Why it cannot be served here, in one line with the numbers; None if it can."""
        if eviction.exact and choices > 1:
            return (
                f"Eviction by head serves one choice, and {choices} are asked for: leave out n and best_of."
            )
        if self.sliding_window is not None:
            return (
                f"This model attends to the latest {self.sliding_window} tokens only and gives up the others "
                "by itself: leave the eviction out."
            )
        if eviction.recent is not None and eviction.recent < self.block_size:
            return (
                f"The eviction window is smaller than a block: recent is {eviction.recent} tokens and a "
                f"block holds {self.block_size}. Ask for at least {self.block_size}."
            )
        if eviction.scored and not self.heavy_hitters:
            return (
                f"Eviction policy {eviction.policy!r} needs scores, and this engine has no memory for them: "
                "start it with --heavy-hitters, or ask for 'window' or 'streaming'."
            )
        if (eviction.policy == STREAMING or eviction.exact) and not self.stores_values:
            what = "by head" if eviction.exact else "'streaming'"
            return f"Eviction {what} needs KV stored as values, and this engine's pool is {self.precision}."
        return None
