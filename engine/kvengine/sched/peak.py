"""The peak of KV demand: how many blocks what runs will hold at most, with one more beside it.

How long a request goes on is not known; `kvpilot.inside.lengths` knows how long those went on that came as
far.
Each request is taken as `OUTCOMES` equally likely ends, none beyond its own `max_tokens`; until its end it
grows by a token a step, in whole blocks of its own precision, and then holds nothing. Requests end
independently, so that the demand in any span of steps ahead has a mean and a variance that are sums over
requests, and its pessimistic quantile is mean + z x deviation, but never more than if all went on to their
`max_tokens`. The law looks at the worst span.

It is the quantile of the sum that counts: peaks of single requests do not meet, and a sum of quantiles would
refuse what fits easily. Lengths conditioned on survival and the peak over future ends are the Past-Future
scheduler's (arXiv 2507.10150); the Gaussian quantile of a sum of independent on-off sources is the equivalent
capacity of Guerin, Ahmadi and Naghshineh (IEEE JSAC 9(7), 1991).

Nothing is carried from one reading to the next: a bad hour lives only as long as in the predictor's tables.
Blocks that several hold, or that are pinned, count once, as held throughout. O(running) a reading, O(1) for
each candidate, with `SPANS` numbers each. No torch, no clock.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from math import sqrt

from kvengine.kv.table import BlockTables, blocks_for
from kvengine.request import Request
from kvpilot.inside.lengths import LengthPredictor

OUTCOMES = 8
"""Ends of one request that are told apart."""
_MIDPOINTS = tuple((i + 0.5) / OUTCOMES for i in range(OUTCOMES))

SPANS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 1 << 40)
"""Last step of each span ahead: about as wide, seen from now, as lengths are uncertain."""

PESSIMISM = 1.2815515655446004
"""Standard normal deviate of the quantile: one time in ten demand is taken to be higher."""


def ends(request: Request, lengths: LengthPredictor) -> list[int]:
    """Tokens that a request may still emit, as equally likely outcomes, ascending; each at least 1."""
    generated, left, tenant = request.output_count, request.output_left, request.tenant or ""
    return [max(1, min(lengths.remaining(generated, q, tenant), left)) for q in _MIDPOINTS]


def growth(held: int, size: int, shared: int, outcomes: Sequence[int]) -> list[tuple[float, float]]:
    """Mean and variance of the blocks of its own that a sequence holds in each span, up to its last end.

    It has `held` tokens, the newest not computed; `size` tokens fit in a block, and `shared` of its blocks
    count elsewhere. To emit r tokens takes r steps, the last of which covers held + r - 1 positions.
    """
    curve, first, count = [], 0, len(outcomes)
    before = held - 1 + size - 1
    for last in SPANS:
        ending = bisect_right(outcomes, last, first)
        blocks = (before + last) // size - shared
        total = blocks * (count - ending)
        square = total * blocks
        for end in outcomes[first:ending]:
            # Its last step lies in this span: what it holds then is the most of it here.
            blocks = (before + end) // size - shared
            total += blocks
            square += blocks * blocks
        mean = total / count
        curve.append((mean, max(0.0, square / count - mean * mean)))
        if ending == count:
            break
        first = ending
    return curve


class PeakDemand:
    """Reads the demand of what runs, and answers for candidates."""

    def __init__(self, tables: BlockTables, lengths: LengthPredictor, z: float = PESSIMISM) -> None:
        self._tables = tables
        self._lengths = lengths
        self._z = z
        self._means = [0.0] * len(SPANS)
        self._variances = [0.0] * len(SPANS)
        self._most = 0
        """If all that run go on to their `max_tokens`."""

    def read(self, running: Iterable[Request]) -> None:
        """Forget everything, and look at what runs now."""
        self._means, self._variances, self._most = [0.0] * len(SPANS), [0.0] * len(SPANS), 0
        references, own, tails = self._tables.pool.references, 0, set()
        for request in running:
            shared = _shared(request.blocks, references)
            own += len(request.blocks) - shared
            size = self._tables.tokens_in_block(request)
            if request.tail_shared and shared * size > request.computed:
                # Each of its holders writes the rest of that block to a copy of its own, but for the last.
                shared = request.computed // size
                tails.add(request.blocks[shared])
            self._add(request, shared)
        held_throughout = self._tables.pool.referenced - own - len(tails)
        self._means = [mean + held_throughout for mean in self._means]
        self._most += held_throughout

    def with_candidate(self, request: Request, held_already: int) -> float:
        """The quantile of the peak if `request`, of whose blocks others hold so many, ran too."""
        means, variances, most = list(self._means), list(self._variances), self._most
        for curve, at_most in self._members(request, held_already):
            most += at_most
            for span, (mean, variance) in enumerate(curve):
                means[span] += mean
                variances[span] += variance
        pairs = zip(means, variances, strict=True)
        return min(most, max([mean + self._z * sqrt(variance) for mean, variance in pairs]))

    def admitted(self, request: Request) -> None:
        """It runs, and holds what the prefix cache had of it."""
        self._add(request, _shared(request.blocks, self._tables.pool.references))

    def _add(self, request: Request, shared: int) -> None:
        for curve, at_most in self._members(request, shared):
            self._most += at_most
            for span, (mean, variance) in enumerate(curve):
                self._means[span] += mean
                self._variances[span] += variance

    def _members(self, request: Request, shared: int) -> Iterator[tuple[list[tuple[float, float]], int]]:
        """The request, and its forks, which begin when its prompt is computed."""
        size = self._tables.tokens_in_block(request)
        for one in (request, *request.forks):
            held = len(one.tokens)
            most = blocks_for(held + one.output_left - 1, size) - shared
            yield growth(held, size, shared, ends(one, self._lengths)), most
            shared = len(request.prompt) // size


def _shared(blocks: Sequence[int], references: Sequence[int]) -> int:
    """How many blocks of a table others hold too: its first ones, for who holds one holds those before it."""
    return bisect_left(blocks, True, key=lambda block: references[block] < 2)
