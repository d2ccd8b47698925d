"""How many drafts a target accepts, without a model.

Every draw is a function of the request's seed and the output position alone: the draft of position p of a
request stands or falls the same way in every leg, however many drafts were proposed around it and when. So
two settings differ by what they do and not by their luck, and a run can be repeated.

A process gives the probability that one draft is accepted; drafts are judged in order, and the first that is
rejected ends the round (as `kvpilot.link`'s records count it).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

_MASK = 2**64 - 1


class Acceptance(Protocol):
    """Probability that one draft is accepted."""

    def rate(self, domain: str, depth: int, at_s: float) -> float:
        """Of a draft `depth` places (from 0) after the last token, of a prompt about `domain`, at `at_s` of
        the run. In 0..1.
        """
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same for every draft."""

    alpha: float

    def __post_init__(self) -> None:
        _check("alpha", self.alpha)

    def rate(self, domain: str, depth: int, at_s: float) -> float:
        return self.alpha


@dataclass(frozen=True, slots=True)
class ByDomain:
    """By what the prompt is about: code is guessed more often than prose."""

    alphas: Mapping[str, float]
    otherwise: float

    def __post_init__(self) -> None:
        for domain, alpha in self.alphas.items():
            _check(f"alphas[{domain}]", alpha)
        _check("otherwise", self.otherwise)

    def rate(self, domain: str, depth: int, at_s: float) -> float:
        return self.alphas.get(domain, self.otherwise)


@dataclass(frozen=True, slots=True)
class Drifting:
    """Another process, times a factor that moves along straight lines between (second, factor) points."""

    of: Acceptance
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        times = [at_s for at_s, _ in self.points]
        if not times or times != sorted(set(times)) or any(factor < 0 for _, factor in self.points):
            raise ValueError(f"points={self.points}: at least one, times ascending, factors not below 0")

    def rate(self, domain: str, depth: int, at_s: float) -> float:
        return min(1.0, self.of.rate(domain, depth, at_s) * self._factor(at_s))

    def _factor(self, at_s: float) -> float:
        for (left_s, left), (right_s, right) in pairwise(self.points):
            if left_s <= at_s < right_s:
                return left + (right - left) * (at_s - left_s) / (right_s - left_s)
        return self.points[0][1] if at_s < self.points[0][0] else self.points[-1][1]


@dataclass(frozen=True, slots=True)
class Deepening:
    """Another process, times `factor` for every place deeper: a draft stands on drafts that may be wrong."""

    of: Acceptance
    factor: float

    def __post_init__(self) -> None:
        _check("factor", self.factor)

    def rate(self, domain: str, depth: int, at_s: float) -> float:
        return self.of.rate(domain, depth, at_s) * self.factor**depth


def accepted(
    process: Acceptance, domain: str, seed: int, position: int, drafts: int, at_s: float = 0.0
) -> int:
    """How many of `drafts` stand, the first of them for output position `position` of the request."""
    for depth in range(drafts):
        if uniform(seed, position + depth) >= process.rate(domain, depth, at_s):
            return depth
    return drafts


def uniform(seed: int, index: int) -> float:
    """In [0, 1): the draw of this number and no other (the finaliser of splitmix64 over both)."""
    z = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1342543DE82EF95) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def _check(name: str, alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"{name}={alpha}: a probability, 0 to 1")
