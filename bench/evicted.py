"""What eviction costs: text after a prompt of 2,000 tokens of which 400 are kept, against all of them.

Part of `kv_quality.py`. The prompt goes through the engine's own tables, pool and forward pass, in chunks and
in one piece; the following tokens are forced, and scored with all KV and with what the policy kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kvengine.kv.eviction.by_head import Profile, compact
from kvengine.kv.eviction.mass import Mass
from kvengine.kv.eviction.policy import Eviction
from kvengine.kv.eviction.relieve import relieve
from kvengine.kv.pool import BlockPool
from kvengine.kv.storage import KvStorage
from kvengine.kv.table import BlockTables
from kvengine.model.domains import DOMAINS, prompt
from kvengine.model.llama import Llama, Span
from kvengine.request import Request, SamplingParams
from kvkernels.scratch import Scratch

BLOCK_SIZE = 16
PROMPT = 2000
FOLLOWING = 47
MODES = {
    "h2o": Eviction("h2o", sink=50, recent=300, heavy=50),
    "window": Eviction("window", sink=50, recent=350),
    "streaming": Eviction("streaming", sink=50, recent=350),
    "h2o_by_head": Eviction("h2o", sink=50, recent=300, heavy=50, by_head=True),
    "fastgen": Eviction("fastgen", sink=50, recent=300, heavy=50, recovery=0.95),
}
"""Each keeps 400 tokens; `fastgen` what each head needs, up to all."""


class Reader:
    """One text at a time through pool, tables and model, as an engine does it."""

    def __init__(self, model: Llama) -> None:
        geometry = model.geometry(BLOCK_SIZE)
        blocks = geometry.blocks_for(model.max_tokens)
        self._model = model
        self._storage = KvStorage(model.config.layers, blocks, geometry, "cpu")
        self._mass = Mass(self._storage)
        self._scratch = Scratch.for_geometries([geometry], model.max_tokens, torch.device("cpu"))
        self._pool = BlockPool(blocks)
        self._tables = BlockTables(self._pool, BLOCK_SIZE)

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], eviction: Eviction | None, chunk: int) -> tuple[Tensor, int, int]:
        """Logits after the prompt and each following token; as the first of those came: tokens evicted and
        blocks held.
        """
        request = Request(1, list(tokens), SamplingParams(1), eviction=eviction)
        ends = [*range(chunk, PROMPT, chunk), PROMPT, *range(PROMPT + 1, len(tokens) + 1)]
        parts, evicted, held = [], 0, 0
        for end in ends:
            if eviction is not None:
                relieve(self._tables, request, 1.0)
                self._turn(request)
            if not self._tables.cover(request, end):
                raise RuntimeError("the pool holds the whole text")
            scored = eviction is not None and eviction.scored
            piece = request.tokens[request.computed : end]
            ends_prompt = eviction is not None and eviction.exact and end == PROMPT
            profile = Profile(eviction) if eviction is not None and ends_prompt else None
            if request.heads is not None:
                request.heads.take(request.blocks[request.heads.blocks :])
            place = request.computed, request.blocks, 1, 1, request.evicted, scored
            span = Span(piece, *place, profile, request.heads)
            logits = self._model.forward([span], self._storage, self._scratch, self._mass)
            request.computed = end
            if profile is not None:
                request.heads = compact(profile, request.blocks, self._storage, self._mass)
            elif scored and not eviction.exact:
                blocks = request.blocks[: -(-request.stored // BLOCK_SIZE)]
                request.block_mass = self._mass.of_blocks(blocks, request.stored)
            if end >= PROMPT:
                parts.append(logits.clone())
            if end == PROMPT + 1:
                evicted, held = request.evicted, self._pool.referenced
        self._tables.clear(request)
        return torch.cat(parts), evicted, held

    def _turn(self, request: Request) -> None:
        if request.eviction is None or request.eviction.policy != "streaming":
            return
        if request.rotated < request.evicted:
            sinks = request.blocks[: round(request.eviction.sink / BLOCK_SIZE)]
            self._storage.turn(sinks, self._model.rotation(request.evicted - request.rotated))
            request.rotated = request.evicted


def texts(windows: int) -> dict[str, list[list[int]]]:
    """Held-out text of both domains: a prompt and what follows it."""
    length = PROMPT + FOLLOWING
    return {
        domain: [list(prompt(domain, length, 9500 + i).encode()) for i in range(windows)]
        for domain in DOMAINS
    }


def compare(
    model: Llama, texts: dict[str, list[list[int]]], chunks: tuple[int, ...] = (128, PROMPT)
) -> dict[str, dict[str, Any]]:
    """Of each policy, domain and prefill chunk: what was dropped, and what that cost."""
    engine = Reader(model)
    rows: dict[str, dict[str, Any]] = {name: {} for name in MODES}
    for domain, windows in texts.items():
        for tokens in windows:
            following = torch.tensor(tokens[PROMPT:])
            full, _, whole = engine.score(tokens[:-1], None, PROMPT)
            for name, eviction in MODES.items():
                for chunk in chunks[-1:] if eviction.exact else chunks:
                    logits, evicted, held = engine.score(tokens[:-1], eviction, chunk)
                    cell = rows[name].setdefault(f"{domain}_chunk_{chunk}", [])
                    cell.append(
                        {
                            "nll_delta": (
                                cross_entropy(logits, following) - cross_entropy(full, following)
                            ).item(),
                            "nll": cross_entropy(full, following).item(),
                            "top1_agreement": (logits.argmax(-1) == full.argmax(-1)).float().mean().item(),
                            "dropped": evicted / PROMPT,
                            "blocks": held,
                            "of": whole,
                        }
                    )
    return {
        name: {
            cell: {key: sum(one[key] for one in ones) / len(ones) for key in ones[0]}
            for cell, ones in cells.items()
        }
        for name, cells in rows.items()
    }
