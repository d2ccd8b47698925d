"""A plant and its memory from names: `h100`, `llama-3-8b`. As `kvpilot plan` takes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvpilot.simulate.plants.roofline import Roofline

if TYPE_CHECKING:
    from kvengine.kv.plan.serving import Serving
    from kvengine.kv.plan.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Machine:
    """What is simulated, by name. `kv_bytes` in place of what weights, reserve and the worst step leave."""

    device: str = "h100"
    model: str = "llama-3-8b"
    draft: str | None = None
    tp: int = 1
    kv_dtype: str | None = None
    block_size: int = 16
    chunk_tokens: int = 2048
    max_running: int = 256
    kv_bytes: int | None = None

    def plant(self, sigma: float = 0.0, seed: int = 0, score_bytes: float = 0.0) -> Roofline:
        """Raises kvengine's ConfigError, in one line, for a name or size that cannot be."""
        from kvengine.kv.plan.devices import device_named
        from kvengine.kv.plan.precision import kv_precision

        kv = None if self.kv_dtype is None else kv_precision(self.kv_dtype)
        draft = None if self.draft is None else model_named(self.draft)
        return Roofline(
            device_named(self.device),
            model_named(self.model),
            self.tp,
            kv,
            draft=draft,
            sigma=sigma,
            seed=seed,
            score_bytes=score_bytes,
        )

    def memory(self) -> "Serving":
        """The device's memory as the planner divides it: `plan.blocks` of KV, and `after_weights_bytes` less
        those is what a step may take. Raises ConfigError where it does not fit.
        """
        from kvengine.kv.plan.devices import device_named
        from kvengine.kv.plan.precision import kv_precision
        from kvengine.kv.plan.serving import RESERVE_BYTES, RESERVE_TP_BYTES, Question, answer

        shape = model_named(self.model)
        draft_bytes = 0
        if self.draft is not None:
            draft = model_named(self.draft)
            draft_bytes = draft.weights_bytes(draft.compute_dtype, 1)
        reserve = RESERVE_TP_BYTES if self.tp > 1 else RESERVE_BYTES
        return answer(
            Question(
                memory_bytes=device_named(self.device).memory_bytes,
                reserve_bytes=reserve + draft_bytes,
                block_size=self.block_size,
                chunk_tokens=self.chunk_tokens,
                max_running=self.max_running,
                kv_bytes=self.kv_bytes,
                model=shape,
                tp=self.tp,
                kv_precision=kv_precision(self.kv_dtype or shape.compute_dtype),
            )
        )


def model_named(name: str) -> "ModelShape":
    """Of a directory with config.json, or of a model that the planner knows. Raises ConfigError."""
    from kvengine.kv.plan.published import published_named
    from kvengine.kv.plan.shape import shape_in, shape_of

    path = Path(name)
    if path.exists():
        return shape_in(path)
    known, raw = published_named(name)
    return shape_of(raw, known, known)
