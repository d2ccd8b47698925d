"""The Llama forward pass over a ragged batch: prefill chunks, decodes and drafts to verify, in one pass.

Tokens of all spans are rows of one matrix; only attention knows where one sequence ends. Only rows whose
logits are wanted go through the output layer. Every intermediate lives in a `Workspace` made for the step,
so a layer allocates nothing but what attention returns. O(rows x parameters + rows x context).

Numbers: fp32, within 1e-5 of `transformers` on the same weights; rows of a batch do not see each other, so
a mixed batch equals separate ones up to the last bits that a different matrix shape may round differently.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import silu

from kvengine.kv.eviction.by_head import HeadRow, Profile
from kvengine.kv.eviction.heads import HeadTables
from kvengine.kv.eviction.mass import Mass
from kvengine.kv.storage import KvStorage
from kvengine.model.config import ModelConfig
from kvengine.model.weights import LlamaWeights
from kvengine.model.workspace import Workspace
from kvkernels import attention
from kvkernels.geometry import Geometry
from kvkernels.geometry import Span as AttentionSpan
from kvkernels.scratch import Scratch, indices


@dataclass(slots=True)
class Span:
    """`tokens` at positions `start` and on of the sequence whose KV lies in `blocks` (which must cover them).

    `logits`: how many of its last positions' logits are wanted. `packing`: see `kv.precisions`. `evicted`:
    how many of the positions before `start` are not stored any more. `scored`: whether to add up what
    attention each stored token draws.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    logits: int = 1
    packing: int = 1
    evicted: int = 0
    scored: bool = False
    profile: Profile | None = None
    """To be filled, with what each head keeps of a prompt that ends here."""
    heads: HeadTables | None = None
    """Where KV lies that is kept head by head; of one token."""


class Llama:
    """One model's weights and rotation table; holds no state of any sequence."""

    def __init__(self, config: ModelConfig, weights: LlamaWeights, max_tokens: int | None = None) -> None:
        self.config = config
        self._weights = weights
        self._device = weights.embedding.device
        self.max_tokens = min(max_tokens or config.max_positions, config.max_positions)
        self._rotations = rotations(config, self.max_tokens).to(self._device)
        self._epsilon = torch.full((1, 1), config.norm_eps, device=self._device)

    def geometry(self, block_size: int) -> Geometry:
        config = self.config
        return Geometry(config.heads, config.kv_heads, config.head_dim, block_size, config.sliding_window)

    def forward(
        self, spans: Sequence[Span], storage: KvStorage, scratch: Scratch, mass: Mass | None = None
    ) -> Tensor:
        """Logits [sum of `logits`, vocab], in the order of `spans`. Writes the spans' KV into `storage`.

        `mass` is there if any span is scored.
        """
        rows = _Rows(spans, storage.geometry)
        work = self.workspace(len(rows.tokens), len(rows.wanted))
        columns = indices(rows.tokens + rows.positions + rows.slots, self._device)
        tokens, positions, slots = columns.view(3, -1).unbind()
        parts, by_head = [], []
        for row, span in rows.by_head:
            assert span.heads is not None
            assert mass is not None
            by_head.append(HeadRow(row, span.start, span.heads, storage.at(1), scratch, mass))
        for packing, part in rows.parts.items():
            storage.claim(packing, part.touched)
            stored, mine = storage.at(packing), slice(part.first, part.end)
            paged = attention.PagedAttention(
                part.spans, stored.geometry, scratch, work.query, work.mixed_heads, stored.precision
            )
            parts.append((stored, slots[mine], work.new_kv[mine], paged, part.scored))

        def attend(layer: int) -> None:
            for stored, slots, new_kv, paged, scored in parts:
                stored.write(layer, slots, new_kv, scratch)
                if scored and mass is not None:
                    mass.add(layer, work.query, stored, [span for span, _ in scored], scratch)
                    for span, profile in scored:
                        if profile is not None:
                            profile.observe(work.query, stored, layer, span, mass)
                paged.attend(stored.blocks[layer], stored.scales(layer), stored.fine(layer))
            for single in by_head:
                single.attend(layer, work.new_kv, work.query, work.mixed_heads)

        return self.run(work, tokens, positions, rows.wanted, attend)

    def rotation(self, positions: int) -> Tensor:
        """What moves a key that many positions on: [head_dim / 2], complex."""
        return torch.view_as_complex(self._rotations[positions].view(-1, 2))

    def workspace(self, rows: int, wanted: int) -> Workspace:
        """For a pass over `rows` tokens that wants `wanted` rows of logits."""
        return Workspace(self.config, rows, wanted, self._device)

    def run(
        self,
        work: Workspace,
        tokens: Tensor,
        positions: Tensor,
        wanted: list[int],
        attend: Callable[[int], None],
    ) -> Tensor:
        """One pass, whatever the cache: `attend(layer)` keeps `work.new_kv` and fills `work.mixed`."""
        torch.index_select(self._weights.embedding, 0, tokens, out=work.residual)
        torch.index_select(self._rotations, 0, positions, out=work.rotation)
        for layer, weights in enumerate(self._weights.layers):
            self._normalise(work.residual, work.scale, work.normed)
            torch.mm(work.normed, weights.qkv, out=work.qkv)
            work.rotated.mul_(work.rotation_factor)
            attend(layer)
            work.residual.addmm_(work.mixed, weights.out)
            self._normalise(work.residual, work.scale, work.normed)
            torch.mm(work.normed, weights.gate_up, out=work.gate_up)
            silu(work.gate, inplace=True).mul_(work.up)
            work.residual.addmm_(work.gate, weights.down)
        return self._logits(work, wanted)

    def _logits(self, work: Workspace, wanted: list[int]) -> Tensor:
        torch.index_select(work.residual, 0, indices(wanted, self._device), out=work.last)
        self._normalise(work.last, work.last_scale, work.last_normed)
        work.last_normed.mul_(self._weights.norm)
        return torch.mm(work.last_normed, self._weights.output, out=work.logits)

    def _normalise(self, rows: Tensor, scale: Tensor, out: Tensor) -> None:
        """RMSNorm without its weight. Half the time of torch's own, which is not one kernel on a CPU."""
        torch.linalg.vector_norm(rows, dim=-1, keepdim=True, out=scale)
        torch.addcmul(self._epsilon, scale, scale, value=1 / rows.shape[1], out=scale).rsqrt_()
        torch.mul(rows, scale, out=out)


def rotations(config: ModelConfig, positions: int) -> Tensor:
    """cos and sin of each frequency side by side, [positions, head_dim].

    In fp32 throughout, as every other implementation does: a more exact angle would be a different model at
    long contexts, where fp32 angles are off by up to 1e-4.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.arange(positions, dtype=torch.float32).unsqueeze(1) * (1.0 / config.rope_theta**exponents)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)


@dataclass(slots=True)
class _Part:
    """The rows `first` to `end` of a batch, whose sequences have one packing."""

    first: int
    end: int = 0
    spans: list[AttentionSpan] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)
    """Blocks that are written."""
    scored: list[tuple[AttentionSpan, Profile | None]] = field(default_factory=list)


class _Rows:
    """A batch flattened: host lists for tokens, positions, KV slots, and the rows whose logits are wanted.

    Rows of one packing lie together. Among them single tokens come first, shortest context first: that is the
    order in which attention groups them best.
    """

    def __init__(self, spans: Sequence[Span], geometry: Geometry) -> None:
        order = sorted(
            (
                span.packing if span.heads is None else 0,
                len(span.tokens) > 1,
                span.start - span.evicted,
                number,
            )
            for number, span in enumerate(spans)
        )
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.parts: dict[int, _Part] = {}
        self.by_head: list[tuple[int, Span]] = []
        """Row and span of those whose KV is kept head by head."""
        ends = [0] * len(spans)
        for packing, several, place, number in order:
            span, block_size = spans[number], geometry.block_size * packing
            start = span.start
            if span.heads is not None:
                self.by_head.append((len(self.tokens), span))
                self.tokens += span.tokens
                self.positions.append(start)
                self.slots.append(0)
                ends[number] = len(self.tokens)
                continue
            end, blocks = start + len(span.tokens), span.blocks
            placed = AttentionSpan(len(self.tokens), end - start, end - span.evicted, blocks)
            part = self.parts.get(packing) or self.parts.setdefault(packing, _Part(len(self.tokens)))
            part.spans.append(placed)
            if span.scored:
                part.scored.append((placed, span.profile))
            self.tokens += span.tokens
            if several:
                self.positions += range(start, end)
                self.slots += placed.slots(block_size)
                part.touched += blocks[place // block_size : -(-placed.context // block_size)]
            else:
                block = blocks[place // block_size]
                self.positions.append(start)
                self.slots.append(block * block_size + place % block_size)
                part.touched.append(block)
            ends[number] = part.end = len(self.tokens)
        self.wanted = [
            row for span, end in zip(spans, ends, strict=True) for row in range(end - span.logits, end)
        ]
