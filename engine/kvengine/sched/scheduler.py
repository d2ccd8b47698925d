"""The scheduler: which tokens of which requests go through the model in the next step.

One step is filled in this order, each under the step's token budget, in whole tokens:

1. *Decodes*, one token each, and with them drafts to verify, evenly, from what the budget leaves.
2. *Running prompts*, in chunks, together at most the prefill chunk.
3. *Admission* of waiting requests, while the running cap, the watermark and both budgets allow at least one
   token of them.

An admitted request begins with what the prefix cache has of it. KV blocks are allocated when a step is about
to fill them. When there are none, the running request of the
lowest class that was admitted last gives all of its blocks back, with all beams of its group, and returns to
the queue, to be computed again (its tokens are kept). Drafts are given up before anybody is preempted, and
that last request itself, when it lacks a block, waits in place. No torch, no clock.

Invariants between steps: a request waits or runs, not both; only running requests hold blocks, and each at
least one; `running` is ordered by class (highest first), then admission; the first of them can always make
progress, because `refusal` let in only what the whole pool holds. O(running + admitted) a step.
"""

from bisect import insort
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

from kvengine.kv.eviction.relieve import packing_of, relieve, slide
from kvengine.kv.pool import BlockPool
from kvengine.kv.precisions import FULL, Precisions
from kvengine.kv.table import BlockTables, blocks_for
from kvengine.kv.tree import PrefixTree
from kvengine.request import Request
from kvengine.sched.admission import PeakAdmission, WaitingQueue, fits
from kvengine.sched.batch import Batch, Slice
from kvpilot.inside.lengths import LengthPredictor


@dataclass(frozen=True, slots=True)
class Knobs:
    """What may change between steps. The names are those of the knob catalogue."""

    step_token_budget: int
    prefill_chunk_tokens: int
    speculative_tokens: int
    max_running: int
    admission_watermark: float
    kv_element_bits: float | None = None
    """None: the pool's own."""
    kv_kept_ratio: float = 1.0
    """Of the tokens of requests that opted in to eviction."""


class Scheduler:
    """Owns the waiting and running requests and their block tables."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        levels: int = 1,
        tree: PrefixTree | None = None,
        precisions: Precisions = FULL,
        lengths: LengthPredictor | None = None,
    ) -> None:
        self.precisions = precisions
        self.pool = pool
        self.block_size = block_size
        self.tables = BlockTables(pool, block_size, tree)
        self.peak = None if lengths is None else PeakAdmission(self.tables, lengths)
        """Who looks ahead at admission; without, the watermark is of what is in use now."""
        self.sliding_window: int | None = None
        """Of the model: what it never looks at again is given up."""
        self.waiting = WaitingQueue(levels)
        self.running: list[Request] = []
        self.preemptions_total = 0
        self.kv_limited = False
        """Whether, in the latest step, want of KV blocks held a request up or sent one back."""
        self.budget_limited = False
        """Whether the latest step used up its token budget, or what prompts may have of it."""
        self.admitted: list[Request] = []
        """Admitted for the first time in the latest step."""
        self._steps = 0
        self._admissions = 0
        self._budget_left = 0
        self._prefill_left = 0
        self._prompts_run = False
        """Whether, in the step being built, anybody who runs does not decode."""
        self._slices: list[Slice] = []

    def add(self, request: Request) -> None:
        """Accept a request that `refusal` has nothing against."""
        self.waiting.push(request)

    def remove(self, request: Request) -> None:
        """Forget a request that ended, however it did; its blocks are free, or cached, at once."""
        if not self.waiting.remove(request):
            self.running.remove(request)
            self.tables.clear(request)

    def fork(self, request: Request, other: Request) -> None:
        """Run `other` beside `request`, whose tokens and blocks it shares so far."""
        self.tables.fork(request, other)
        other.admission, other.served_step = request.admission, request.served_step
        other.first_scheduled_ns = request.first_scheduled_ns
        insort(self.running, other, key=_rank)

    def schedule(self, knobs: Knobs, now_ns: int = 0) -> Batch:
        """The next step's work; empty only if there are no requests."""
        self._steps += 1
        self.kv_limited = False
        self.admitted = []
        self._slices = []
        self._budget_left = knobs.step_token_budget
        self._prefill_left = knobs.prefill_chunk_tokens
        self._evict(knobs.kv_kept_ratio)
        self._schedule_decodes(knobs.speculative_tokens)
        self._schedule_prompts()
        self._resume_beams()
        self._cover_drafts()
        self._admit(knobs, now_ns)
        self.budget_limited = 0 in (self._budget_left, self._prefill_left)
        return Batch(self._slices, self.tables.take_copies())

    def check(self) -> None:
        """Raise unless the invariants of the module docstring hold between steps."""
        held = (block for request in self.running for block in request.blocks)
        self.pool.check(chain(held, self.tables.holders()))
        if self.tables.tree is not None:
            self.tables.tree.check()
        for request in self.waiting:
            assert not request.blocks, f"request {request.id} waits and holds KV blocks"
            assert request.computed == 0, f"request {request.id} waits and has computed positions"
            assert not request.registered, f"request {request.id} waits and is in the prefix tree"
            assert request not in self.running, f"request {request.id} waits and runs"
        for request in self.running:
            assert request.blocks, f"request {request.id} runs without a block"
            covered = len(request.blocks) * self.tables.tokens_in_block(request)
            # By head, whoever comes takes the place of another; the count is set right at the next step.
            most = covered + (request.heads is not None)
            assert request.stored <= most, f"request {request.id}: {covered} positions are covered"
        assert self.running == sorted(self.running, key=_rank), "running is out of order"

    def _evict(self, ratio: float) -> None:
        """First of all, so that nobody is preempted for blocks that others have agreed to give up."""
        for request in self.running:
            if self.sliding_window is not None:
                slide(self.tables, request, self.sliding_window)
            elif request.eviction is not None:
                relieve(self.tables, request, ratio)

    def _schedule_decodes(self, speculative_tokens: int) -> None:
        decodes = [request for request in self.running if _decoding(request)]
        self._prompts_run = len(decodes) < len(self.running)
        if not decodes:
            return
        drafts = 0
        if len(decodes) > self._budget_left:
            # Not all fit: those served longest ago go first, or the tail would starve.
            decodes.sort(key=attrgetter("served_step"))
        elif speculative_tokens:
            drafts = min(speculative_tokens, self._spare_for_drafts(len(decodes)) // len(decodes))
        for request in decodes:
            if self._budget_left == 0:
                return
            if not request.blocks:  # Preempted for one before it.
                continue
            while not self.tables.cover(request, request.computed + 1):
                if not self._make_room(request):
                    break
            else:
                # One token comes out whatever is drafted: drafts past the last token would be waste.
                alone = request.sampling.scored or request.eviction is not None
                wanted = min(drafts, request.output_left - 1) if drafts and not alone else 0
                self._serve(Slice(request, request.computed, 1, wanted, samples=True, decode=True))

    def _spare_for_drafts(self, decodes: int) -> int:
        """Tokens that drafts may use: what decodes leave, but half of it if a prompt waits for that."""
        spare = self._budget_left - decodes
        return spare // 2 if self.waiting or decodes < len(self.running) else spare

    def _cover_drafts(self) -> None:
        """Blocks for drafts, from what running requests leave; where there are none, nothing is drafted."""
        for item in self._slices:
            if item.drafts and not self.tables.cover(item.request, item.start + 1 + item.drafts):
                self._budget_left += item.drafts
                item.drafts = 0

    def _schedule_prompts(self) -> None:
        if not self._prompts_run:
            return
        # Preemption only takes from the end of the list, so that walking it meanwhile is safe.
        for request in self.running:
            if self._budget_left == 0 or self._prefill_left == 0:
                return
            if not _decoding(request) and request.computed < len(request.tokens):
                while self.tables.reach(request) <= request.computed and self._make_room(request):
                    pass
                self._serve_chunk(request)

    def _resume_beams(self) -> None:
        """Bring back the next beam of each group that was preempted, on what it shares with others of it."""
        leaders = [one for one in self.running if one.group is not None and one.group.resumes(one)]
        for leader in leaders:
            if leader.group is None or not leader.blocks:  # Preempted for one before it.
                continue
            if self._budget_left == 0 or self._prefill_left == 0:
                return
            beam, source, common = leader.group.next_back()
            beam.packing, beam.admission = leader.packing, leader.admission
            self.tables.join(source, beam, common // self.tables.tokens_in_block(source))
            while self.tables.reach(beam) <= beam.computed and self._make_room(leader):
                pass
            if self.tables.reach(beam) <= beam.computed:
                self.tables.clear(beam)
                continue
            insort(self.running, beam, key=_rank)
            self._serve_chunk(beam)

    def _serve_chunk(self, request: Request) -> None:
        """Compute as much of a prompt as both budgets and free blocks allow, if that is at least a token."""
        wanted = min(len(request.tokens) - request.computed, self._budget_left, self._prefill_left)
        count = min(wanted, self.tables.reach(request) - request.computed)
        if count < wanted:
            self.kv_limited = True
        if count > 0 and self.tables.cover(request, request.computed + count):
            samples = request.computed + count == len(request.tokens)
            self._serve(Slice(request, request.computed, count, samples=samples))
            self._prefill_left -= count

    def _serve(self, item: Slice) -> None:
        self._slices.append(item)
        self._budget_left -= item.count + item.drafts
        item.request.served_step = self._steps

    def _admit(self, knobs: Knobs, now_ns: int) -> None:
        # Running prompts have had their turn: where they leave budget they have all of their blocks, or there
        # is no free one; so blocks in use are all that is promised.
        while self.waiting and self._budget_left and self._prefill_left:
            head = self.waiting.head
            head.packing = packing_of(head, self.precisions, knobs.kv_element_bits)
            if not self._below_cap(head, knobs.max_running):
                return
            if not self._fits(head, knobs.admission_watermark):
                self.kv_limited = True
                return
            self._start(self.waiting.pop(), now_ns)

    def _below_cap(self, request: Request, max_running: int) -> bool:
        """Whether it may run beside the others, and so may its forks; alone they always may."""
        others = len(self.running) + sum([other.promised for other in self.running])
        return others + 1 + request.promised <= max_running or not self.running

    def _fits(self, request: Request, watermark: float) -> bool:
        need, total = blocks_for(len(request.tokens), self.tables.tokens_in_block(request)), self.pool.total
        in_use, alone = self.pool.referenced, not self.running
        # Looked up only where it matters: what others hold of its prefix is in use already.
        if not fits(need, in_use, total, watermark, alone) and not fits(
            need - self.tables.held_already(request), in_use, total, watermark, alone
        ):
            return False
        return self.peak is None or self.peak.fits(request, self.running, watermark, self._steps)

    def _start(self, request: Request, now_ns: int) -> None:
        self._admissions += 1
        request.admission = self._admissions
        if request.preemptions == 0:
            request.first_scheduled_ns = now_ns
            self.admitted.append(request)
        self.tables.adopt(request)
        insort(self.running, request, key=_rank)
        if self.peak is not None:
            self.peak.admitted(request, self._steps)
        self._serve_chunk(request)

    def _make_room(self, request: Request) -> bool:
        """Preempt the last in rank, with the beams of its group; False if that is `request` itself, or its
        own group, which then waits in place.
        """
        self.kv_limited = True
        victim = self.running[-1]
        group = victim.group
        if victim is request or (group is not None and group is request.group):
            return False
        self._send_back()
        while group is not None and self.running and self.running[-1].group is group:
            self._send_back()
        self.waiting.push(victim if group is None else group.preempted())
        return True

    def _send_back(self) -> None:
        """Take everything from the last in rank."""
        victim = self.running.pop()
        if victim.served_step == self._steps:
            self._unserve(victim)
        victim.recompute_until = max(victim.recompute_until, victim.computed)
        victim.preemptions += 1
        self.preemptions_total += 1
        self.tables.clear(victim)

    def _unserve(self, request: Request) -> None:
        """Take its slice out of the step being built."""
        item = next(item for item in self._slices if item.request is request)
        self._slices.remove(item)
        self._budget_left += item.count + item.drafts
        self._prefill_left += 0 if item.decode else item.count


def _decoding(request: Request) -> bool:
    """Whether all but its newest token is computed and that one is output, not prompt."""
    return request.computed == len(request.tokens) - 1 and request.computed >= len(request.prompt)


def _rank(request: Request) -> tuple[int, int]:
    return -request.klass, request.admission
