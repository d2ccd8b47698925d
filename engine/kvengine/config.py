"""What an operator decides before the engine starts. Checked here, once, with messages that say what to do.

Sizes are bytes, lengths tokens. The knobs' baselines are here too: a lease moves them later, within these.
"""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from kvengine.errors import ConfigError
from kvengine.kv.plan.division import check_block_size
from kvengine.kv.plan.units import parse_bytes
from kvengine.kv.precisions import Precisions
from kvkernels.precision import PRECISIONS

SHIPPED_TARGET = Path(__file__).parent / "weights" / "target"
SHIPPED_DRAFT = Path(__file__).parent / "weights" / "draft"
SHIPPED_NAME = "kvpilot-tiny"


@dataclass(frozen=True, slots=True)
class ExternalMemory:
    """What a neighbour on the same device takes, and how long after the start."""

    bytes: int
    after_s: float


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine's settings. Raises ConfigError for a value that cannot work."""

    model: Path = SHIPPED_TARGET
    draft: Path | None = SHIPPED_DRAFT
    name: str = SHIPPED_NAME
    memory_bytes: int = 256 * 2**20
    kv_fraction: float | None = None
    external: ExternalMemory | None = None
    block_size: int = 16
    step_token_budget: int = 2048
    prefill_chunk_tokens: int = 2048
    max_running: int = 64
    speculative_tokens: int = 4
    admission_watermark: float = 1.0
    admission: Literal["predicted", "held"] = "predicted"
    """What the watermark bounds: the predicted peak of KV demand too, or only what is held now."""
    max_model_len: int | None = None
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    kv_dtype: str = "fp32"
    """Of the KV pool; sequences may be stored in fewer bits than that, never in more."""
    kv_eight_bits: Literal["int8", "fp8"] = "int8"
    """What eight bits mean, when a lease asks for them."""
    classes: tuple[str, ...] = ("default",)
    """Class names by level, lowest first."""
    drafter: Literal["model", "ngram"] = "model"
    """Who drafts: the draft model, if there is one, or what followed the same few tokens before."""
    prefix_cache: bool = True
    pinned_share: float = 0.0
    """Most of the KV pool that pinned prompts may keep; requests cannot be larger than the rest."""
    heavy_hitters: bool = False
    """Whether memory is set aside to score tokens, for requests that evict by attention."""
    evict_tenants: tuple[str, ...] = ()
    """Tenants all of whose requests give up KV when `kv_kept_ratio` asks for it."""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "block_size", "step_token_budget", "max_running", "threads"):
            self._at_least(name, 1)
        check_block_size(self.block_size)
        self._at_least("prefill_chunk_tokens", 1)
        self._at_least("speculative_tokens", 0)
        if self.max_model_len is not None:
            self._at_least("max_model_len", 2)
        if self.prefill_chunk_tokens > self.step_token_budget:
            raise ConfigError(
                f"prefill_chunk_tokens={self.prefill_chunk_tokens}: a step has {self.step_token_budget} "
                "tokens; lower it or raise --step-tokens"
            )
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device={self.device}: choose cpu or cuda")
        if self.kv_dtype not in PRECISIONS:
            raise ConfigError(f"kv_dtype={self.kv_dtype}: choose one of {', '.join(PRECISIONS)}")
        if self.kv_eight_bits not in ("int8", "fp8"):
            raise ConfigError(f"kv_eight_bits={self.kv_eight_bits}: choose int8 or fp8")
        if self.speculative_tokens > 16:
            raise ConfigError(f"speculative_tokens={self.speculative_tokens}: at most 16")
        if self.admission not in ("predicted", "held"):
            raise ConfigError(f"admission={self.admission}: choose predicted or held")
        if self.kv_fraction is not None and not 0 < self.kv_fraction <= 1:
            raise ConfigError(
                f"kv_fraction={self.kv_fraction}: a share of what the weights leave, above 0 and at most 1"
            )
        if self.drafter not in ("model", "ngram"):
            raise ConfigError(f"drafter={self.drafter}: choose model or ngram")
        if self.drafter == "ngram" and self.draft is not None:
            raise ConfigError("drafter=ngram: n-grams draft instead of a model; give one of them")
        if not 0 <= self.pinned_share <= 0.9:
            raise ConfigError(f"pinned_share={self.pinned_share}: a share of KV, 0 to 0.9")
        if self.pinned_share and not self.prefix_cache:
            raise ConfigError(f"pinned_share={self.pinned_share}: there is no prefix cache to pin in")
        if not 0.05 <= self.admission_watermark <= 1:
            raise ConfigError(f"admission_watermark={self.admission_watermark}: a share of KV, 0.05 to 1")

    @property
    def speculates(self) -> bool:
        """Whether there is anybody to draft."""
        return self.speculative_tokens > 0 and (self.draft is not None or self.drafter == "ngram")

    @property
    def precisions(self) -> Precisions:
        """What KV may be stored in."""
        return Precisions(PRECISIONS[self.kv_dtype], PRECISIONS[self.kv_eight_bits])

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value < least:
            raise ConfigError(f"{name}={value}: must be at least {least}")

    def to_wire(self) -> dict[str, Any]:
        """As JSON values, for the core process."""
        wire = asdict(self)
        wire["model"] = str(self.model)
        wire["draft"] = None if self.draft is None else str(self.draft)
        return wire

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> "EngineConfig":
        """Inverse of `to_wire`."""
        values = {field.name: wire[field.name] for field in fields(cls)}
        values["model"] = Path(values["model"])
        values["draft"] = None if values["draft"] is None else Path(values["draft"])
        values["classes"] = tuple(values["classes"])
        values["evict_tenants"] = tuple(values["evict_tenants"])
        if values["external"] is not None:
            values["external"] = ExternalMemory(**values["external"])
        return cls(**values)


def parse_external(text: str) -> ExternalMemory:
    """`64MiB@10s` → how much a neighbour takes, and when. Raises ConfigError."""
    size, at, moment = text.partition("@")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)s", moment.strip())
    if not at or match is None:
        raise ConfigError(f"{text!r}: write a size and a moment after the start, as in 64MiB@10s")
    return ExternalMemory(parse_bytes(size), float(match[1]))
