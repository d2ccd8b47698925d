"""Which tenants have a label of their own: the top few, for as long as they matter; the rest is `(other)`.

Callers choose tenant names where a gateway's header is believed, so a name is a label only if it is short and
plain; else it is a hash. Counters never fall when a tenant comes or goes: what was counted under `(other)`
stays there, and a tenant that gets a label of its own starts it with what it does from then on.
"""

import hashlib
import re
from collections.abc import Mapping
from itertools import islice

MOST_TENANTS = 20
MOST_REMEMBERED = 2048
"""Tenants whose count is remembered while they are away."""
OTHER = "(other)"
_PLAIN = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.@:/]{0,62}")


def tenant_label(name: str) -> str:
    """A label for this tenant's name. Requests that nobody's name stands on are `(none)`."""
    if not name:
        return "(none)"
    if name == OTHER or _PLAIN.fullmatch(name):
        return name
    return "h:" + hashlib.sha256(name.encode(errors="replace")).hexdigest()[:12]


class TenantNames:
    """See the module docstring. One for each rank."""

    def __init__(self, most: int = MOST_TENANTS) -> None:
        self._most = most
        self.named: set[str] = set()
        self._labels: dict[str, str] = {}

    def rank(self, weights: Mapping[str, float]) -> None:
        """Choose again by `weights` (bigger matters more). Whoever has a label keeps it unless it has fallen
        behind twice as many as there are labels."""
        order = sorted(weights, key=lambda name: (-weights[name], name))
        kept = [name for name in order[: 2 * self._most] if name in self.named][: self._most]
        fresh = [name for name in order[: self._most] if name not in self.named]
        self.named = {*kept, *fresh[: self._most - len(kept)]}
        self._labels = {name: self._labels.get(name) or tenant_label(name) for name in self.named}

    def label(self, name: str) -> str:
        """Whose label `name` counts under."""
        return self._labels.get(name, OTHER)


class Counted:
    """Counters by label that never fall while names move between labels."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._totals: dict[str, float] = {}

    def add(self, totals: Mapping[str, float], names: TenantNames) -> dict[str, float]:
        """`totals` by tenant, cumulative at the source; returned by label. A total that fell began anew."""
        last, sums, live = self._last, self._totals, {OTHER}
        for name, total in totals.items():
            # Put at the end: the tenants that were there last are those that are remembered.
            before = last.pop(name, 0.0)
            last[name] = total
            label = names.label(name)
            live.add(label)
            sums[label] = sums.get(label, 0.0) + (total - before if total >= before else total)
        for name in list(islice(last, max(0, len(last) - MOST_REMEMBERED))):
            del last[name]
        for label in sums.keys() - live:
            del sums[label]
        return dict(self._totals)
