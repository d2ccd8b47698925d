"""The buckets of exported latencies, and the engine's histograms at these bounds."""

from bisect import bisect_left
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvpilot.clock import NS
from kvpilot.link.histogram import BUCKETS, HistogramSnapshot, bucket_bounds_ns
from kvpilot.publish.collected import Distribution

if TYPE_CHECKING:
    from prometheus_client.core import Exemplar

BUCKETS_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0),
)
"""Upper bounds of exported buckets. The page's own buckets are 3 % wide: each goes where its middle lies."""


def bound_of(index: int) -> int:
    """Which exported bucket the page's bucket `index` belongs to."""
    low, high = bucket_bounds_ns(index)
    return bisect_left(BUCKETS_S, (low + high) / 2 / NS)


BOUND_OF = tuple(map(bound_of, range(BUCKETS)))
_FIRST = tuple(
    next((index for index in range(BUCKETS) if BOUND_OF[index] > bound), BUCKETS)
    for bound in range(len(BUCKETS_S) + 1)
)
"""By exported bucket: the first of the page's buckets beyond it."""


def distribution(
    snapshot: HistogramSnapshot, exemplars: "Mapping[int, Exemplar] | None" = None
) -> Distribution:
    """The engine's histogram at the exported bounds."""
    counts, seen, start = [], 0, 0
    for end in _FIRST:
        seen += sum(snapshot.counts[start:end])
        counts.append(seen)
        start = end
    return Distribution(BUCKETS_S, counts, snapshot.sum_ns / NS, exemplars or {})
