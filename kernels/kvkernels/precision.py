"""In how many bits KV is stored. No torch.

A scaled precision stores codes: a value is its code times a scale, and there is one scale for K and one for V
of each head in each layer (`by_channel`: one for each channel of them), kept outside the pool. So a token
takes exactly `bits` an element, and attention folds the scales into the query and into its result: no code
is ever multiplied. Where scales are `fine`, each vector (K or V of one token and head) has one byte more,
beside the pool's blocks, that says how much larger than its head's its own scale is; see `fine`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Precision:
    """`limit` is the largest code; None means that values are stored as they are."""

    name: str
    bits: int
    limit: float | None = None
    by_channel: bool = False
    floating: bool = False
    """Whether codes are spaced like floats: then scales are moved by powers of two, which loses nothing."""
    fine: bool = False

    @property
    def scaled(self) -> bool:
        return self.limit is not None


FP32 = Precision("fp32", 32, floating=True)
BF16 = Precision("bf16", 16, floating=True)
FP8 = Precision("fp8", 8, limit=448.0, floating=True, fine=True)
"""e4m3, without infinities."""
INT8 = Precision("int8", 8, limit=127.0)
INT4 = Precision("int4", 4, limit=7.0, by_channel=True)
"""Fifteen levels are too few for a head whose channels differ in size, and those of K do."""

PRECISIONS = {one.name: one for one in (FP32, BF16, FP8, INT8, INT4)}

FINE_STEPS = 256
"""Scales of a vector within an octave: as many as a byte says."""

MAX_PACKING = 8
"""The most tokens that fit where one fits at the widest precision."""
