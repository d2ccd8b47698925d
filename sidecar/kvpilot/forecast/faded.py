"""A share of late, from two cumulative counts: part over whole, each fading with the time constant `tau_s`.

While nothing happens the share stays what it was, and only grows old. What comes after a silence outweighs
what was before it, but not by less than `keep` of the whole: the first moment of a burst is noise.
"""

from math import exp


class FadedShare:
    """`add` takes increases; O(1)."""

    def __init__(self, tau_s: float, keep: float = 0.0) -> None:
        self._tau_s = tau_s
        self._keep = keep
        self._at_s: float | None = None
        self.part = 0.0
        self.whole = 0.0

    def add(self, at_s: float, part: float, whole: float) -> None:
        """What both grew by since the last call, at `at_s` by any clock that does not go back."""
        if whole <= 0:
            return
        if self._at_s is not None:
            fade = exp(-max(0.0, at_s - self._at_s) / self._tau_s)
            fade = max(fade, min(1.0, self._keep / self.whole))
            self.part *= fade
            self.whole *= fade
        self._at_s = at_s
        self.part += part
        self.whole += whole

    @property
    def share(self) -> float | None:
        """Part over whole; None before anything happened."""
        return self.part / self.whole if self.whole > 0 else None

    def age_s(self, at_s: float) -> float | None:
        """Time since something happened; None before."""
        return None if self._at_s is None else max(0.0, at_s - self._at_s)
