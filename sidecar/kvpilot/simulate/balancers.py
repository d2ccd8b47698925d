"""Who gets the next request? Balancers over replicas, with what a real one knows.

That is what it was told at the last scrape, up to a second old, and what it has itself sent since: nobody
tells it what a replica has made of that yet. Requests that a client sends again go where it was first sent.
O(log replicas) a request, or O(replicas) for `LeastKv`.
"""

import zlib
from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol, get_args

from kvpilot.simulate.scenarios import Balancer as Name
from kvpilot.workload.arrival import Arrival

NAMES: tuple[Name, ...] = get_args(Name)
POINTS = 64
"""Of each replica on the ring: shares of keys differ by about an eighth then."""
MOST_OVER_MEAN = 1.25
"""A preferred replica is passed over from this multiple of the mean occupancy on (Mirrokni, Thorup and
Zadimoghaddam, "Consistent hashing with bounded loads", 2016), but not before it is `LEAST_FULL` full.
"""
LEAST_FULL = 0.25


class Balancer(Protocol):
    """See the module docstring."""

    needs_scrapes: bool
    """Whether it looks at occupancies at all."""

    def scraped(self, occupancies: Sequence[float]) -> None:
        """KV occupancy of every replica, in 0..1, as of now."""

    def choose(self, arrival: Arrival) -> int:
        """The replica's number. It is counted as sent there."""
        ...


class RoundRobin:
    """Each in turn."""

    needs_scrapes = False

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._next = 0

    def scraped(self, occupancies: Sequence[float]) -> None:
        """Nothing that it looks at."""

    def choose(self, arrival: Arrival) -> int:
        chosen, self._next = self._next, (self._next + 1) % self._replicas
        return chosen


class ByTenant:
    """A tenant's requests all go to one replica, however full it is."""

    needs_scrapes = False

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas

    def scraped(self, occupancies: Sequence[float]) -> None:
        """Nothing that it looks at."""

    def choose(self, arrival: Arrival) -> int:
        return _hash(arrival.tenant) % self._replicas


class LeastKv:
    """Whoever had the least KV memory in use, with what was sent there since; of equals the next in turn."""

    needs_scrapes = True

    def __init__(self, replicas: int, pool_tokens: int) -> None:
        self._load = _Load(replicas, pool_tokens)
        self._next = 0

    def scraped(self, occupancies: Sequence[float]) -> None:
        self._load.scraped(occupancies)

    def choose(self, arrival: Arrival) -> int:
        load = self._load.of
        least = min(load)
        first = self._next % len(load)
        chosen = load.index(least, first) if least in load[first:] else load.index(least)
        self._next = chosen + 1
        self._load.send(chosen, arrival)
        return chosen


class PrefixAffine:
    """Prompts that begin alike go to one replica, and those without a shared beginning by tenant, by
    consistent hashing; to the next on the ring while that one is fuller than others.
    """

    needs_scrapes = True

    def __init__(self, replicas: int, pool_tokens: int) -> None:
        self._load = _Load(replicas, pool_tokens)
        self._replicas = replicas
        ring = sorted(
            (_hash(f"{number}/{point}"), number) for number in range(replicas) for point in range(POINTS)
        )
        self._points = [point for point, _ in ring]
        self._numbers = [number for _, number in ring]

    def scraped(self, occupancies: Sequence[float]) -> None:
        self._load.scraped(occupancies)

    def choose(self, arrival: Arrival) -> int:
        key = f"prefix/{arrival.prefix[0]}" if arrival.prefix else f"tenant/{arrival.tenant}"
        at, load = bisect_left(self._points, _hash(key)), self._load
        most = max(LEAST_FULL, MOST_OVER_MEAN * load.mean)
        passed: set[int] = set()
        chosen = self._numbers[at % len(self._numbers)]
        while load.of[chosen] >= most and len(passed) < self._replicas:
            passed.add(chosen)
            at += 1
            chosen = self._numbers[at % len(self._numbers)]
        load.send(chosen, arrival)
        return chosen


class _Load:
    """Occupancies as of the last scrape, and what was sent since, as shares of a replica's pool."""

    def __init__(self, replicas: int, pool_tokens: int) -> None:
        self.of = [0.0] * replicas
        self._pool_tokens = pool_tokens
        self._whole = 0.0

    @property
    def mean(self) -> float:
        return self._whole / len(self.of)

    def scraped(self, occupancies: Sequence[float]) -> None:
        self.of = list(occupancies)
        self._whole = sum(self.of)

    def send(self, number: int, arrival: Arrival) -> None:
        share = arrival.prompt_tokens / self._pool_tokens
        self.of[number] += share
        self._whole += share


def balancer_named(name: str, replicas: int, pool_tokens: int) -> Balancer:
    """`pool_tokens`: of one replica. Raises ValueError, in one line, for a name that is none."""
    if replicas < 1:
        raise ValueError(f"--replicas {replicas}: must be at least 1")
    match name:
        case "round_robin":
            return RoundRobin(replicas)
        case "least_kv":
            return LeastKv(replicas, pool_tokens)
        case "prefix_affine":
            return PrefixAffine(replicas, pool_tokens)
        case "by_tenant":
            return ByTenant(replicas)
    raise ValueError(f"--balancer {name}: known are {', '.join(NAMES)}")


def _hash(text: str) -> int:
    """The same in every process; spread by a multiplication, since CRCs of like texts lie close."""
    return (zlib.crc32(text.encode()) * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 32
