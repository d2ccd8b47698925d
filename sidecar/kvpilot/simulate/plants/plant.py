"""What virtual time asks of a plant: how long a step takes, and how much memory it needs while it runs.

A step is described by the fields of the link's step record, without their `_total`: differences of those
totals over one step. So the same plant serves a batch that a scheduler has just built and a record that an
engine wrote yesterday.
"""

from typing import NamedTuple, Protocol

from kvpilot.clock import NS
from kvpilot.link.records import StepRecord


class StepFeatures(Protocol):
    """What one step computes, in tokens."""

    @property
    def prefill_tokens(self) -> float:
        """Prompt tokens."""
        ...

    @property
    def decode_sequences(self) -> float:
        """Sequences that decode, a token each."""
        ...

    @property
    def context_tokens(self) -> float:
        """KV positions that decoding sequences read."""
        ...

    @property
    def chunk_positions(self) -> float:
        """Sum over prompt chunks of length times last position."""
        ...

    @property
    def drafted_tokens(self) -> float:
        """Draft tokens proposed, and verified in the same step."""
        ...


class Features(NamedTuple):
    """`StepFeatures` as plain numbers."""

    prefill_tokens: float = 0.0
    decode_sequences: float = 0.0
    context_tokens: float = 0.0
    chunk_positions: float = 0.0
    drafted_tokens: float = 0.0


class TimedStep(NamedTuple):
    """One step of a recording: what it computed, and how long that took."""

    features: Features
    seconds: float


class Plant(Protocol):
    """One engine's forward pass. Holds its own seeded noise: one instance for one run."""

    def step_seconds(self, features: StepFeatures) -> float:
        """How long this step takes, noise included. Above 0."""
        ...

    def activation_bytes(self, features: StepFeatures) -> int | None:
        """What the step allocates beside weights and KV on one device; None where nothing says."""
        ...


NEEDED = ("duration_ns", "steps_total", "prefill_tokens_total", "decode_sequences_total")
"""Record fields without which there is no telling what a step computed."""


def between(before: StepRecord, after: StepRecord) -> TimedStep | None:
    """The step between two records; None unless it is exactly one, with work and a duration."""
    if after["steps_total"] - before["steps_total"] != 1 or after["duration_ns"] <= 0:
        return None
    features = Features(*(_difference(before, after, f"{name}_total") for name in Features._fields))
    if min(features) < 0 or not (features.prefill_tokens or features.decode_sequences):
        return None
    return TimedStep(features, after["duration_ns"] / NS)


def _difference(before: StepRecord, after: StepRecord, name: str) -> float:
    return after[name] - before[name] if name in after else 0.0
