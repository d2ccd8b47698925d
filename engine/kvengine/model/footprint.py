"""What an engine with a target and perhaps a draft needs of a device, in bytes. No torch.

The planner divides memory by it and the executor charges its account by it: one sum for both, held against
what torch really allocates by a test.
"""

from dataclasses import dataclass

from kvengine.kv.plan import StepMemory, StepSize
from kvengine.kv.precisions import FULL, Precisions, fine_bytes, fine_packing, scale_bytes
from kvengine.model.config import INDEX_BYTES, ModelConfig
from kvkernels.geometry import (
    CODE_BYTES,
    FLOAT_BYTES,
    TILE_ROWS,
    Geometry,
    band_floats,
    mask_floats,
    scratch_floats,
    search_bytes,
)

DRAFT_CATCH_UP_TOKENS = 512
"""The most that a draft computes in one pass, unless two tokens a sequence are more; see `spec.draft`."""

_SCORING_COPIES = 3
"""Of a tile's attention weights, alive at once."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one engine. The draft's KV lies beside the target's, block for block."""

    target: ModelConfig
    draft: ModelConfig | None
    block_size: int
    max_model_len: int
    precisions: Precisions = FULL
    heavy_hitters: bool = False
    """Whether tokens can be scored by the attention that they draw."""

    @property
    def kv_bytes_per_token(self) -> int:
        """At the pool's own precision, with fine scales; a token stored smaller takes that much less."""
        floats = sum(config.kv_bytes_per_token for config in self._models())
        fine = sum(fine_bytes(self.precisions, one.layers, one.kv_heads) for one in self._models())
        return floats * self.precisions.own.bits // 32 + fine

    @property
    def score_bytes_per_token(self) -> int:
        """Beside its KV: one number a layer and KV head of the target."""
        return self.target.layers * self.target.kv_heads * FLOAT_BYTES if self.heavy_hitters else 0

    @property
    def weights_bytes(self) -> int:
        return sum(config.weights_bytes for config in self._models())

    @property
    def resident_bytes(self) -> int:
        """Weights, rotation tables, attention's scratch, scales and room to search for some: they stay."""
        tables = sum(self.max_model_len * config.head_dim + 1 for config in self._models())
        gathered = max(scratch_floats(geometry, self.max_model_len) for geometry in self.geometries())
        mask = mask_floats(self.max_model_len)
        mask += sum(band_floats(window) for window in {one.sliding_window for one in self._models()})
        scales = sum(scale_bytes(self.precisions, one.layers, one.kv_width) for one in self._models())
        if fine_packing(self.precisions):
            scales += search_bytes(max(one.head_dim for one in self._models()))
        floats = tables + gathered + mask
        return (
            self.weights_bytes
            + floats * FLOAT_BYTES
            + gathered * CODE_BYTES
            + self.max_model_len * INDEX_BYTES
            + scales
        )

    @property
    def step(self) -> StepMemory:
        """Of the target: its bytes a token are what a larger chunk costs."""
        return self.target.step_memory

    def step_bytes(
        self, size: StepSize, drafting: int, behind: int, scored: bool = False, moved: int = 0
    ) -> int:
        """A step of `size` for the target, and before it the draft for `drafting` sequences.

        `behind` tokens are missing from the draft's KV. The two models run one after the other. `scored`:
        whether attention is computed once more for its weights. `moved`: tokens of the longest sequence whose
        KV is put together by head.
        """
        target_bytes = self.target.step_memory.step_bytes(size)
        target_bytes += moved * (self.kv_bytes_per_token + self.score_bytes_per_token)
        if scored:
            weights = TILE_ROWS * self.target.heads * self.max_model_len
            target_bytes += (_SCORING_COPIES * weights + self.target.query_width * size.tokens) * FLOAT_BYTES
        if self.draft is None or not drafting:
            return target_bytes
        draft_tokens = min(behind, max(DRAFT_CATCH_UP_TOKENS, 2 * drafting))
        draft_size = StepSize(draft_tokens, drafting, size.drawn_rows, size.decode_context_tokens)
        return max(target_bytes, self.draft.step_memory.step_bytes(draft_size))

    def worst_step_bytes(self, step_tokens: int, running: int, drafts: int) -> int:
        """The largest step under these limits: as many tokens as allowed, every running sequence sampled.

        Choices of a prompt that ends are drawn from one token; only drafts need one of their own.
        """
        rows = running + min(running, step_tokens // (1 + drafts) + 1) * drafts
        size = StepSize(step_tokens, rows, 2 * rows, min(running, step_tokens) * self.max_model_len)
        # What the draft lacks has nothing to do with the step's tokens: whole contexts, at the worst.
        behind = running * self.max_model_len
        moved = self.max_model_len if self.heavy_hitters else 0
        return self.step_bytes(size, running if drafts else 0, behind, self.heavy_hitters, moved)

    def geometries(self) -> list[Geometry]:
        return [
            Geometry(config.heads, config.kv_heads, config.head_dim, self.block_size, config.sliding_window)
            for config in self._models()
        ]

    def _models(self) -> list[ModelConfig]:
        return [self.target] if self.draft is None else [self.target, self.draft]
