"""When will no KV block be available, by what is known of the requests themselves?

The engine predicts the blocks that its running requests will hold some steps ahead (their survival curves,
summed in `demand_*_blocks`). What waits to be taken in, and what keeps coming, joins them: at the rate at
which prompts are served, and only into the share of the pool that admission may fill; what it grows by after
that is held back by nothing. The forecast is the first time at which the sum needs the whole pool. The band
comes from the demand's own quantiles, from chance in what comes, and from how far the service rate was off.

Blocks that only the cache holds count as available: they are given up for whoever needs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, sqrt

from kvpilot.forecast.estimate import Estimate
from kvpilot.link.fields import HORIZONS, QUANTILES
from kvpilot.link.records import StepRecord

_INF = float("inf")
_Z90 = 1.2816
_LEFT_OVER = (0.0, 0.5, 1.0)
"""Of one request's prompt, for fast, expected and slow: who waits is taken in whole, and what is left of the
pool then is less than the next one needs, half of that on average.
"""
UNKNOWN_TOKENS = 256.0
"""Prompt tokens of a request, where none was seen waiting."""


@dataclass(frozen=True, slots=True)
class Inflow:
    """What will join the running requests, in tokens and seconds."""

    waiting_tokens: float = 0.0
    """Prompts that were let in and wait for KV memory."""
    arriving_per_s: float = 0.0
    """Prompt tokens that keep coming."""
    served_per_s: float = _INF
    """Prompt tokens that the engine can take in, at most."""
    request_tokens: float = UNKNOWN_TOKENS
    """Prompt tokens of a request."""
    output_tokens: float = _INF
    """Tokens that a request emits before it ends, on average."""

    def blocks(self, seconds: float, token_s: float, block_size: int, room: float) -> tuple[float, float]:
        """(mean, deviation) of the KV blocks that it holds after `seconds`, while each of its requests emits
        a token every `token_s` from when it was taken in, and their prompts fit in `room` blocks.
        """
        come = self.waiting_tokens + self.arriving_per_s * seconds
        taken = min(come, self.served_per_s * seconds)
        if taken <= 0 or token_s <= 0:
            return 0.0, 0.0
        alive, age_s = _alive(seconds, self.output_tokens * token_s)
        each = (self.request_tokens + age_s / token_s) / block_size
        requests = min(alive * taken, room * block_size) / self.request_tokens
        # They come by chance, and their sizes differ by as much as the mean.
        return requests * each, each * sqrt(2 * requests)


def _alive(seconds: float, life_s: float) -> tuple[float, float]:
    """Of those taken in evenly over a time: the share that has not ended by its end, and their mean age; ends
    come at random, after `life_s` on average.
    """
    lives = seconds / life_s if life_s > 0 else _INF
    if lives < 1e-3:
        return 1.0, seconds / 2
    gone = exp(-lives)
    return (1 - gone) / lives, life_s * (1 - lives * gone / (1 - gone)) if life_s > 0 else 0.0


_DEMAND_FIELDS = [(horizon, tuple(f"demand_{horizon}_{q}_blocks" for q in QUANTILES)) for horizon in HORIZONS]


def demand_ahead(record: StepRecord) -> list[tuple[float, Estimate]] | None:
    """(steps from this record on, at a token a step; blocks that what runs now will hold), ascending; None
    where the engine does not predict.
    """
    if any(name not in record for _, names in _DEMAND_FIELDS for name in names):
        return None
    since = (record.get("steps_total") or 0.0) - (record.get("demand_step") or 0.0)
    return [
        (horizon - since, Estimate(*[record[name] for name in names]))
        for horizon, names in _DEMAND_FIELDS
        if horizon > since >= 0
    ]


def exhaustion(
    blocks: float,
    available: float,
    ahead: Sequence[tuple[float, Estimate]],
    token_s: float,
    block_size: int,
    inflow: tuple[Inflow, Inflow, Inflow],
    watermark: float = 1.0,
) -> Estimate:
    """Seconds until `blocks` are all held. `inflow` is fast, expected and slow; `token_s` is the time between
    two tokens of a running request; admission fills at most the share `watermark` of the pool. Infinite
    beyond the engine's last horizon.
    """
    if available <= 0:
        return Estimate(0.0, 0.0, 0.0)
    held = blocks - available
    early, middle, late = [(0.0, held)], [(0.0, held)], [(0.0, held)]
    for steps, demand in ahead:
        seconds = steps * token_s
        room = watermark * blocks - demand.p50
        (fast, _), (mean, deviation), (slow, _) = (
            each.blocks(
                seconds, token_s, block_size, max(0.0, room - share * each.request_tokens / block_size)
            )
            for share, each in zip(_LEFT_OVER, inflow, strict=True)
        )
        likely = demand.p50 + mean
        middle.append((seconds, likely))
        early.append((seconds, likely + _spread(demand.p90 - demand.p50, fast - mean, _Z90 * deviation)))
        late.append((seconds, likely - _spread(demand.p50 - demand.p10, mean - slow, _Z90 * deviation)))
    return Estimate(*sorted(_crossing(blocks, points) for points in (early, middle, late)))


def _spread(*parts: float) -> float:
    """What independent deviations make together."""
    return sqrt(sum(part * part for part in parts))


def _crossing(level: float, points: Sequence[tuple[float, float]]) -> float:
    """Where the line through `points` first reaches `level`."""
    for (start, low), (end, high) in pairwise(points):
        if high >= level:
            return start + (end - start) * (level - low) / (high - low)
    return _INF
