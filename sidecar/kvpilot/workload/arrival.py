"""One request that a workload offers, before anyone has answered it."""

from dataclasses import dataclass

from kvpilot.clock import NS


@dataclass(frozen=True, slots=True)
class Arrival:
    """`at_s` counts from the start of the run; `seed` fixes the prompt's text and the sampling."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    klass: str
    tenant: str
    domain: str
    seed: int
    prefix: tuple[int, ...] = ()
    """Ids of the prompt's leading blocks: prompts share the text that their equal leading ids stand for."""
    prefix_block_tokens: int = 0
    """Prompt tokens that one id stands for; the last id may stand for fewer, at the prompt's end."""

    @property
    def at_ns(self) -> int:
        return round(self.at_s * NS)

    def work(self, r: float) -> float:
        """Prompt tokens plus `r` times output tokens: what the request costs, in prompt tokens."""
        return self.prompt_tokens + r * self.output_tokens


@dataclass(frozen=True, slots=True)
class Speed:
    """A measured machine: tokens a second of prompt alone and of output alone, the latter at full batch."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float

    def __post_init__(self) -> None:
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")

    @property
    def r(self) -> float:
        """What one output token costs, in prompt tokens."""
        return self.prefill_tokens_per_s / self.decode_tokens_per_s

    def seconds(self, prompt_tokens: float, output_tokens: float) -> float:
        """Machine time of that many tokens; load 1.0 offers a second of it every second."""
        return prompt_tokens / self.prefill_tokens_per_s + output_tokens / self.decode_tokens_per_s
