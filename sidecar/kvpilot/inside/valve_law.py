"""The valve's law: which request is turned away. A pure object, fed with controls pages and times.

Two forms of lease, and a request has to pass both:

- *fraction*: a lease on `shed_fraction` sheds its share of every (class, tenant) in its scope, counted out,
  not thrown (`counted`). Where several match, the largest holds.
- *credits*: a lease on `admission_credits` lets in so many prompt tokens in its scope until it is renewed
  (`credits`). Where several match, there must be something left in each of them, and each is charged.
  Requests that a fraction sheds are not charged, so the fewest that either form lets in are what is let in.

A class above the one named is never touched. A lapsed lease opens linearly over OPENING_NS (`valve_leases`):
of a fraction less and less is shed; of credits what was left may still be used up, and of those requests
that find nothing left, fewer and fewer are turned away.

Who is turned away is told when to come back. Nobody knows how long an overload lasts; without a scale of its
own (a prior of 1/t) one that has lasted t is over after x more with a chance of x / (t + x). Whoever comes
back while it lasts waits in vain and takes the place of one who would not, so x is `PATIENCE` times t: nine
in ten are over by then. Jittered by half, so that clients do not return together.

`admit` is O(leases in force); memory is bounded.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from kvpilot.clock import NS
from kvpilot.inside.counted import Counted
from kvpilot.inside.credits import BYTES_PER_TOKEN, PromptSizes
from kvpilot.inside.shares import Claim, Shares, Sibling
from kvpilot.inside.valve_leases import (
    ADMISSION_CREDITS,
    OPENING_NS,
    PROMPT_BYTES_PER_TOKEN,
    SHED_FRACTION,
    HeldLease,
    ValveLeases,
)
from kvpilot.link.valve_page import LeaseEcho

__all__ = ["OPENING_NS", "SHED_FRACTION", "Decision", "ValveLaw"]

RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 60.0
_JITTER = 0.5
PATIENCE = 9.0
"""Times as long as the overload has lasted."""
AHEAD_NS = 1 * NS
"""It had lasted so long, at least, before the first was turned away: a queue had to grow first."""
OVER_NS = 5 * NS
"""An overload is over when nobody was turned away for so long. Credits come ten times a second, and in most
tenths somebody finds some: that is no end of it.
"""


class Decision(NamedTuple):
    """What to do with one request, and what it was taken for. `status`, `retry_after_s`, `reason` (for
    people) and `why` (one of `valve_layout.SHED`) matter when it is turned away.
    """

    admitted: bool
    status: int = 200
    retry_after_s: float = 0.0
    reason: str = ""
    why: str = ""
    body_bytes: int = 0
    tokens: int = 0


class ValveLaw:
    """See the module docstring. `rng` jitters `Retry-After` and nothing else; `born_ns`: see `Shares`."""

    def __init__(self, rng: random.Random, born_ns: int = 0) -> None:
        self._rng = rng
        self._shares = Shares(born_ns)
        self._leases = ValveLeases(self._shares.usable)
        self._sizes = PromptSizes()
        self._fractions = Counted()
        self._openings = Counted()
        self._overloads: dict[int, tuple[int, int]] = {}
        """By class level: since when, and until when, requests found no credits."""
        self._draining = False

    @property
    def controls_sequence(self) -> int:
        """Sequence of the controls page last understood; 0 before the first."""
        return self._leases.sequence

    @property
    def page_error(self) -> str | None:
        """One line about why the controls page cannot be read, for as long as it cannot."""
        return self._leases.error

    def observe(self, page: bytes | memoryview, now_ns: int) -> None:
        """Take in one read of the controls page; empty when there was nothing to read."""
        self._leases.observe(page, now_ns)

    def look(self, siblings: Sequence[Sequence[LeaseEcho]], now_ns: int) -> None:
        """Take in what every live sibling's page echoes: at most once in `shares.LOOK_NS`, and before the
        next time our own echoes must be on our page.
        """
        views: list[Sibling] = [
            {
                lease.scope: Claim(lease.share, lease.rate)
                for lease in echoes
                if lease.knob == ADMISSION_CREDITS
            }
            for echoes in siblings
        ]
        credits = self._leases.on(ADMISSION_CREDITS)
        self._shares.look(now_ns, {held.lease.scope: held.offered for held in credits}, views)

    def drain(self) -> None:
        """From here on nothing is admitted: 503, without asking anyone."""
        self._draining = True

    def admit(self, level: int, tenant: str, body_bytes: int | None, now_ns: int) -> Decision:
        """Judge one request; None for a body of unknown length. (A fraction treats all sizes alike, or it
        would shed the long ones first; so do credits, which only count them.)
        """
        size = self._sizes.body_bytes(body_bytes)
        tokens = self._sizes.tokens(size, self.bytes_per_token(now_ns))
        credits: list[HeldLease] = []
        refusal = None
        if self._draining:
            reason = "the server is shutting down"
            refusal = Decision(False, 503, self._jittered(RETRY_AFTER_MIN_S), reason, "draining")
        elif self._leases.held:
            for held in self._leases.on(ADMISSION_CREDITS):
                if held.matches(level, tenant):
                    held.offered += tokens
            credits = self._leases.matching(ADMISSION_CREDITS, level, tenant)
            refusal = self._by_fraction(level, tenant, now_ns) or self._by_credits(
                credits, level, tenant, now_ns
            )
        if refusal is not None:
            return refusal._replace(body_bytes=size, tokens=tokens)
        for held in credits:
            # An opening lease lets requests in for which nothing was left: those are nobody's debt.
            if held.bucket.is_open:
                held.bucket.charge(tokens)
        return Decision(True, body_bytes=size, tokens=tokens)

    def _by_fraction(self, level: int, tenant: str, now_ns: int) -> Decision | None:
        fraction, by = self._strongest(level, tenant, now_ns)
        if by is None or not self._fractions.is_due((level, tenant), fraction):
            return None
        reason = f"{fraction:.0%} of such requests are being shed (decision {by.lease.decision_id})"
        return self._refusal(by.since_ns, now_ns, reason, "fraction")

    def _by_credits(
        self, credits: Sequence[HeldLease], level: int, tenant: str, now_ns: int
    ) -> Decision | None:
        share, by = 0.0, None
        for held in credits:
            strength = 0.0 if held.bucket.is_open else self._leases.strength(held, now_ns)
            if strength > share:
                share, by = strength, held
        if by is None or (share < 1.0 and not self._openings.is_due((level, tenant), share)):
            return None
        since_ns, until_ns = self._overloads.get(level, (now_ns, now_ns))
        if now_ns - until_ns > OVER_NS:
            since_ns = now_ns
        self._overloads[level] = (since_ns, now_ns)
        reason = f"no credits are left for such requests for now (decision {by.lease.decision_id})"
        return self._refusal(since_ns, now_ns, reason, "credits")

    def _refusal(self, since_ns: int, now_ns: int, reason: str, why: str) -> Decision:
        lasted_s = (now_ns - since_ns + AHEAD_NS) / NS
        return Decision(False, 429, self._jittered(PATIENCE * lasted_s), reason, why)

    def _jittered(self, seconds: float) -> float:
        """Around `seconds`, up to half of it earlier or later, always within 1-60 s: the middle is bounded
        first, so that jitter is never cut off and nobody piles up at either end.
        """
        middle = min(max(seconds, RETRY_AFTER_MIN_S / (1 - _JITTER)), RETRY_AFTER_MAX_S / (1 + _JITTER))
        return middle * self._rng.uniform(1 - _JITTER, 1 + _JITTER)

    # What is in force, for the valve's page.

    def fraction(self, level: int, tenant: str, now_ns: int) -> float:
        """The share of this caller's requests that is being shed now by fractions."""
        return self._strongest(level, tenant, now_ns)[0]

    def _strongest(self, level: int, tenant: str, now_ns: int) -> tuple[float, HeldLease | None]:
        best, by = 0.0, None
        for held in self._leases.matching(SHED_FRACTION, level, tenant):
            fraction = min(max(held.lease.value, 0.0), 1.0) * self._leases.strength(held, now_ns)
            if fraction > best:
                best, by = fraction, held
        return best, by

    def credits_left(self, level: int, tenant: str, now_ns: int) -> float:
        """Prompt tokens of this caller that this process may still accept; not a number without a limit."""
        matching = self._leases.matching(ADMISSION_CREDITS, level, tenant)
        limits = [held.bucket.left for held in matching if self._leases.strength(held, now_ns)]
        return min(limits, default=math.nan)

    def bytes_per_token(self, now_ns: int) -> float:
        """What bodies are charged by."""
        for held in self._leases.on(PROMPT_BYTES_PER_TOKEN):
            if held.lease.value > 0 and self._leases.is_in_force(held, now_ns):
                return held.lease.value
        return BYTES_PER_TOKEN

    def echoes(self, now_ns: int) -> list[LeaseEcho]:
        """Every lease as it is obeyed now."""
        return [self._echo(held, now_ns) for held in self._leases.held]

    def _echo(self, held: HeldLease, now_ns: int) -> LeaseEcho:
        lease, opened = held.lease, 1.0 - self._leases.strength(held, now_ns)
        echo = LeaseEcho(
            lease.knob, lease.scope, lease.value, opened, order=lease.order, decision_id=lease.decision_id
        )
        if lease.knob != ADMISSION_CREDITS:
            return echo
        claim = self._shares.claimed(lease.scope)
        return echo._replace(left=held.bucket.left, share=claim.share, rate=claim.rate)
