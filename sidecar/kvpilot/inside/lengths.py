"""How long will a running request go on? One table of output lengths, and what it says about KV demand.

The table holds the last `WINDOW` finished output lengths and a thin prior spread evenly up to `max_tokens`.
It is always read *conditioned on survival*: a request that has generated g tokens is compared with those that
went beyond g, so that a long request is not predicted to end at once because most are short. Nothing is
sticky: after `WINDOW` more finishes no trace of a bad hour is left.

The prior is a few imaginary requests: alone they are the whole table (remaining = q of what `max_tokens`
leaves), beside a full window they only speak for lengths that nobody has been seen to exceed.

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

PRIOR_REQUESTS = 8
"""Imaginary requests that the prior counts for."""

_Z90 = 1.2815515655446004
"""The standard normal's 90 % quantile."""


class BlockDemand(NamedTuple):
    """KV blocks that the running requests will hold at one horizon, as quantiles; p10 <= p50 <= p90."""

    p10: float
    p50: float
    p90: float


class LengthPredictor:
    """Output lengths of one engine; see the module docstring."""

    def __init__(self, max_tokens: int, window: int = WINDOW) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: must be at least 1")
        if window < 1:
            raise ValueError(f"window={window}: must be at least 1")
        self._max_tokens = max_tokens
        self._window = window
        self._recent: deque[int] = deque()
        # Quantile midpoints of a uniform law on 1..max_tokens: the last of them never equals max_tokens + 1.
        self._lengths = sorted(ceil((i + 0.5) / PRIOR_REQUESTS * max_tokens) for i in range(PRIOR_REQUESTS))

    def observe(self, output_tokens: int) -> None:
        """A request finished with this many output tokens (clipped to 1..max_tokens)."""
        length = min(max(output_tokens, 1), self._max_tokens)
        if len(self._recent) == self._window:
            oldest = self._recent.popleft()
            del self._lengths[bisect_right(self._lengths, oldest) - 1]
        self._recent.append(length)
        insort(self._lengths, length)

    def remaining(self, generated: int, q: float) -> int:
        """The q-quantile of tokens still to come after `generated`, given that the request still runs.

        At least 1 while `generated < max_tokens`, 0 from there on, never beyond `max_tokens`; rises with q.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q={q}: must be in 0..1")
        left = self._max_tokens - generated
        if left <= 0:
            return 0
        if not self._recent:
            return max(1, ceil(q * left))
        first = bisect_right(self._lengths, generated)
        survivors = len(self._lengths) - first
        if survivors == 0:  # beyond even the prior's last point: spread over what is left
            return max(1, ceil(q * left))
        rank = min(max(ceil(q * survivors), 1), survivors)
        return self._lengths[first + rank - 1] - generated

    def demand(
        self,
        running: Iterable[tuple[int, int]],
        block_size: int,
        horizons: Sequence[int] = HORIZONS,
    ) -> tuple[BlockDemand, ...]:
        """Blocks that `running` will hold after each of `horizons` steps at a token a step.

        `running` yields (tokens that the sequence occupies once its prompt is computed, tokens generated so
        far). A sequence that ends before the horizon holds nothing there: a sum of independent yes/no
        holdings, read through its mean and variance. (The sum of per-request quantiles would be a quantile of
        no sum.)
        """
        lengths = self._lengths
        total = len(lengths)
        means = [0.0] * len(horizons)
        variances = [0.0] * len(horizons)
        most = [0] * len(horizons)
        rest = block_size - 1
        for held, generated in running:
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


def _quantiles(mean: float, variance: float, most: int) -> BlockDemand:
    spread = _Z90 * sqrt(variance)
    middle = min(mean, float(most))  # the sum of floats may exceed the exact bound by a rounding
    return BlockDemand(max(middle - spread, 0.0), middle, min(middle + spread, float(most)))
