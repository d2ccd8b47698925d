"""A generation request as the engine core sees it: plain state, no behaviour that needs a model.

The scheduler's block tables own `blocks`, `computed` and what follows from the prefix tree, the core owns
`tokens` and the times, the executor touches `draft_computed` only. `tokens` only ever grows: preemption
throws away computed positions, never a token. A request that carries beams (see `sched.beam`) is the
exception: it may take over another's text, and once it has brought its candidates all of its tokens are
computed.

Invariants between steps: `computed <= len(tokens) - 1` once anything was emitted, `blocks` covers
`computed - evicted` positions, and `draft_computed <= computed`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvengine.kv.eviction.heads import HeadTables
from kvengine.kv.eviction.policy import Eviction

if TYPE_CHECKING:
    from kvengine.sched.beam import BeamGroup


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop. Stop strings live with the text, in the API process."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    scored: bool = False
    """Whether to sum up the log-probability of what was chosen; such a request is not drafted for."""
    beams: int = 0
    """Width of its beam search, which is scored; 0 is sampling."""
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    """Of beams; see `sched.beam`. A string is "never"."""


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
    adapter: str = ""
    """What beside the model computes it; a part of its prefix namespace."""
    pin: bool = False
    """Whether its blocks stay in the prefix cache for good once it ends."""
    eviction: Eviction | None = None
    """How it gives up KV while it runs; None: it never does."""

    tokens: list[int] = field(init=False)
    """Prompt, then everything emitted."""
    rng: random.Random = field(init=False)
    forks: list["Request"] = field(default_factory=list)
    """Continuations of the same prompt that begin, on the same blocks, once it is computed; then empty."""
    parent: "Request | None" = None
    """Of a fork, until it begins."""
    group: "BeamGroup | None" = None
    """Whose beam it carries, or may."""
    blocks: list[int] = field(default_factory=list)
    """Block table: block `i` holds positions `i * block_size * packing` and on, after those evicted."""
    packing: int = 1
    """How many of its tokens lie where one of the pool's own precision would; given when it is admitted."""
    computed: int = 0
    """Positions whose KV is valid in the target's pool."""
    evicted: int = 0
    """Of them, those whose KV was given up again: whole blocks, so later ones keep their place in one."""
    rotated: int = 0
    """How many positions its sinks have been moved on by; the executor's."""
    heads: HeadTables | None = None
    """Where its KV lies, if it is kept head by head; the executor's."""
    block_mass: Sequence[float] = ()
    """Attention that each block of the table has drawn, where its eviction asks for that."""
    draft_computed: int = 0
    """The same in the draft model's pool."""
    registered: int = 0
    """Leading blocks that are, or were, in the prefix tree."""
    draft_registered: int = 0
    """Leading blocks that the tree knows to be valid in the draft model's pool too."""
    anchor: Any = None
    """Parent of the next block in the prefix tree; None if there is none to register under."""
    tail_shared: bool = False
    """Whether the block that it writes next may have other holders: then it is copied first."""
    recompute_until: int = 0
    """Positions below this were computed once already, before a preemption."""
    admission: int = 0
    """Sequence number of the latest admission; orders the running requests of one class."""
    served_step: int = 0
    """Latest step that computed something for it."""
    preemptions: int = 0
    first_scheduled_ns: int = 0
    """0 until first admitted."""
    first_emitted_ns: int = 0
    last_emitted_ns: int = 0
    """Both are 0 until the first token."""
    logprob: float = 0.0
    """Of all that was emitted, if its sampling asks for a score."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.rng = random.Random(self.sampling.seed)

    def add_forks(self, forks: list["Request"]) -> None:
        """Before it is accepted: others that continue the same prompt."""
        self.forks = forks
        for fork in forks:
            fork.parent = self

    @property
    def stored(self) -> int:
        """Positions whose KV it holds."""
        return self.computed - self.evicted

    @property
    def promised(self) -> int:
        """Sequences that are to run beside it, once it has computed what they share."""
        return len(self.forks) if self.group is None else self.group.promised(self)

    @property
    def output_count(self) -> int:
        """Tokens emitted so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def output_left(self) -> int:
        """Tokens it may still emit."""
        return self.sampling.max_tokens - self.output_count
