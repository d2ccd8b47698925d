"""The valve's law: which request is turned away. A pure object, fed with controls pages and times.

- A lease on `shed_fraction` sheds its share of every (class, tenant) in its scope, counted out by a
deterministic accumulator: after n requests at fraction f the number shed differs from n x f by less than one.
Where several leases fit a request the largest fraction holds. A class above the one named is never touched.
- A lease that lapses opens linearly over OPENING_NS from the moment of lapse, so that a pilot's death lets
the crowd in gradually; while the page cannot be read, every lease counts as lapsed at the first failed read.
A lease that a newer page no longer lists is gone at once: someone alive decided that.
- Who is turned away is told when to come back. Nobody knows how long an overload lasts; the best guess
without a forecast is "as long again as it has lasted", jittered by half so that clients do not return
together.

`admit` is O(leases in force); memory is bounded.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

from kvpilot.clock import NS
from kvpilot.link.controls import TTL_MAX_NS, Lease, LeaseBook

SHED_FRACTION = "shed_fraction"
OPENING_NS = 10 * NS

RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 60.0
_JITTER = 0.5

_WHOLE = 1 << 32
"""One request in the accumulators: integers, so that no rounding adds up over millions of requests."""

_GOLDEN = 2654435769
"""_WHOLE over the golden ratio: first steps of new accumulators are spread evenly, or a thousand tenants with
one request each would all be let in at any fraction below 1."""

_MAX_ACCUMULATORS = 4096


class Decision(NamedTuple):
    """What to do with one request. `status`, `retry_after_s` and `reason` matter when it is turned away."""

    admitted: bool
    status: int = 200
    retry_after_s: float = 0.0
    reason: str = ""


_ADMIT = Decision(True)


@dataclass(slots=True)
class _Shedding:
    """A lease that sheds, or did until it lapsed."""

    lease: Lease
    expires_ns: int
    since_ns: int
    """When shedding of this scope began, over all renewals."""

    def covers(self, level: int, tenant: str) -> bool:
        kind, argument = self.lease.scope
        if kind == "class_at_most":
            return isinstance(argument, int) and level <= argument
        return kind == "all" or (kind == "tenant" and tenant == argument)

    def fraction(self, now_ns: int, unreadable_ns: int | None) -> float:
        lapse_ns = self.expires_ns if unreadable_ns is None else min(self.expires_ns, unreadable_ns)
        value = min(max(self.lease.value, 0.0), 1.0)
        if now_ns < lapse_ns:
            return value
        return value * max(1.0 - (now_ns - lapse_ns) / OPENING_NS, 0.0)


class ValveLaw:
    """See the module docstring. `rng` jitters `Retry-After` and nothing else."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._book = LeaseBook(None)
        self._sheddings: list[_Shedding] = []
        self._unreadable_ns: int | None = None
        self._owed: dict[tuple[int, str], int] = {}
        self._next_phase = _WHOLE // 2
        self._draining = False

    @property
    def controls_sequence(self) -> int:
        """Sequence of the controls page last understood; 0 before the first."""
        return self._book.sequence

    @property
    def page_error(self) -> str | None:
        """One line about why the controls page cannot be read, for as long as it cannot."""
        return self._book.error

    def observe(self, page: bytes | memoryview, now_ns: int) -> None:
        """Take in one read of the controls page; empty when there was nothing to read."""
        changed = self._book.observe(page, now_ns)
        if self._book.error is not None:
            if self._unreadable_ns is None:
                self._unreadable_ns = now_ns
            return
        if self._unreadable_ns is not None:
            self._settle(self._unreadable_ns, now_ns)
            self._unreadable_ns = None
        if changed:
            self._take(now_ns)

    def _settle(self, unreadable_ns: int, now_ns: int) -> None:
        """Readable again: what ran out meanwhile lapsed when reading failed, and opens from there on."""
        for one in self._sheddings:
            if one.expires_ns <= now_ns:
                one.expires_ns = min(one.expires_ns, unreadable_ns)

    def _take(self, now_ns: int) -> None:
        """Bring what sheds in line with the leases in force."""
        known = {one.lease.scope: one for one in self._sheddings}
        current = []
        for lease in self._book.in_force(now_ns):
            if lease.knob != SHED_FRACTION:
                continue
            old = known.pop(lease.scope, None)
            if old is not None and old.lease.renewal == lease.renewal:
                current.append(old)
                continue
            # The book honours a lease from the read that shows a new renewal: its term starts now.
            expires_ns = now_ns + min(lease.ttl_ns, TTL_MAX_NS)
            current.append(_Shedding(lease, expires_ns, old.since_ns if old else now_ns))
        # Not in force and past its term: lapsed, still opening. Not in force within its term: withdrawn.
        current += [one for one in known.values() if one.expires_ns <= now_ns < one.expires_ns + OPENING_NS]
        self._sheddings = current

    def drain(self) -> None:
        """From here on nothing is admitted: 503, without asking anyone."""
        self._draining = True

    def fraction(self, level: int, tenant: str, now_ns: int) -> float:
        """The share of this caller's requests that is being shed now."""
        return self._strongest(level, tenant, now_ns)[0]

    def _strongest(self, level: int, tenant: str, now_ns: int) -> tuple[float, _Shedding | None]:
        best, by = 0.0, None
        for one in self._sheddings:
            if one.covers(level, tenant):
                fraction = one.fraction(now_ns, self._unreadable_ns)
                if fraction > best:
                    best, by = fraction, one
        return best, by

    def admit(self, level: int, tenant: str, body_bytes: int, now_ns: int) -> Decision:
        """Judge one request. (`body_bytes` is what credits will charge; a fraction treats all sizes alike, or
        it would shed the long ones first.)
        """
        if self._draining:
            return Decision(False, 503, self._jittered(RETRY_AFTER_MIN_S), "the server is shutting down")
        if not self._sheddings:
            return _ADMIT
        fraction, by = self._strongest(level, tenant, now_ns)
        if by is None:
            return _ADMIT
        key = (level, tenant)
        owed = self._owed.get(key)
        if owed is None:
            key, owed = self._first(key)
        owed += round(fraction * _WHOLE)
        if owed < _WHOLE:
            self._owed[key] = owed
            return _ADMIT
        self._owed[key] = owed - _WHOLE
        lasted_s = (now_ns - by.since_ns) / NS
        reason = f"{fraction:.0%} of such requests are being shed (decision {by.lease.decision_id})"
        return Decision(False, 429, self._jittered(lasted_s), reason)

    def _first(self, key: tuple[int, str]) -> tuple[tuple[int, str], int]:
        """Where a new accumulator starts; beyond the bound, all newcomers of a class share one."""
        if len(self._owed) >= _MAX_ACCUMULATORS:
            key = (key[0], "")
            if key in self._owed:
                return key, self._owed[key]
        phase, self._next_phase = self._next_phase, (self._next_phase + _GOLDEN) % _WHOLE
        return key, phase

    def _jittered(self, seconds: float) -> float:
        """Around `seconds`, up to half of it earlier or later, always within 1-60 s: the middle is bounded
        first, so that jitter is never cut off and nobody piles up at either end.
        """
        middle = min(max(seconds, RETRY_AFTER_MIN_S / (1 - _JITTER)), RETRY_AFTER_MAX_S / (1 + _JITTER))
        return middle * self._rng.uniform(1 - _JITTER, 1 + _JITTER)
