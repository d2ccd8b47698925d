"""What every forecast is: a middle and the band that eight outcomes in ten should fall into."""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple


class Estimate(NamedTuple):
    """Quantiles of what will be, in the forecast's unit; p10 <= p50 <= p90. May be infinite."""

    p10: float
    p50: float
    p90: float


def quantile(ordered: Sequence[float], q: float) -> float:
    """The least of the ascending `ordered` that at least a share `q` of them does not exceed."""
    return ordered[max(0, ceil(q * len(ordered)) - 1)]
