"""What an element of KV, or of the weights, takes.

A token of KV takes exactly its bits: scales belong to a layer, its heads or their channels, and lie outside
the pool. They are a few kilobytes in all, or some hundred for int4. So vLLM keeps fp8. The reference engine
has a byte more beside each head's K and V in fp8; its own plan counts it, and this one says so.
"""

import difflib
from dataclasses import dataclass

from kvengine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Precision:
    """Of KV elements."""

    name: str
    bits: int
    fine: bool = False
    """Whether the reference engine has a scale, of one byte, for each vector."""

    def vector_bytes(self, head_dim: int) -> int:
        """One head's K, or V, of one token. Elements are packed."""
        return (head_dim * self.bits + 7) // 8


KV_PRECISIONS = {
    one.name: one
    for one in (
        Precision("fp32", 32),
        Precision("bf16", 16),
        Precision("fp16", 16),
        Precision("fp8", 8, fine=True),
        Precision("int8", 8),
        Precision("int4", 4),
    )
}
WEIGHT_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8}
"""Formats of weights that follow from the shape alone. Packed ones (GPTQ, AWQ) have groups: --weights."""

ALIASES = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "fp8_e4m3": "fp8",
    "fp8_e4m3fn": "fp8",
    "fp8_e5m2": "fp8",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}


def kv_precision(name: str) -> Precision:
    """Raises ConfigError for an unknown name."""
    return KV_PRECISIONS[_known("--kv-dtype", name, list(KV_PRECISIONS))]


def weight_dtype(name: str) -> str:
    """The short name. Raises ConfigError for an unknown one."""
    return _known("--weight-dtype", name, list(WEIGHT_BITS))


def _known(option: str, name: str, known: list[str]) -> str:
    key = name.strip().lower().removeprefix("torch.")
    key = ALIASES.get(key, key)
    if key not in known:
        near = difflib.get_close_matches(key, [*known, *ALIASES], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{option} {name}: {hint}known are {', '.join(known)}")
    return key
