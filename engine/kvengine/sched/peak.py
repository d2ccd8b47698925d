"""The peak of KV demand: how many blocks what runs will hold at most, with one more beside it.

How long a request goes on is not known; `kvpilot.inside.lengths` knows how long those went on that came as
far. Each request is taken as `OUTCOMES` equally likely ends, none beyond its own `max_tokens`; until its end
it grows by a token a step, in whole blocks of its own precision, and then holds nothing. Requests end
independently of each other, so that demand at any step ahead has a mean and a variance that are sums over
requests; its pessimistic quantile is mean + z x deviation, but never more than if all went on to their
`max_tokens`. The law looks at the worst step, among those just before something ends.

It is the quantile of the sum that counts: peaks of single requests do not meet, and a sum of quantiles would
refuse what fits easily. Lengths conditioned on survival and the peak over future ends are the Past-Future
scheduler's (arXiv 2507.10150); the Gaussian quantile of a sum of independent on-off sources is the equivalent
capacity of Guerin, Ahmadi and Naghshineh (IEEE JSAC 9(7), 1991).

Nothing is carried from one reading to the next: a bad hour lives only as long as in the predictor's tables.
Who comes later is not counted: it is asked for then.
Blocks that several hold, or that are pinned, count once, as held throughout. O(running) a reading, O(1) for
each candidate, with `LOOKS` numbers each. No torch, no clock.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import sqrt
from typing import NamedTuple

from kvengine.kv.table import BlockTables, blocks_for
from kvengine.request import Request
from kvpilot.inside.lengths import LengthPredictor

OUTCOMES = 8
"""Ends of one request that are told apart."""
_MIDPOINTS = tuple((i + 0.5) / OUTCOMES for i in range(OUTCOMES))

UNCAPPED = 1 << 40
"""Blocks: more than any sequence has."""

LOOKS = 16
"""Moments ahead at which demand is read."""

PESSIMISM = 1.2815515655446004
"""Standard normal deviate of the quantile: one time in ten demand is taken to be higher.

By `bench/admission.py`: throughput hardly depends on it, preemptions fall with it. With room for only a
handful of requests it costs more.
"""


def ends(request: Request, lengths: LengthPredictor) -> list[int]:
    """Tokens that a request may still emit, as equally likely outcomes, ascending; each at least 1."""
    generated, left, tenant = request.output_count, request.output_left, request.tenant or ""
    return [max(1, min(lengths.remaining(generated, q, tenant), left)) for q in _MIDPOINTS]


def moments(all_ends: Sequence[int]) -> list[int]:
    """Steps ahead at which to look, ascending: the next one, and ends that divide all of them evenly.

    Demand only falls where something ends, so that it is highest just there.
    """
    ordered, count = sorted(all_ends), len(all_ends)
    return sorted({1, *(ordered[count * look // LOOKS] for look in range(LOOKS if count else 0))})


def growth(
    held: int, size: int, shared: int, outcomes: Sequence[int], looks: Sequence[int], cap: int = UNCAPPED
) -> list[tuple[float, float]]:
    """Mean and variance of the blocks of its own that a sequence holds at each look, up to its last end.

    It has `held` tokens, the newest not computed; `size` tokens fit in a block, `shared` of its blocks count
    elsewhere, and by eviction it has `cap` of them at most. To emit r tokens takes r steps, the last of which
    covers held + r - 1 positions.
    """
    curve, ended, count = [], 0, len(outcomes)
    before = held - 1 + size - 1
    for look in looks:
        while ended < count and outcomes[ended] < look:
            ended += 1
        if ended == count:
            break
        blocks = min((before + look) // size, cap) - shared
        alive = (count - ended) / count
        mean = alive * blocks
        curve.append((mean, mean * blocks - mean * mean))
    return curve


class PeakDemand:
    """Reads the demand of what runs, and answers for candidates."""

    def __init__(self, tables: BlockTables, lengths: LengthPredictor) -> None:
        self._tables = tables
        self._lengths = lengths
        self._looks: list[int] = []
        self._means: list[float] = []
        self._variances: list[float] = []
        self._most = 0
        """If all that run go on to their `max_tokens`."""

    def read(self, running: Iterable[Request], candidate: Request | None = None) -> None:
        """Forget everything, and look at what runs now; where to look, `candidate` has a say in too."""
        references, own, tails = self._tables.pool.references, 0, set()
        members: list[_Member] = []
        for request in running:
            shared = shared_blocks(request.blocks, references)
            own += len(request.blocks) - shared
            size = self._tables.tokens_in_block(request)
            if request.tail_shared and shared * size > request.computed:
                # Each of its holders writes the rest of that block to a copy of its own, but for the last.
                shared = request.computed // size
                tails.add(request.blocks[shared])
            members += self._members(request, shared)
        held_throughout = self._tables.pool.referenced - own - len(tails)
        asking = [] if candidate is None else self._members(candidate, 0)
        self._looks = moments([end for member in chain(members, asking) for end in member.ends])
        self._means = [float(held_throughout)] * len(self._looks)
        self._variances = [0.0] * len(self._looks)
        self._most = held_throughout
        self._add(members)

    def with_candidate(self, request: Request, held_already: int, z: float = PESSIMISM) -> float:
        """The quantile of the peak if `request`, of whose blocks others hold so many, ran too."""
        before = self._means, self._variances, self._most
        self._means, self._variances = list(self._means), list(self._variances)
        self._add(self._members(request, held_already))
        peak = self.peak(z)
        self._means, self._variances, self._most = before
        return peak

    def admitted(self, request: Request) -> None:
        """It runs, and holds what the prefix cache had of it."""
        self._add(self._members(request, shared_blocks(request.blocks, self._tables.pool.references)))

    def peak(self, z: float = PESSIMISM) -> float:
        """The quantile at the worst moment, of what runs."""
        pairs = zip(self._means, self._variances, strict=True)
        return min(self._most, max([mean + z * sqrt(variance) for mean, variance in pairs]))

    def _add(self, members: Iterable["_Member"]) -> None:
        means, variances, looks = self._means, self._variances, self._looks
        for held, size, shared, outcomes, left, cap in members:
            self._most += min(blocks_for(held + left - 1, size), cap) - shared
            for look, (mean, variance) in enumerate(growth(held, size, shared, outcomes, looks, cap)):
                means[look] += mean
                variances[look] += variance

    def _members(self, request: Request, shared: int) -> Iterator["_Member"]:
        """The request, and its forks or beams, which begin when its prompt is computed."""
        size, outcomes = self._tables.tokens_in_block(request), ends(request, self._lengths)
        held, left, cap = len(request.tokens) - request.evicted, request.output_left, UNCAPPED
        if request.eviction is not None and request.eviction.kept is not None:
            # What it keeps and the block that it writes, or all of it for as long as that is more.
            cap = max(blocks_for(request.eviction.kept, size) + 1, blocks_for(held, size))
        yield _Member(held, size, shared, outcomes, left, cap)
        for _ in range(request.promised):
            yield _Member(held, size, len(request.prompt) // size, outcomes, left, cap)


class _Member(NamedTuple):
    """One sequence: see `growth`; `left` is what it may still emit at most."""

    held: int
    size: int
    shared: int
    ends: list[int]
    left: int
    cap: int


def shared_blocks(blocks: Sequence[int], references: Sequence[int]) -> int:
    """How many blocks of a table others hold too: its first ones, for who holds one holds those before it."""
    return bisect_left(blocks, True, key=lambda block: references[block] < 2)
