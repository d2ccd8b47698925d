"""The step record of a vLLM engine core, kept in packed form: a step touches what moved.

What moves in every step comes first and is packed as one.
"""

from collections.abc import Sequence
from operator import add

from kvpilot.inside.hook import StepHook
from kvpilot.inside.vllm.scan import DEMAND_FIELDS

EVERY_STEP = (
    "time_ns",
    "duration_ns",
    "steps_total",
    "decode_tokens_total",
    "decode_sequences_total",
    "context_tokens_total",
    "running",
    "waiting",
    "kv_blocks_free",
    "kv_blocks_cached",
)
_NOW_AND_THEN = (
    "prefill_tokens_total",
    "chunk_positions_total",
    "waiting_prompt_tokens",
    "kv_limited_steps_total",
    "budget_limited_steps_total",
    "kv_blocks_shared",
    "blocks_step",
    "tail_waste_tokens",
    "preemptions_total",
    "recomputed_tokens_total",
    "finished_total",
    "cancelled_total",
    "failed_total",
    "prefix_tokens_queried_total",
    "prefix_tokens_hit_total",
)
_DRAFTED = ("draft_rounds_total", "drafted_tokens_total", "accepted_tokens_total", "rejected_rounds_total")
_DEMAND = ("demand_step", *DEMAND_FIELDS)

FIELDS = (*EVERY_STEP, *_DRAFTED, *_NOW_AND_THEN, *_DEMAND)
"""Everything that can be filled, in record order; a scheduler that hides something leaves fields out."""


class Record:
    """`fields`: those of FIELDS that the manifest lists, in that order; one that is left out takes values and
    shows them nowhere. Raises ValueError for a disabled hook.
    """

    def __init__(self, hook: StepHook, fields: Sequence[str]) -> None:
        packed = hook.packed_step()
        if packed is None:
            raise ValueError("a hook that is disabled has no record")
        self.packed = packed
        self.set_head = packed.setter(*EVERY_STEP)
        """Sets the fields of EVERY_STEP."""
        self._values = dict.fromkeys(_NOW_AND_THEN, 0)
        self._set = {name: packed.setter(name) for name in _NOW_AND_THEN if name in fields}
        self._drafted = (0,) * len(_DRAFTED)
        self._set_drafted = packed.setter(*_DRAFTED)
        self._set_demand = packed.setter(*_DEMAND) if "demand_step" in fields else None

    def get(self, name: str) -> int:
        """The value of a field that does not move in every step."""
        return self._values[name]

    def put(self, name: str, value: int) -> None:
        """Replace one."""
        self._values[name] = value
        if name in self._set:
            self._set[name](value)

    def add(self, name: str, amount: int) -> None:
        """Add to one."""
        if amount:
            self.put(name, self._values[name] + amount)

    def add_drafted(self, found: tuple[int, ...]) -> None:
        """Add rounds, drafts, accepted and rejected ones, in the order of their fields."""
        self._drafted = tuple(map(add, self._drafted, found))
        self._set_drafted(*self._drafted)

    def put_demand(self, step: int, demand: tuple[float, ...]) -> None:
        """KV demand ahead, as seen at `step`."""
        if self._set_demand is not None:
            self._set_demand(step, *demand)
