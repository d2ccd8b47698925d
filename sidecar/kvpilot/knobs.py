"""The knob catalogue: what kvpilot may move in an engine, and which way is safe.

A knob's minimum, maximum, baseline and granularity come from an engine's manifest alone; this catalogue says
what the name means everywhere. `protective` is the direction in which memory and latency get safer: where two
rules of equal priority disagree, the more protective value wins, and only a person may be less protective.
"""

from dataclasses import dataclass
from typing import Literal

Protective = Literal["lower", "higher"]
Where = Literal["engine", "valve"]


@dataclass(frozen=True, slots=True)
class Knob:
    """One row: `plausible` bounds what a policy may ask for anywhere; a manifest narrows it."""

    name: str
    unit: str
    plausible: tuple[float, float]
    protective: Protective
    where: Where
    scoped: bool
    """Whether a lease may name a class or tenant; an unscoped knob takes scope `all` only."""
    meaning: str


KNOBS: dict[str, Knob] = {
    knob.name: knob
    for knob in (
        Knob(
            "step_token_budget",
            "tokens",
            (1, 1_048_576),
            "lower",
            "engine",
            False,
            "Most tokens of any kind (prompt, decode, draft) that one step computes.",
        ),
        Knob(
            "prefill_chunk_tokens",
            "tokens",
            (1, 1_048_576),
            "lower",
            "engine",
            False,
            "Most prompt tokens that one step computes; the manifest says whether per step or per request.",
        ),
        Knob(
            "speculative_tokens",
            "tokens",
            (0, 64),
            "lower",
            "engine",
            False,
            "Draft tokens proposed per sequence and step; 0 turns speculation off.",
        ),
        Knob(
            "max_running",
            "requests",
            (1, 65_536),
            "lower",
            "engine",
            False,
            "Most requests that hold KV memory at once; lowering it drains, it never preempts.",
        ),
        Knob(
            "admission_watermark",
            "ratio",
            (0.05, 1.0),
            "lower",
            "engine",
            False,
            "Share of the KV pool that may be in use when a waiting request is admitted.",
        ),
        Knob(
            "kv_element_bits",
            "bits",
            (2, 32),
            "lower",
            "engine",
            False,
            "Bits of each KV element of newly admitted sequences; those that run keep theirs.",
        ),
        Knob(
            "kv_kept_ratio",
            "ratio",
            (0.05, 1.0),
            "lower",
            "engine",
            False,
            "Share of its KV tokens that a sequence keeps, where its tenant opted in to eviction.",
        ),
        Knob(
            "shed_fraction",
            "ratio",
            (0.0, 1.0),
            "higher",
            "valve",
            True,
            "Share of arriving requests in scope that the valve answers with 429.",
        ),
        Knob(
            "admission_credits",
            "tokens",
            (0, 2**30),
            "lower",
            "valve",
            True,
            "Prompt tokens in scope that the valves accept until the pilot's next tick; the rest gets 429.",
        ),
        Knob(
            "prompt_bytes_per_token",
            "bytes",
            (0.25, 1024),
            "lower",
            "valve",
            False,
            "Bytes of a request's body that cost one token of admission credits; the pilot measures it.",
        ),
    )
}
