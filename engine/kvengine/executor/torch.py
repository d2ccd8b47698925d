"""Runs batches on a real model: one forward pass of the target a step, the draft's before it when drafting.

The step's memory is charged to the device's account before anything is touched, so a step that does not fit
leaves every request as it was. On a CPU everything is eager torch: compiled, this forward pass was measured
nine times slower.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvengine.errors import DeviceOutOfMemory, StartError
from kvengine.executor import emission
from kvengine.executor.cuda_memory import CudaMemory
from kvengine.kv.eviction.by_head import Profile, compact
from kvengine.kv.eviction.choose import sink_blocks
from kvengine.kv.eviction.mass import Mass
from kvengine.kv.eviction.policy import STREAMING
from kvengine.kv.plan import StepSize
from kvengine.kv.precisions import FULL, Precisions
from kvengine.kv.storage import KvStorage
from kvengine.memory import DeviceMemory, MemoryReading
from kvengine.model.footprint import Footprint
from kvengine.model.llama import Llama, Span
from kvengine.request import Request
from kvengine.sched.batch import Batch, Slice, SliceResult
from kvengine.spec import ngram
from kvengine.spec.draft import Proposal, propose, settle
from kvkernels.scratch import Scratch


class EagerExecutor:
    """Owns the models' KV and scratch memory; between steps it holds no state of any request.

    Drafts come from the draft model or, without one and with `ngrams`, from the text itself.
    `heavy_hitters`: whether there is memory to score tokens by the attention they draw.
    `num_blocks` blocks of `block_size` tokens serve both models: a block id means the same tokens in either.
    """

    def __init__(
        self,
        target: Llama,
        draft: Llama | None,
        memory: DeviceMemory | CudaMemory,
        num_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
        ngrams: bool = False,
        precisions: Precisions = FULL,
        heavy_hitters: bool = False,
    ) -> None:
        if draft and draft.max_tokens < target.max_tokens:
            raise StartError(
                f"the draft model reaches {draft.max_tokens} positions, the target {target.max_tokens}: "
                "lower --max-model-len or use --draft none"
            )
        device = torch.device(device)
        self._target, self._draft, self._memory = target, draft, memory
        self._ngrams = ngrams and draft is None
        self.footprint = Footprint(
            target.config,
            draft.config if draft else None,
            block_size,
            target.max_tokens,
            precisions,
            heavy_hitters,
        )
        try:
            memory.charge(self.footprint.resident_bytes, "weights and buffers")
            token_bytes = self.footprint.kv_bytes_per_token + self.footprint.score_bytes_per_token
            memory.charge(num_blocks * block_size * token_bytes, "KV blocks")
            self._scratch = Scratch.for_geometries(self.footprint.geometries(), target.max_tokens, device)
            self._target_kv = _storage(target, num_blocks, block_size, device, precisions)
            self._mass = Mass(self._target_kv) if heavy_hitters else None
            self._draft_kv = _storage(draft, num_blocks, block_size, device, precisions) if draft else None
        except torch.OutOfMemoryError as error:
            raise DeviceOutOfMemory(f"at start: {error}") from error

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[SliceResult]:
        """One step. Raises DeviceOutOfMemory with every request as before."""
        drafting = [piece for piece in batch.slices if piece.drafts] if self._draft or self._ngrams else []
        try:
            with self._memory.held(self._step_bytes(batch.slices, drafting), "a step's workspace"):
                if batch.copies:
                    self._copy(batch.copies)
                self._prepare(batch.slices)
                return self._step(batch.slices, drafting)
        except torch.OutOfMemoryError as error:
            raise DeviceOutOfMemory(f"step of {batch.tokens} tokens: {error}") from error

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Blocks that one of several holders is about to write, in both models' pools."""
        for storage in (self._target_kv, self._draft_kv):
            if storage is not None:
                storage.copy(copies)
        if self._mass is not None:
            self._mass.copy(copies)

    def memory(self) -> MemoryReading:
        return self._memory.reading()

    def _step(self, slices: Sequence[Slice], drafting: list[Slice]) -> list[SliceResult]:
        # Rows of logits come out in the order of spans: those with drafts first, then the other sampled ones.
        proposal = self._propose(drafting) if drafting else None
        spans = _draft_spans(drafting, proposal) if proposal else []
        profiles: list[tuple[Request, Profile]] = []
        plain = [piece for piece in slices if not piece.drafts] if drafting else slices
        for piece in plain:
            request, start = piece.request, piece.start
            tokens = request.tokens[start : start + piece.count]
            place = request.blocks, int(piece.samples), request.packing, request.evicted
            profile = Profile(request.eviction) if _ends_prompt(piece) and request.eviction else None
            spans.append(Span(tokens, start, *place, _scored(piece), profile, request.heads))
            if profile is not None:
                profiles.append((request, profile))
        logits = self._target.forward(spans, self._target_kv, self._scratch, self._mass)
        for request, profile in profiles:
            assert self._mass is not None
            request.heads = compact(profile, request.blocks, self._target_kv, self._mass)
        sampled = [piece for piece in plain if piece.samples]
        results: dict[int, SliceResult] = {}
        if proposal:
            results = self._judge(logits[: logits.shape[0] - len(sampled)], drafting, proposal)
        if sampled:
            rows = logits[logits.shape[0] - len(sampled) :]
            results |= emission.sampled(rows, sampled)
        done = [results.get(id(piece)) or SliceResult([]) for piece in slices]
        if self._mass is not None:
            self._weigh(slices, done, self._mass)
        return done

    def _weigh(self, slices: Sequence[Slice], results: list[SliceResult], mass: Mass) -> None:
        """What each block has drawn of attention, for those who evict by it."""
        for piece, result in zip(slices, results, strict=True):
            if _scored(piece) and not _exact(piece):
                tokens = piece.start + piece.count - piece.request.evicted
                blocks = piece.request.blocks[: self._target_kv.geometry.blocks_for(tokens)]
                result.block_mass = mass.of_blocks(blocks, tokens)

    def _prepare(self, slices: Sequence[Slice]) -> None:
        """What requests that give up KV need before they are computed."""
        for piece in slices:
            request, eviction = piece.request, piece.request.eviction
            if eviction is None:
                continue
            if request.heads is not None:
                request.heads.take(request.blocks[request.heads.blocks :])
            if eviction.policy == STREAMING and request.rotated < request.evicted:
                sinks = request.blocks[: sink_blocks(eviction, self._target_kv.geometry.block_size)]
                delta = request.evicted - request.rotated
                self._target_kv.turn(sinks, self._target.rotation(delta))
                request.rotated = request.evicted

    def _propose(self, drafting: list[Slice]) -> Proposal:
        requests = [piece.request for piece in drafting]
        if self._ngrams:
            return ngram.propose(
                requests, [piece.drafts for piece in drafting], self._scratch.gathered.device
            )
        return propose(
            self._draft_forward,
            requests,
            [piece.drafts for piece in drafting],
            *emission.sampling_rows(requests, self._scratch.gathered.device),
        )

    def _draft_forward(self, spans: Sequence[Span]) -> Tensor:
        return self._draft.forward(spans, self._draft_kv, self._scratch)

    def _judge(self, logits: Tensor, drafting: list[Slice], proposal: Proposal) -> dict[int, SliceResult]:
        requests, counts = [piece.request for piece in drafting], proposal.counts
        emitted = emission.judged(logits, requests, proposal)
        accepted = [len(tokens) - 1 for tokens in emitted]
        if self._draft:
            settle(requests, counts, accepted)
        return {
            id(piece): SliceResult(tokens, count, stood)
            for piece, tokens, count, stood in zip(drafting, emitted, counts, accepted, strict=True)
        }

    def _step_bytes(self, slices: Sequence[Slice], drafting: list[Slice]) -> int:
        tokens = rows = drawn = context = 0
        for piece in slices:
            drafts = piece.drafts if drafting else 0
            tokens += piece.count + drafts
            if piece.count == 1:
                context += piece.start + 1 + drafts
            if piece.samples:
                outputs = 1 + drafts + len(piece.request.forks)
                rows += outputs
                drawn += emission.draws(piece.request) * outputs
        behind = sum(len(piece.request.tokens) - piece.request.draft_computed for piece in drafting)
        scored = self._mass is not None and any(_scored(piece) for piece in slices)
        size = StepSize(tokens, rows, drawn, context)
        moved = max((piece.start + piece.count for piece in slices if _ends_prompt(piece)), default=0)
        return self.footprint.step_bytes(size, len(drafting), behind, scored, moved)


def _exact(piece: Slice) -> bool:
    return piece.request.eviction is not None and piece.request.eviction.exact


def _ends_prompt(piece: Slice) -> bool:
    """Whether what each head keeps is chosen here."""
    return piece.samples and _exact(piece) and piece.request.heads is None


def _scored(piece: Slice) -> bool:
    return piece.request.eviction is not None and piece.request.eviction.scored


def _draft_spans(drafting: list[Slice], proposal: Proposal) -> list[Span]:
    """The newest token of each and its drafts, all of whose logits are wanted."""
    return [
        Span(
            [piece.request.tokens[piece.start], *tokens[:count]],
            piece.start,
            piece.request.blocks,
            count + 1,
            piece.request.packing,
            piece.request.evicted,
        )
        for piece, tokens, count in zip(drafting, proposal.tokens.tolist(), proposal.counts, strict=True)
    ]


def _storage(
    model: Llama, num_blocks: int, block_size: int, device: torch.device, precisions: Precisions
) -> KvStorage:
    return KvStorage(model.config.layers, num_blocks, model.geometry(block_size), device, precisions)
