"""How likely is the next draft token to be accepted, given that all before it were?

A round of drafts is accepted up to its first rejection, so the record's two counts are the whole likelihood:
acceptances, and rounds with a rejection. Their share is taken over about the last `TAU_S` in which anything
was drafted. With speculation off nothing is drafted: the share stays, and its band widens with its age.
"""

from math import exp, sqrt

from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.faded import FadedShare
from kvpilot.signals import Missing

TAU_S = 2.0
STALE_TAU_S = 30.0
"""After so long in silence, what was seen counts for a third."""
LEAST_DRAFTS = 20
_Z90 = 1.2816


class Acceptance:
    """Fed with increases of the counts."""

    def __init__(self) -> None:
        self._share = FadedShare(TAU_S, LEAST_DRAFTS)
        self._seen = 0.0

    def add(self, at_s: float, accepted: float, rejected_rounds: float) -> None:
        """What the counts grew by since the last call."""
        self._share.add(at_s, accepted, accepted + rejected_rounds)
        self._seen += accepted + rejected_rounds

    def age_s(self, at_s: float) -> float | None:
        """How long nothing was drafted; None if nothing ever was."""
        return self._share.age_s(at_s)

    def estimate(self, at_s: float) -> Estimate | Missing:
        """The probability as of `at_s`, in 0..1."""
        share, age_s = self._share.share, self._share.age_s(at_s)
        if share is None or age_s is None:
            return Missing("no_samples")
        if self._seen < LEAST_DRAFTS:
            return Missing("too_few_samples", age_s)
        weight = self._share.whole * exp(-age_s / STALE_TAU_S)
        # After Agresti and Coull: as if two more had been accepted and two rejected, so that neither none nor
        # all of a few is a certainty.
        centre = (share * weight + 2) / (weight + 4)
        reach = _Z90 * sqrt(centre * (1 - centre) / (weight + 4))
        return Estimate(max(0.0, min(share, centre - reach)), share, min(1.0, max(share, centre + reach)))


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens that one sequence emits in a step that verifies `drafts`: those accepted, and one."""
    total, chance = 1.0, 1.0
    for _ in range(drafts):
        chance *= acceptance
        total += chance
    return total
