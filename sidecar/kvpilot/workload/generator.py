"""A seeded, bursty, two-class workload, sized to the machine that will serve it.

Interactive requests have short prompts and answers and someone waiting; batch requests have long ones and
patience. Arrivals are Poisson at a base load, or a Gamma process where a coefficient of variation is given,
with bursts during which all classes come several times as fast. Load is machine time: 1.0 offers a second of
it every second, at the `Speed` that was measured. Tenants may begin their prompts with a text of their own.

The same arguments give the same arrivals on every machine; a faster machine is offered more of the same
requests. O(arrivals).
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, log

from kvpilot.workload.arrival import Arrival, Speed


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal token counts around `median`, redrawn until inside `least`..`most`."""

    median: float
    sigma: float
    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.median <= self.most:
            raise ValueError(f"{self}: need 1 <= least <= median <= most")

    def draw(self, rng: random.Random) -> int:
        # The median lies inside, so at least a fair share of draws is kept and the loop ends.
        while True:
            tokens = round(exp(rng.gauss(log(self.median), self.sigma)))
            if self.least <= tokens <= self.most:
                return tokens


@dataclass(frozen=True, slots=True)
class ClassMix:
    """One class: its share of the requests, its lengths, what its prompts are about and who sends them."""

    name: str
    share: float
    prompt: Lengths
    output: Lengths
    domains: tuple[tuple[str, float], ...]
    """(domain, weight)."""
    tenants: tuple[tuple[str, float], ...]
    prefix_tokens: int = 0
    """Of the text with which a tenant's prompts begin, before what is drawn from `prompt`; 0 for none."""
    prefix_share: float = 1.0
    """Share of the prompts that begin with it."""

    def pick_domain(self, rng: random.Random) -> str:
        return _pick(self.domains, rng)

    def pick_tenant(self, rng: random.Random) -> str:
        return _pick(self.tenants, rng)


@dataclass(frozen=True, slots=True)
class Burst:
    """`start` and `length` are shares of the run, `factor` multiplies the base load."""

    start: float
    length: float
    factor: float


INTERACTIVE = ClassMix(
    "interactive",
    0.7,
    prompt=Lengths(120, 0.6, 32, 512),
    output=Lengths(40, 0.5, 12, 128),
    domains=(("json", 0.6), ("python", 0.4)),
    tenants=(("acme", 0.5), ("globex", 0.3), ("initech", 0.2)),
)
BATCH = ClassMix(
    "batch",
    0.3,
    prompt=Lengths(700, 0.5, 256, 1400),
    output=Lengths(160, 0.5, 48, 400),
    domains=(("json", 0.4), ("python", 0.6)),
    tenants=(("hooli", 0.6), ("acme", 0.4)),
)
CLASSES = (INTERACTIVE, BATCH)

BURSTS = (Burst(0.15, 0.2, 3.5), Burst(0.6, 0.2, 3.5))
"""Two spells in which a machine at half load is offered well over what it can do."""

_BURST_JITTER = 0.05
"""Bursts start up to this share of the run early or late, by seed: no rule can learn the clock."""


def generate(
    seed: int,
    seconds: float,
    load: float,
    speed: Speed,
    classes: Sequence[ClassMix] = CLASSES,
    bursts: Sequence[Burst] = BURSTS,
    cv: float = 1.0,
) -> list[Arrival]:
    """Arrivals in order of time within `seconds`; `load` is the mean over the run, bursts included.

    Requests are drawn until their work is that of the load, then placed: a Poisson process given its count is
    that many independent points. So every seed offers the same work, and only its order and timing differ.
    `cv` is the coefficient of variation of the gaps: 1 is Poisson, above it a Gamma process clusters. A text
    that prompts share counts as work once for each tenant.
    """
    if not (seconds > 0 and load > 0 and cv > 0):
        raise ValueError(f"seconds={seconds}, load={load}, cv={cv}: each must be above 0")
    rng = random.Random(f"workload/{seed}")
    spells = _place(bursts, rng)
    shares = [mix.share for mix in classes]
    drawn: list[Arrival] = []
    begun: set[tuple[int, ...]] = set()
    left_s = load * seconds
    while left_s > 0:
        one = _arrival(rng.choices(classes, shares)[0], rng)
        cached = one.prefix_block_tokens if one.prefix in begun else 0
        begun.add(one.prefix)
        drawn.append(one)
        left_s -= speed.seconds(one.prompt_tokens - cached, one.output_tokens)
    times = sorted(_stretch(share, spells) * seconds for share in _shares_of_time(len(drawn), cv, rng))
    return [replace(one, at_s=at_s) for one, at_s in zip(drawn, times, strict=True)]


def _shares_of_time(count: int, cv: float, rng: random.Random) -> list[float]:
    """Where in the run each of `count` arrivals comes, were there no bursts: in 0..1."""
    if cv == 1.0:
        return [rng.random() for _ in range(count)]
    # The gap after the last one belongs to the run too.
    gaps = [rng.gammavariate(1 / cv**2, 1.0) for _ in range(count + 1)]
    whole, at, shares = sum(gaps), 0.0, []
    for gap in gaps[:-1]:
        at += gap
        shares.append(min(at / whole, 1.0) if whole else rng.random())
    return shares


def _place(bursts: Sequence[Burst], rng: random.Random) -> list[tuple[float, float, float]]:
    """(start, end, factor) in shares of the run, with starts moved a little and every burst inside it."""
    placed = []
    for burst in bursts:
        start = burst.start + rng.uniform(-_BURST_JITTER, _BURST_JITTER)
        start = min(max(start, 0.0), 1.0 - burst.length)
        placed.append((start, start + burst.length, burst.factor))
    return placed


def _stretch(share: float, spells: Sequence[tuple[float, float, float]]) -> float:
    """The moment (share of the run) by which `share` of the requests has come: the rate's integral,
    inverted."""
    edges = sorted({0.0, 1.0, *(start for start, _, _ in spells), *(end for _, end, _ in spells)})
    pieces = [
        (left, right, 1.0 + sum(f - 1.0 for start, end, f in spells if start <= left < end))
        for left, right in pairwise(edges)
    ]
    due = share * sum((right - left) * factor for left, right, factor in pieces)
    for left, right, factor in pieces:
        if due < (right - left) * factor:
            return left + due / factor
        due -= (right - left) * factor
    return 1.0


def _arrival(mix: ClassMix, rng: random.Random) -> Arrival:
    one = Arrival(
        0.0,
        mix.prompt.draw(rng),
        mix.output.draw(rng),
        mix.name,
        mix.pick_tenant(rng),
        mix.pick_domain(rng),
        rng.getrandbits(31),
    )
    if not mix.prefix_tokens or rng.random() >= mix.prefix_share:
        return one
    # A text of this class and tenant: its id follows from their names alone.
    prefix = (zlib.crc32(f"{mix.name}/{one.tenant}".encode()),)
    prompt_tokens = mix.prefix_tokens + one.prompt_tokens
    return replace(one, prompt_tokens=prompt_tokens, prefix=prefix, prefix_block_tokens=mix.prefix_tokens)


def _pick(weighted: Sequence[tuple[str, float]], rng: random.Random) -> str:
    names, weights = zip(*weighted, strict=True)
    return str(rng.choices(names, weights)[0])
