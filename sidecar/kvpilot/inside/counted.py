"""A share of requests, counted out: no luck, no drift."""

_WHOLE = 1 << 32
"""One request in the accumulators: integers, so that no rounding adds up over millions of requests."""

_GOLDEN = 2654435769
"""_WHOLE over the golden ratio: first steps of new accumulators are spread evenly, or a thousand tenants with
one request each would all be let in at any share below 1."""

_MAX_ACCUMULATORS = 4096

Key = tuple[int, str]
"""(class level, tenant)."""


class Counted:
    """An accumulator for each (class, tenant): after n requests at share f, the number of those that were due
    differs from n x f by less than one. O(1); memory is bounded.
    """

    def __init__(self) -> None:
        self._owed: dict[Key, int] = {}
        self._next_phase = _WHOLE // 2

    def is_due(self, key: Key, share: float) -> bool:
        """Count one request; whether it is one of the share."""
        owed = self._owed.get(key)
        if owed is None:
            key, owed = self._first(key)
        owed += round(share * _WHOLE)
        due = owed >= _WHOLE
        self._owed[key] = owed - _WHOLE if due else owed
        return due

    def _first(self, key: Key) -> tuple[Key, int]:
        """Where a new accumulator starts; beyond the bound, all newcomers of a class share one."""
        if len(self._owed) >= _MAX_ACCUMULATORS:
            key = (key[0], "")
            if key in self._owed:
                return key, self._owed[key]
        phase, self._next_phase = self._next_phase, (self._next_phase + _GOLDEN) % _WHOLE
        return key, phase
