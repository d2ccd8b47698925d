"""Was the run good? Pure functions over outcomes: the one place where goodput is defined.

A request is *good* when it finished, met its time to first token, met its mean inter-token latency, had at
most 5 % of its token gaps over that target and none over 20 times it. The primary figure, `goodput_work`, is
the work of good requests over the work of *all that arrived*: shedding everything scores 0, and shedding the
longest first buys nothing. Quantiles of latency are over requests that finished, so never read them without
the counts.

Arrivals inside the window count, whenever they end; every arrival has exactly one fate. O(n log n) in tokens.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

from kvpilot.clock import NS
from kvpilot.workload.outcome import Fate, Outcome

LATE_GAPS_ALLOWED = (1, 20)
"""At most this fraction of a request's gaps may exceed the target (numerator, denominator)."""

MAX_GAP_FACTOR = 20
"""No gap may exceed the target this many times: a preemption stall hides below a p95."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What one class was promised. The time to first token grows with the prompt."""

    ttft_s: float
    itl_s: float
    ttft_s_per_prompt_token: float = 0.0

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0 and self.itl_s > 0 and self.ttft_s_per_prompt_token >= 0):
            raise ValueError(f"{self}: targets must be above 0 and ttft_s_per_prompt_token not below")

    def ttft_limit_s(self, prompt_tokens: int) -> float:
        return self.ttft_s + self.ttft_s_per_prompt_token * prompt_tokens


@dataclass(frozen=True, slots=True)
class EngineTotals:
    """What the engine counted between the start and the end of the run; outcomes cannot know these."""

    oom: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    kv_occupancy_max: float | None = None
    tail_waste_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """One leg. None means that there was nothing to measure, never zero."""

    offered: int
    finished: int
    shed: int
    failed: int
    abandoned: int
    unfinished: int
    good: int
    oom: int
    preemptions: int
    recomputed_tokens: int
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    itl_p50_s: float | None
    itl_p95_s: float | None
    tokens_per_s: float
    goodput_work: float | None
    goodput_rps: float
    goodput_per_offered: float | None
    goodput_smooth: float | None
    goodput_longest_fifth: float | None
    goodput_rest: float | None
    classes: dict[str, dict[str, float | int | None]]
    tenants: dict[str, float | None]
    """Work of good requests over work offered, by tenant."""
    slo: dict[str, dict[str, float | None]]
    """Per class: the promise, and `attained`, the share of arrivals that were good."""
    actions: int
    kv_occupancy_max: float | None
    tail_waste_ratio: float | None
    window_s: float
    r: float

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: only plain numbers, strings and None."""
        return asdict(self)


@dataclass(slots=True)
class _Sums:
    """Running totals over a group of arrivals."""

    offered: int = 0
    good: int = 0
    work: float = 0.0
    good_work: float = 0.0
    fates: dict[Fate, int] = field(default_factory=lambda: dict.fromkeys(Fate, 0))

    def add(self, outcome: Outcome, work: float, good: bool) -> None:
        self.offered += 1
        self.work += work
        self.fates[outcome.fate] += 1
        if good:
            self.good += 1
            self.good_work += work

    @property
    def by_work(self) -> float | None:
        return self.good_work / self.work if self.work else None

    @property
    def by_count(self) -> float | None:
        return self.good / self.offered if self.offered else None


def is_good(outcome: Outcome, slo: Slo) -> bool:
    """The definition. Gaps are compared as exact integers: nanoseconds against tokens x target."""
    ttft_s = outcome.ttft_s
    if outcome.fate is not Fate.FINISHED or ttft_s is None:
        return False
    if ttft_s > slo.ttft_limit_s(outcome.arrival.prompt_tokens):
        return False
    itl_ns = round(slo.itl_s * NS)
    gaps = outcome.gaps()
    tokens = sum(m for _, m in gaps)
    if sum(ns for ns, _ in gaps) > itl_ns * tokens:
        return False
    late = sum(m for ns, m in gaps if ns > itl_ns * m)
    numerator, denominator = LATE_GAPS_ALLOWED
    if late * denominator > tokens * numerator:
        return False
    return all(ns <= MAX_GAP_FACTOR * itl_ns * m for ns, m in gaps)


def smoothness(outcome: Outcome, slo: Slo) -> float:
    """In 0..1: 1 within both targets, falling linearly to 0 at twice either (after arXiv 2410.14257)."""
    ttft_s = outcome.ttft_s
    if outcome.fate is not Fate.FINISHED or ttft_s is None:
        return 0.0
    gaps = outcome.gaps()
    tokens = sum(m for _, m in gaps)
    mean_itl_s = sum(ns for ns, _ in gaps) / tokens / NS if tokens else 0.0
    ratios = (ttft_s / slo.ttft_limit_s(outcome.arrival.prompt_tokens), mean_itl_s / slo.itl_s)
    product = 1.0
    for ratio in ratios:
        product *= min(max(2.0 - ratio, 0.0), 1.0)
    return product


def score(
    outcomes: Iterable[Outcome],
    slos: Mapping[str, Slo],
    r: float,
    window: tuple[float, float],
    engine: EngineTotals | None = None,
    actions: int = 0,
) -> Score:
    """Judge the arrivals in `window` (seconds of the run, end excluded). Every class needs an SLO:
    KeyError."""
    start_s, end_s = window
    if not end_s > start_s:
        raise ValueError(f"window={window}: must end after it starts")
    engine = engine or EngineTotals()
    judged = sorted((o for o in outcomes if start_s <= o.arrival.at_s < end_s), key=lambda o: o.arrival.at_s)
    goods = [is_good(o, slos[o.arrival.klass]) for o in judged]
    works = [o.arrival.work(r) for o in judged]

    total, groups, tenants = _Sums(), {name: _Sums() for name in slos}, defaultdict[str, _Sums](_Sums)
    for outcome, good, work in zip(judged, goods, works, strict=True):
        for sums in (total, groups[outcome.arrival.klass], tenants[outcome.arrival.tenant]):
            sums.add(outcome, work, good)
    longest, rest = _longest_fifth(judged, goods, works)
    smooth = sum(w * smoothness(o, slos[o.arrival.klass]) for o, w in zip(judged, works, strict=True))

    finished = [o for o in judged if o.fate is Fate.FINISHED]
    ttfts = sorted(t for o in finished if (t := o.ttft_s) is not None)
    gaps = _sorted_gaps_s(finished)
    last_s = max([end_s, *(o.ended_at_s for o in finished)])
    return Score(
        offered=total.offered,
        finished=total.fates[Fate.FINISHED],
        shed=total.fates[Fate.SHED],
        failed=total.fates[Fate.FAILED],
        abandoned=total.fates[Fate.ABANDONED],
        unfinished=total.fates[Fate.UNFINISHED],
        good=total.good,
        oom=engine.oom,
        preemptions=engine.preemptions,
        recomputed_tokens=engine.recomputed_tokens,
        ttft_p50_s=quantile(ttfts, 0.5),
        ttft_p95_s=quantile(ttfts, 0.95),
        itl_p50_s=quantile(gaps, 0.5),
        itl_p95_s=quantile(gaps, 0.95),
        tokens_per_s=sum(o.output_tokens for o in finished) / (last_s - start_s),
        goodput_work=total.by_work,
        goodput_rps=total.good / (end_s - start_s),
        goodput_per_offered=total.by_count,
        goodput_smooth=smooth / total.work if total.work else None,
        goodput_longest_fifth=longest.by_count,
        goodput_rest=rest.by_count,
        classes={name: _class_row(sums, finished, name) for name, sums in groups.items()},
        tenants={name: sums.by_work for name, sums in sorted(tenants.items())},
        slo={name: {**asdict(slo), "attained": groups[name].by_count} for name, slo in slos.items()},
        actions=actions,
        kv_occupancy_max=engine.kv_occupancy_max,
        tail_waste_ratio=engine.tail_waste_ratio,
        window_s=end_s - start_s,
        r=r,
    )


def quantile(ordered: Sequence[float], q: float) -> float | None:
    """Nearest rank of an ascending sequence: an observed value, never an interpolation; None when empty."""
    return ordered[max(ceil(q * len(ordered)), 1) - 1] if ordered else None


def _longest_fifth(
    judged: Sequence[Outcome], goods: Sequence[bool], works: Sequence[float]
) -> tuple[_Sums, _Sums]:
    """The fifth of the arrivals with the most work, and the others. Shedding the longest first shows here."""
    longest, rest = _Sums(), _Sums()
    by_work = sorted(range(len(judged)), key=lambda i: -works[i])
    fifth = ceil(len(judged) / 5)
    for rank, i in enumerate(by_work):
        (longest if rank < fifth else rest).add(judged[i], works[i], goods[i])
    return longest, rest


def _class_row(sums: _Sums, finished: Sequence[Outcome], name: str) -> dict[str, float | int | None]:
    mine = [o for o in finished if o.arrival.klass == name]
    gaps = _sorted_gaps_s(mine)
    return {
        "offered": sums.offered,
        **{str(fate): count for fate, count in sums.fates.items()},
        "good": sums.good,
        "goodput_work": sums.by_work,
        "goodput_per_offered": sums.by_count,
        "ttft_p95_s": quantile(sorted(t for o in mine if (t := o.ttft_s) is not None), 0.95),
        "itl_p95_s": quantile(gaps, 0.95),
    }


def _sorted_gaps_s(outcomes: Iterable[Outcome]) -> list[float]:
    """Every token gap of every outcome, a step of m tokens giving m equal ones."""
    gaps: list[float] = []
    for outcome in outcomes:
        for ns, tokens in outcome.gaps():
            gaps += [ns / tokens / NS] * tokens
    gaps.sort()
    return gaps
