"""What one look at a pilot gathers: samples and distributions by family, before any format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from kvpilot.publish.families import Family

if TYPE_CHECKING:
    # By name only: whoever flies in virtual time shows no page and need not load the library.
    from prometheus_client.core import Exemplar

Labels = tuple[str, ...]
_NONE: "Mapping[int, Exemplar]" = MappingProxyType({})


class Distribution(NamedTuple):
    """A histogram: cumulative counts at `bounds` and infinity; exemplars by the index of their bucket."""

    bounds: Sequence[float]
    counts: Sequence[float]
    sum: float
    exemplars: "Mapping[int, Exemplar]" = _NONE


@dataclass(slots=True)
class Collected:
    """One family and its samples."""

    family: Family
    samples: list[tuple[Labels, float]] = field(default_factory=list)
    distributions: list[tuple[Labels, Distribution]] = field(default_factory=list)
