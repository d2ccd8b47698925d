"""The leases that a valve obeys, and how each of them ends.

- A lease that lapses opens linearly over OPENING_NS from the moment of lapse, so that a pilot's death lets
  the crowd in gradually; while the page cannot be read, every lease counts as lapsed at the first failed
  read.
- Credits lapse CREDITS_TTL_NS after their last renewal, however long the lease: a grant is for one tick, and
  what a dead pilot granted last must not shut everybody out for a long term.
- A lease that a newer page no longer lists is gone at once: someone alive decided that.
- A person's order outranks policies: of the leases on one knob that match a request, only orders count where
  there are any.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvpilot.clock import NS
from kvpilot.inside.credits import Bucket
from kvpilot.link.controls import TTL_MAX_NS, Lease, LeaseBook, Scope

SHED_FRACTION = "shed_fraction"
ADMISSION_CREDITS = "admission_credits"
PROMPT_BYTES_PER_TOKEN = "prompt_bytes_per_token"
OBEYED = (SHED_FRACTION, ADMISSION_CREDITS, PROMPT_BYTES_PER_TOKEN)
OPENING_NS = 10 * NS
CREDITS_TTL_NS = 2 * NS

Target = tuple[str, Scope]


@dataclass(slots=True)
class HeldLease:
    """A lease in force, or one that opens."""

    lease: Lease
    expires_ns: int
    since_ns: int
    """When this scope's lease began, over all renewals."""
    bucket: Bucket = field(default_factory=Bucket)
    offered: int = 0
    """Prompt tokens that requests in scope asked for, over all renewals."""

    @property
    def target(self) -> Target:
        """What the lease is about."""
        return self.lease.knob, self.lease.scope

    def matches(self, level: int, tenant: str) -> bool:
        """Whether a request of this class and tenant is in scope."""
        kind, argument = self.lease.scope
        if kind == "class_at_most":
            return isinstance(argument, int) and level <= argument
        return kind == "all" or (kind == "tenant" and tenant == argument)


class ValveLeases:
    """See the module docstring. `share` says which part of a grant of credits is this process's: it gets the
    scope, the tokens offered in it so far, and the time.
    """

    def __init__(self, share: Callable[[Scope, int, int], float]) -> None:
        self._share = share
        self._book = LeaseBook(None)
        self._unreadable_ns: int | None = None
        self.held: list[HeldLease] = []
        """Those in force, and those that open or have opened since the last change."""
        self._by_knob: dict[str, list[HeldLease]] = {}

    @property
    def sequence(self) -> int:
        """Sequence of the controls page last understood; 0 before the first."""
        return self._book.sequence

    @property
    def error(self) -> str | None:
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

    def is_in_force(self, held: HeldLease, now_ns: int) -> bool:
        """Whether the lease has not lapsed."""
        return now_ns < self._lapse_ns(held)

    def strength(self, held: HeldLease, now_ns: int) -> float:
        """1 while the lease is in force, then linearly down to 0."""
        lapse_ns = self._lapse_ns(held)
        return 1.0 if now_ns < lapse_ns else max(1.0 - (now_ns - lapse_ns) / OPENING_NS, 0.0)

    def on(self, knob: str) -> Sequence[HeldLease]:
        """Those on one knob."""
        return self._by_knob.get(knob, ())

    def matching(self, knob: str, level: int, tenant: str) -> list[HeldLease]:
        """The leases on `knob` that count for a request. O(leases)."""
        found = [held for held in self.on(knob) if held.matches(level, tenant)]
        if len(found) < 2:
            return found
        return [held for held in found if held.lease.order] or found

    def _lapse_ns(self, held: HeldLease) -> int:
        return held.expires_ns if self._unreadable_ns is None else min(held.expires_ns, self._unreadable_ns)

    def _settle(self, unreadable_ns: int, now_ns: int) -> None:
        """Readable again: what ran out meanwhile lapsed when reading failed, and opens from there on."""
        for held in self.held:
            if held.expires_ns <= now_ns:
                held.expires_ns = min(held.expires_ns, unreadable_ns)

    def _take(self, now_ns: int) -> None:
        """Bring what is held in line with the leases in force."""
        known = {held.target: held for held in self.held}
        current = []
        for lease in self._book.in_force(now_ns):
            if lease.knob not in OBEYED:
                continue
            held = known.pop((lease.knob, lease.scope), None)
            if held is None:
                held = HeldLease(lease, 0, now_ns)
                self._renew(held, lease, now_ns)
            elif held.lease.renewal != lease.renewal:
                self._renew(held, lease, now_ns)
            current.append(held)
        # Not in force and past its term: lapsed, still opening. Not in force within its term: withdrawn.
        current += [
            held for held in known.values() if held.expires_ns <= now_ns < held.expires_ns + OPENING_NS
        ]
        self.held = current
        self._by_knob = {knob: [held for held in current if held.lease.knob == knob] for knob in OBEYED}

    def _renew(self, held: HeldLease, lease: Lease, now_ns: int) -> None:
        """The book honours a lease from the read that shows a new renewal: its term starts now."""
        held.lease = lease
        longest_ns = CREDITS_TTL_NS if lease.knob == ADMISSION_CREDITS else TTL_MAX_NS
        held.expires_ns = now_ns + min(lease.ttl_ns, longest_ns)
        if lease.knob == ADMISSION_CREDITS:
            held.bucket.refill(lease.value * self._share(lease.scope, held.offered, now_ns))
