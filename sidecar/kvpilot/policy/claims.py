"""One rule's claims during a tick: made, moved, walked home, dropped; each change drafted for the journal.

Invariant: a claim exists only for a (knob, scope) that the rule acts on; one that comes home is dropped.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.grid import recover_step
from kvpilot.policy.lease import Target
from kvpilot.policy.rules import Rule
from kvpilot.policy.state import Claim


@dataclass(slots=True)
class Draft:
    """A decision before arbitration; a verdict of None is settled by it."""

    knob: str
    scope: Scope
    before: float | None
    after: float | None
    reason: str
    verdict: str | None = None


class Claims:
    """See the module docstring. `drafts` are in the order in which things happened."""

    def __init__(
        self, rule: Rule, held: Iterable[Claim], knobs: Mapping[str, ManifestKnob], now_ns: int
    ) -> None:
        self.held: dict[Target, Claim] = {(claim.knob, claim.scope): claim for claim in held}
        self.drafts: list[Draft] = []
        self._rule = rule
        self._knobs = knobs
        self._now_ns = now_ns

    def put(self, target: Target, value: float) -> None:
        """The claim's value, whether it is the first on this target or not."""
        claim = self.held.get(target)
        if claim is None:
            self.held[target] = Claim(*target, value)
        elif claim.value != value:
            self.held[target] = replace(claim, value=value)

    def stop_recovering(self, target: Target) -> Claim | None:
        """The rule is active again: its claim, if it has one, no longer walks home."""
        claim = self.held.get(target)
        if claim is not None and claim.recover_at_ns is not None:
            claim = self.held[target] = replace(claim, recover_at_ns=None)
        return claim

    def leave(self, reason: str) -> None:
        """The rule is inactive: claims that do not walk home yet start to, or drop."""
        for target, claim in list(self.held.items()):
            if claim.recover_at_ns is None:
                self.leave_one(target, reason)

    def leave_one(self, target: Target, reason: str) -> None:
        """One claim starts to walk home, or drops."""
        claim = self.held[target]
        knob, recover = self._knobs.get(claim.knob), self._rule.recover_of(*target)
        if knob is None or recover is None or claim.value == knob.baseline:
            self.drop(target, reason)
        else:
            self.held[target] = replace(claim, recover_at_ns=self._now_ns + recover.every_ns)

    def recover(self) -> None:
        """Every claim whose step home is due takes it."""
        for target, claim in list(self.held.items()):
            if claim.recover_at_ns is not None and self._now_ns >= claim.recover_at_ns:
                self._step_home(target, claim)

    def drop_all(self, reason: str, verdict: str | None = None) -> None:
        """Drop every claim."""
        for target in list(self.held):
            self.drop(target, reason, verdict)

    def drop(self, target: Target, reason: str, verdict: str | None = None) -> None:
        """Drop one claim: back to baseline, or to whoever else claims the knob."""
        claim = self.held.pop(target)
        self.draft(target, claim.value, None, reason, verdict)

    def draft(
        self,
        target: Target,
        before: float | None,
        after: float | None,
        reason: str,
        verdict: str | None = None,
    ) -> None:
        """Put a change, or a refusal, down for the journal."""
        self.drafts.append(Draft(*target, before, after, reason, verdict))

    def _step_home(self, target: Target, claim: Claim) -> None:
        knob, recover = self._knobs.get(claim.knob), self._rule.recover_of(*target)
        action = self._rule.action_on(*target)
        if knob is None or recover is None or action is None:
            self.drop(target, "cannot recover")
            return
        value = recover_step(claim.value, recover, action, knob)
        if value is None:
            self.drop(target, "recovered to baseline")
            return
        self.held[target] = replace(claim, value=value, recover_at_ns=self._now_ns + recover.every_ns)
        self.draft(target, claim.value, value, "recovering")
