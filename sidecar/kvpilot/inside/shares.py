"""How several API-server processes share credits: each claims a share by the load it is offered.

A process writes its claims and its rates (prompt tokens offered a second) into its own page, reads its
siblings' at most once a second, and uses no claim that is not sure to be its alone:

- it gives up at once what it claims beyond its share of the load;
- it claims more only where the claims of all leave room, and uses the new claim only if, at its next look,
  all claims still fit. Two that claimed the same room both see it then, because both wrote before they read;
- a sibling that says nothing of a scope is left one n-th; one that cannot be read keeps what it said last;
- a process that is new beside siblings claims nothing until they must have seen it.

So the shares in use never add up to more than 1, whatever is offered to whom and whoever comes or goes.
Alone, a process has everything; without any load, all have the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvpilot.clock import NS
from kvpilot.link.controls import Scope

LOOK_NS = NS
"""A process looks at its siblings at most this often."""
NEW_NS = 3 * NS
"""By then every sibling has looked, and left room for the new one."""
RATE_NS = 5 * NS
"""Over what time a rate is averaged."""
EVEN = 0.1
"""The part of credits that is shared evenly, so that a process that was idle can accept its first request."""

_ROUNDING = 1e-9


class Claim(NamedTuple):
    """What a sibling says of one scope."""

    share: float
    rate: float


Sibling = Mapping[Scope, Claim]


@dataclass(slots=True)
class _Own:
    claim: float
    usable: float
    offered: int
    rate: float | None = None


class Shares:
    """One process's claims. `born_ns` is when its page could first be seen."""

    def __init__(self, born_ns: int) -> None:
        self._born_ns = born_ns
        self._looked_ns = born_ns
        self._siblings: Sequence[Sibling] = ()
        self._own: dict[Scope, _Own] = {}

    def usable(self, scope: Scope, offered: int, now_ns: int) -> float:
        """The share of a grant that this process may accept now. The first call claims; `offered` as in
        `look`."""
        own = self._own.get(scope)
        if own is None:
            if self._siblings and now_ns - self._born_ns < NEW_NS:
                return 0.0
            even = 1.0 / (1 + len(self._siblings))
            first = min(even, max(1.0 - self._taken(scope), 0.0))
            own = self._own[scope] = _Own(first, first, offered)
        return own.usable

    def claimed(self, scope: Scope) -> Claim:
        """What siblings are to be told."""
        own = self._own.get(scope)
        return Claim(own.claim, own.rate or 0.0) if own is not None else Claim(0.0, 0.0)

    def look(self, now_ns: int, offered: Mapping[Scope, int], siblings: Sequence[Sibling]) -> None:
        """Take in what live siblings say. `offered`: prompt tokens so far, by the scopes that have credits.

        What this process then claims must reach its page before the next look.
        """
        seconds = max(now_ns - self._looked_ns, 1) / NS
        self._looked_ns, self._siblings = now_ns, siblings
        self._own = {scope: own for scope, own in self._own.items() if scope in offered}
        for scope, own in self._own.items():
            measured = max(offered[scope] - own.offered, 0) / seconds
            weight = 1.0 if own.rate is None else min(seconds * NS / RATE_NS, 1.0)
            own.rate = (own.rate or 0.0) * (1 - weight) + measured * weight
            own.offered = offered[scope]
            self._move(scope, own)

    def _move(self, scope: Scope, own: _Own) -> None:
        taken, wanted = self._taken(scope), self._wanted(scope, own)
        if own.claim > own.usable:
            # Claimed at the last look: ours if nobody else claimed the same room since.
            sure = taken + own.claim <= 1.0 + _ROUNDING
            own.claim = own.usable = own.claim if sure else own.usable
        if wanted <= own.usable:
            own.claim = own.usable = wanted
        else:
            own.claim += min(wanted - own.claim, max(1.0 - taken - own.claim, 0.0))

    def _wanted(self, scope: Scope, own: _Own) -> float:
        """This process's share of the load."""
        even = 1.0 / (1 + len(self._siblings))
        rate = own.rate or 0.0
        total = rate + sum(sibling[scope].rate for sibling in self._siblings if scope in sibling)
        return even if total <= 0 else (1 - EVEN) * rate / total + EVEN * even

    def _taken(self, scope: Scope) -> float:
        """What siblings claim."""
        even = 1.0 / (1 + len(self._siblings))
        return sum(sibling[scope].share if scope in sibling else even for sibling in self._siblings)
