"""Beam search: several continuations of one prompt, the likeliest of which live on, step by step.

A group of `width` requests carries the beams. One of them computes the prompt; from then on each beam brings
its likeliest next tokens, and only when all of them have does the group move: the best `2 x width` pairs of
beam and token are looked at, those that end go to the finished, the best `width` of the others live on. A
beam with several heirs is forked, copy-on-write; one without gives its blocks back at once. So requests of a
group are places, not texts: a place whose beam died carries another's heir.

Rules and scores are those that vLLM's former API gave the fields: a sequence's score is its log-probability
over its length (prompt included, end token not) to the power of `length_penalty`; `early_stopping` says when
`width` finished sequences are enough: at once (true), when no beam's present score beats the worst of them
(false), or when none ever could ("never").

A group is preempted, cancelled and failed as a whole. It comes back one beam after the other, each on the
blocks that it has in common with those before it, so that it never needs more than `refusal` let in.
Plain state: no torch, no clock. O(width² log width) a move, O(tokens) for each beam forked.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple, Protocol

from kvengine.kv.table import blocks_for
from kvengine.request import Request

Candidates = Sequence[tuple[int, float]]
"""(token, log-probability), likeliest first."""


class Runner(Protocol):
    """Who runs the group's requests: the scheduler."""

    def fork(self, request: Request, other: Request) -> None: ...

    def remove(self, request: Request) -> None: ...


class Heir(NamedTuple):
    """A beam and the token that continues it."""

    parent: Request
    token: int
    logprob: float
    """Of the whole output."""


class Hypothesis(NamedTuple):
    """A finished sequence."""

    tokens: list[int]
    """Prompt and output."""
    logprob: float
    score: float
    finish: str
    """`stop` or `length`."""


def score(logprob: float, tokens: int, length_penalty: float) -> float:
    """What sequences are compared by: higher is better."""
    return logprob / float(tokens) ** length_penalty


def refusal(prompt_tokens: int, max_tokens: int, width: int, block_size: int, pool_blocks: int) -> str | None:
    """Why so many beams can never be served, in one line; None if they can.

    They move together, so all must fit: what they surely share is the full blocks of the prompt.
    """
    shared = prompt_tokens // block_size
    # The last token of a sequence is never computed.
    own = blocks_for(prompt_tokens + max_tokens - 1, block_size) - shared
    need = shared + width * own
    if need <= pool_blocks:
        return None
    return (
        f"Too large: {width} beams of {prompt_tokens} prompt tokens and {max_tokens} more need up to {need} "
        f"KV blocks of {block_size} tokens, and the engine has {pool_blocks}. Ask for fewer beams or tokens."
    )


class BeamGroup:
    """The beams of one request. `family`: as many requests as there are beams, the first to be queued."""

    def __init__(self, family: Sequence[Request]) -> None:
        self.family = list(family)
        self.live = [self.family[0]]
        """Those that carry a beam, best first. The first of them leads: it waits for them all."""
        self.finished: list[Hypothesis] = []
        """Best first, at most `width`."""
        self._candidates: dict[int, Candidates] = {}
        for one in family:
            one.group = self

    @property
    def width(self) -> int:
        return len(self.family)

    @property
    def wanted(self) -> int:
        """Candidates that each beam must bring: among so many, `width` go on however many end."""
        return 2 * self.width

    @property
    def holding(self) -> list[Request]:
        """Beams that run."""
        return [beam for beam in self.live if beam.blocks]

    @property
    def ready(self) -> bool:
        """Whether every beam has brought its candidates."""
        return len(self._candidates) == len(self.live)

    def promised(self, request: Request) -> int:
        """Places beside `request` that are to run and do not yet, if it leads; otherwise 0."""
        return self.width - max(1, len(self.holding)) if request is self.live[0] else 0

    def resumes(self, request: Request) -> bool:
        """Whether `request` leads beams back from a preemption and it is the next one's turn."""
        if request is not self.live[0]:
            return False
        holding = self.holding
        return 0 < len(holding) < len(self.live) and all(beam.id in self._candidates for beam in holding)

    def next_back(self) -> tuple[Request, Request, int]:
        """The next to resume, the one that runs already and has most in common with it, and how much."""
        holding = self.holding
        beam = next(beam for beam in self.live if not beam.blocks)
        common, _number, source = max(
            (_common(beam.tokens, other.tokens), -number, other) for number, other in enumerate(holding)
        )
        return beam, source, common

    def preempted(self) -> Request:
        """None of them holds anything any more; who is to wait for them all."""
        self._candidates.clear()
        return self.live[0]

    def hold(self, request: Request, candidates: Candidates) -> None:
        """These may follow the beam that `request` carries, all of which is computed."""
        self._candidates[request.id] = candidates

    def choose(self, eos: frozenset[int]) -> list[Heir]:
        """Who lives on, best first; nobody when the search is over. Once, when `ready`."""
        sampling = self.family[0].sampling
        best = sorted(
            (
                Heir(beam, token, beam.logprob + logprob)
                for beam in self.live
                for token, logprob in self._candidates[beam.id]
            ),
            key=attrgetter("logprob"),
            reverse=True,
        )[: self.wanted]
        self._candidates.clear()
        ends = frozenset() if sampling.ignore_eos else eos
        heirs = []
        for heir in best:
            if heir.token in ends:
                self._finish(heir, "stop")
            elif heir.parent.output_left == 1:
                self._finish(heir, "length")
            else:
                heirs.append(heir)
        self.finished.sort(key=attrgetter("score"), reverse=True)
        del self.finished[self.width :]
        return [] if not heirs or self._enough(heirs[0]) else heirs[: self.width]

    def move(self, heirs: Sequence[Heir], runner: Runner) -> None:
        """Let the heirs take the places of those that were."""
        parents = {heir.parent.id for heir in heirs}
        for beam in self.live:
            if beam.id not in parents:
                runner.remove(beam)
        places = [one for one in self.family if one.id not in parents]
        self.live, stayed = [], []
        for heir in heirs:
            parent = place = heir.parent
            if parent.id in parents:  # Its first heir stays where it is; it moves on once all are forked.
                parents.remove(parent.id)
                stayed.append(heir)
            else:
                place = places.pop(0)
                place.tokens = [*parent.tokens, heir.token]
                place.logprob, place.recompute_until = heir.logprob, parent.recompute_until
                runner.fork(parent, place)
            self.live.append(place)
        for heir in stayed:
            heir.parent.tokens.append(heir.token)
            heir.parent.logprob = heir.logprob

    def settle(self, runner: Runner) -> None:
        """The search is over: the best finished sequences, in order, to the family."""
        self.dissolve(runner)
        for one, hypothesis in zip(self.family, self.finished, strict=True):
            one.tokens, one.logprob = hypothesis.tokens, hypothesis.logprob
            one.first_scheduled_ns = self.family[0].first_scheduled_ns

    def dissolve(self, runner: Runner) -> None:
        """Give everything back. Nothing happens the second time."""
        for beam in self.holding or self.live[:1]:
            runner.remove(beam)
        self.live = []

    def _finish(self, heir: Heir, finish: str) -> None:
        tokens = [*heir.parent.tokens, heir.token]
        length = len(tokens) - (finish == "stop")
        result = score(heir.logprob, length, heir.parent.sampling.length_penalty)
        self.finished.append(Hypothesis(tokens, heir.logprob, result, finish))

    def _enough(self, best: Heir) -> bool:
        """Whether what is finished need not wait for what lives on, `best` first."""
        if len(self.finished) < self.width:
            return False
        sampling = best.parent.sampling
        if sampling.early_stopping is True:
            return True
        length = len(best.parent.tokens) + 1
        if sampling.early_stopping == "never" and sampling.length_penalty > 0:
            # The longer, the better for the same log-probability, which itself can only fall.
            length = len(best.parent.prompt) + sampling.max_tokens
        return self.finished[-1].score >= score(best.logprob, length, sampling.length_penalty)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens that two sequences have in common."""
    for count, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return count
    return min(len(one), len(other))
