"""How long will a running request go on? Tables of output lengths, and what they say about KV demand.

A table holds the last finished output lengths and a thin prior. It is always read *conditioned on survival*:
a request that has generated g tokens is compared with those that went beyond g, so that a long request is not
predicted to end at once because most are short.

There is one table for the whole engine, and one for each tenant, at most `MOST_TENANTS`: those that finished
something last. A tenant with few finishes of its own is predicted by the whole. The whole's prior spreads
evenly up to `max_tokens`; a tenant's is the whole's quantiles of late, and beyond what a tenant has ever been
seen to generate the whole speaks. The prior is a few imaginary requests: beside a full window it only speaks
for lengths that nobody has been seen to exceed.

Nothing is sticky: after `WINDOW` more finishes no trace of a bad hour is left in the whole; in a tenant's
table after `TENANT_WINDOW` of its own, or `STALE_FINISHES` of the engine's where the tenant has gone quiet.

Costs: `observe` O(WINDOW) memmove, `remaining` O(log WINDOW), `demand` O(sequences x log WINDOW).
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from math import ceil, sqrt
from typing import NamedTuple

from kvpilot.link.fields import HORIZONS

WINDOW = 512
"""Finished requests remembered."""
TENANT_WINDOW = 128
"""Finished requests remembered of one tenant."""
MOST_TENANTS = 32
LEAST_OWN = 16
"""Finishes from which on a tenant is predicted by its own."""
STALE_FINISHES = 8 * WINDOW
"""A tenant's finish is forgotten when so many others came after it."""

PRIOR_REQUESTS = 8
"""Imaginary requests that the prior counts for."""
_MIDPOINTS = [(i + 0.5) / PRIOR_REQUESTS for i in range(PRIOR_REQUESTS)]
LEAN_EVERY = 8
"""A tenant looks at the whole again after so many finishes of its own."""

_Z90 = 1.2815515655446004
"""The standard normal's 90 % quantile."""

Running = tuple[int, int] | tuple[int, int, str]
"""(tokens that the sequence occupies once its prompt is computed, tokens generated so far, tenant)."""


class BlockDemand(NamedTuple):
    """KV blocks that the running requests will hold at one horizon, as quantiles; p10 <= p50 <= p90."""

    p10: float
    p50: float
    p90: float


class _Table:
    """The last `window` lengths, each with the number of its finish, and a prior, in order of length."""

    __slots__ = ("added", "lengths", "recent", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self.recent: deque[tuple[int, int]] = deque()
        self.lengths: list[int] = []
        self.added = 0

    def lean_on(self, prior: Sequence[int]) -> None:
        """Replace the prior."""
        self.lengths = sorted([*prior, *(length for _, length in self.recent)])

    def add(self, finish: int, length: int) -> None:
        if len(self.recent) == self.window:
            self._drop()
        self.added += 1
        self.recent.append((finish, length))
        insort(self.lengths, length)

    def forget_before(self, finish: int) -> None:
        while self.recent and self.recent[0][0] < finish:
            self._drop()

    def _drop(self) -> None:
        oldest = self.recent.popleft()[1]
        del self.lengths[bisect_right(self.lengths, oldest) - 1]


class LengthPredictor:
    """Output lengths of one engine; see the module docstring. `tenant` is "" for whoever has no name."""

    def __init__(self, max_tokens: int, window: int = WINDOW) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: must be at least 1")
        if window < 1:
            raise ValueError(f"window={window}: must be at least 1")
        self._max_tokens = max_tokens
        self._finishes = 0
        # Quantile midpoints of a uniform law on 1..max_tokens: the last of them never equals max_tokens + 1.
        self._whole = _Table(window)
        self._whole.lean_on([ceil(q * max_tokens) for q in _MIDPOINTS])
        self._tenants: dict[str, _Table] = {}
        """The one that finished something last is last."""

    def observe(self, output_tokens: int, tenant: str = "") -> None:
        """A request finished with this many output tokens (clipped to 1..max_tokens)."""
        length = min(max(output_tokens, 1), self._max_tokens)
        self._finishes += 1
        self._whole.add(self._finishes, length)
        if not tenant:
            return
        table = self._tenants.pop(tenant, None)
        if table is None:
            if len(self._tenants) >= MOST_TENANTS:
                del self._tenants[next(iter(self._tenants))]
            table = _Table(TENANT_WINDOW)
        table.forget_before(self._finishes - STALE_FINISHES)
        if table.added % LEAN_EVERY == 0 or not table.recent:
            whole = self._whole.lengths
            table.lean_on([whole[ceil(q * len(whole)) - 1] for q in _MIDPOINTS])
        table.add(self._finishes, length)
        self._tenants[tenant] = table

    def remaining(self, generated: int, q: float, tenant: str = "") -> int:
        """The q-quantile of tokens still to come after `generated`, given that the request still runs.

        At least 1 while `generated < max_tokens`, 0 from there on, never beyond `max_tokens`; rises with q.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q={q}: must be in 0..1")
        left = self._max_tokens - generated
        if left <= 0:
            return 0
        if not self._whole.recent:
            return max(1, ceil(q * left))
        lengths = self._lengths(tenant, generated)
        first = bisect_right(lengths, generated)
        survivors = len(lengths) - first
        if survivors == 0:  # beyond even the prior's last point: spread over what is left
            return max(1, ceil(q * left))
        rank = min(max(ceil(q * survivors), 1), survivors)
        return lengths[first + rank - 1] - generated

    def demand(
        self,
        running: Iterable[Running],
        block_size: int,
        horizons: Sequence[int] = HORIZONS,
    ) -> tuple[BlockDemand, ...]:
        """Blocks that `running` will hold after each of `horizons` steps at a token a step.

        A sequence that ends before the horizon holds nothing there: a sum of independent yes/no holdings,
        read through its mean and variance. (The sum of per-request quantiles would be a quantile of no sum.)
        """
        means = [0.0] * len(horizons)
        variances = [0.0] * len(horizons)
        most = [0] * len(horizons)
        rest = block_size - 1
        for held, generated, *tenant in running:
            lengths = self._lengths(tenant[0], generated) if tenant else self._whole.lengths
            total = len(lengths)
            survivors = total - bisect_right(lengths, generated)
            left = max(self._max_tokens - generated, 0)
            for i, horizon in enumerate(horizons):
                blocks = (held + horizon + rest) // block_size
                if survivors:
                    alive = (total - bisect_right(lengths, generated + horizon)) / survivors
                else:
                    alive = max(left - horizon, 0) / left if left else 0.0
                means[i] += alive * blocks
                variances[i] += alive * (1.0 - alive) * blocks * blocks
                most[i] += blocks
        return tuple(_quantiles(*parts) for parts in zip(means, variances, most, strict=True))

    def _lengths(self, tenant: str, generated: int) -> list[int]:
        """What a request of that tenant is compared with."""
        table = self._tenants.get(tenant)
        if table is None or len(table.recent) < LEAST_OWN or table.lengths[-1] <= generated:
            return self._whole.lengths
        fresh = table.recent[-LEAST_OWN][0] > self._finishes - STALE_FINISHES
        return table.lengths if fresh else self._whole.lengths


def _quantiles(mean: float, variance: float, most: int) -> BlockDemand:
    spread = _Z90 * sqrt(variance)
    middle = min(mean, float(most))  # the sum of floats may exceed the exact bound by a rounding
    return BlockDemand(max(middle - spread, 0.0), middle, min(middle + spread, float(most)))
