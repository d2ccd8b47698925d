"""A generation request as the engine core sees it: plain state, no behaviour that needs a model.

The scheduler owns `blocks` and `computed`, the core owns `tokens` and the times, the executor touches
`draft_computed` only. `tokens` only ever grows: preemption throws away computed positions, never a token.

Invariants between steps: `computed <= len(tokens) - 1` once anything was emitted, `blocks` covers `computed`
positions, and `draft_computed <= computed`.
"""

import random
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop. Stop strings live with the text, in the API process."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False


@dataclass(slots=True, eq=False)
class Request:
    """One request from arrival to its end. Compared by identity."""

    id: int
    prompt: list[int]
    sampling: SamplingParams
    klass: int = 0
    """Class level, 0 the lowest."""
    tenant: str | None = None
    arrived_ns: int = 0
    """When the API process received it (monotonic clock of this machine)."""

    tokens: list[int] = field(init=False)
    """Prompt, then everything emitted."""
    rng: random.Random = field(init=False)
    blocks: list[int] = field(default_factory=list)
    """Block table: block `i` holds positions `i * block_size` and on."""
    computed: int = 0
    """Positions whose KV is valid in the target's pool."""
    draft_computed: int = 0
    """The same in the draft model's pool."""
    recompute_until: int = 0
    """Positions below this were computed once already, before a preemption."""
    admission: int = 0
    """Sequence number of the latest admission; orders the running requests of one class."""
    served_step: int = 0
    """Latest step that computed something for it."""
    preemptions: int = 0
    first_scheduled_ns: int = 0
    """0 until first admitted."""
    last_emitted_ns: int = 0
    """0 until the first token."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.rng = random.Random(self.sampling.seed)

    @property
    def output_count(self) -> int:
        """Tokens emitted so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def output_left(self) -> int:
        """Tokens it may still emit."""
        return self.sampling.max_tokens - self.output_count
