"""A rule with `choose` over one tick: take the candidate with the lowest forecast; probe what it silences.

The choice is the rule's claim, or the value in force while it has none; a choice of baseline needs no claim.
The rule is active while it holds a choice. Some choices silence the signal that the others are judged by:
with speculation off nothing is accepted. So where the choice lies below the probe's candidate, that one is
claimed for a moment now and then, and what has no forecast meanwhile is merely unknown. Only where the
present choice itself has none is the rule blind.
"""

import hashlib
import math
from dataclasses import replace

from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.grid import protective_first
from kvpilot.policy.lease import Target
from kvpilot.policy.rules import Choose, Probe
from kvpilot.policy.state import Choosing, Phase
from kvpilot.policy.turn import Step, Turn
from kvpilot.signals import Missing

MOST_BACKOFF = 16.0
"""Waits between probes grow to this many times `every`."""

_UNKNOWN = Missing("not_provided")


class ChooseTick(Turn):
    """See the module docstring."""

    _prices: dict[float, float]
    """Forecasts of the candidates that this engine can be set to, where there are any."""
    _present: float
    _stand_down = False

    # Inputs

    def _consult(self) -> bool | Missing:
        choose, knob = self._choose, self._knob
        if choose.unless is not None:
            unless = choose.unless.evaluate(self._given.readings)
            if isinstance(unless, Missing):
                absent = choose.unless.missing(self._given.readings)
                self._absent = absent[0] if absent is not None else "a value"
                return unless
            self._stand_down = bool(unless)
        if knob is None:
            return True
        self._present = self._choice(knob)
        self._prices = {}
        # Where the engine is by itself is always a candidate: nobody should have to know it.
        candidates = {*choose.candidates, knob.baseline}
        for candidate in candidates:
            price = self._price(candidate)
            if not isinstance(price, Missing) and knob.snap(candidate) == candidate:
                self._prices[candidate] = price
        price = self._price(self._present)
        if isinstance(price, Missing) and (self._present in candidates or not self._prices):
            self._absent = f"{choose.minimise} at {self._present:g}"
            return price
        return True

    def _price(self, value: float) -> float | Missing:
        price = self._context.forecasts.seconds_per_token.get(round(value), _UNKNOWN)
        if isinstance(price, Missing):
            return price
        return Missing("not_finite") if math.isnan(price) else price

    def _choice(self, knob: ManifestKnob) -> float:
        claim, probing = self.claims.held.get(self._target), self._choosing
        if probing.until_ns is not None and probing.choice is not None:
            return probing.choice
        return self._in_force(self._target, knob) if claim is None else claim.value

    @property
    def _choose(self) -> Choose:
        assert self.rule.choose is not None, "this is a choosing rule"
        return self.rule.choose

    @property
    def _knob(self) -> ManifestKnob | None:
        return self._context.knobs.get(self._choose.knob)

    @property
    def _target(self) -> Target:
        return self._choose.knob, Scope("all")

    @property
    def _is_overruled(self) -> bool:
        claim = self.claims.held.get(self._target)
        return claim is not None and claim.overruled_by is not None

    # Choosing

    def _move(self, holds: bool) -> None:
        knob, choosing = self._knob, self._choosing
        if knob is None:
            if self._blocked != "unsupported":
                self._blocked = "unsupported"
                self._report_unsupported()
            return
        best = self._best()
        probing = choosing.until_ns is not None
        free = not self._is_overruled and self._cools() <= 0
        if best != self._present and free and self._turn_to(best, knob):
            return
        if choosing.until_ns is not None and (self._now_ns >= choosing.until_ns or self._stand_down):
            self._end_probe("probe over")
        elif not probing and not self.before.shadow:
            self._think_of_probe(knob)
        if self._choosing.until_ns is None:
            # A claim that stood in while the rule was blind is its choice again.
            self._enter(Phase.ACTIVE if self._target in self.claims.held else Phase.INACTIVE)

    def _best(self) -> float:
        """The candidate to be at; the present choice unless another is better by the hysteresis."""
        if not self._prices:
            return self._present
        name = self._choose.knob
        best = min(self._prices, key=lambda value: (self._prices[value], protective_first(name, value)))
        present = self._price(self._present)
        if isinstance(present, Missing):
            return best
        return best if self._prices[best] < present * (1 - self._choose.hysteresis) else self._present

    def _turn_to(self, best: float, knob: ManifestKnob) -> bool:
        """Make `best` the choice. False where the policy's limits do not allow it."""
        target, claim = self._target, self.claims.held.get(self._target)
        action = self.rule.actions[0]
        step = Step(action, target, None if claim is None else claim.value, best, clamped=False)
        if not self._may_step([step]):
            return False
        price = self._price(self._present)
        than = "not known" if isinstance(price, Missing) else f"{price:.4g} s"
        reason = f"forecast {self._prices[best]:.4g} s a token at {best:g}, {than} at {self._present:g}"
        if self.before.phase is not Phase.ACTIVE:
            self._steps = 0
        if best == knob.baseline and claim is not None:
            self.claims.drop(target, reason)
            self._budget.spend(1)
            self._changed_ns = self._now_ns
            self._enter(Phase.INACTIVE)
        else:
            self._take([step], reason)
            self._enter(Phase.ACTIVE)
        self._choosing = Choosing()
        return True

    # Probes

    def _think_of_probe(self, knob: ManifestKnob) -> None:
        probe, choosing = self._choose.probe, self._choosing
        if probe is None:
            return
        silent = self._present < probe.candidate == knob.snap(probe.candidate)
        if not silent or self._stand_down:
            if choosing.due_ns is not None:
                self._choosing = replace(choosing, due_ns=None)
            return
        if choosing.due_ns is None:
            self._choosing = replace(choosing, due_ns=self._now_ns + self._wait_ns(probe))
        elif self._now_ns >= choosing.due_ns and not self._is_overruled and self._budget.allows(2):
            self._begin_probe(probe)

    def _begin_probe(self, probe: Probe) -> None:
        claim = self.claims.held.get(self._target)
        back = None if claim is None else claim.value
        self.claims.put(self._target, probe.candidate)
        self.claims.draft(
            self._target, self._present, probe.candidate, f"probe: {self._present:g} silences its signal"
        )
        # Both steps at once: the way back must not be refused.
        self._budget.spend(2)
        until_ns = self._now_ns + probe.for_ns
        self._choosing = replace(self._choosing, until_ns=until_ns, back=back, choice=self._present)

    def _end_probe(self, reason: str) -> None:
        probe, choosing = self._choose.probe, self._choosing
        claim = self.claims.held.get(self._target)
        if claim is not None:
            if choosing.back is None:
                self.claims.drop(self._target, reason)
            else:
                self.claims.put(self._target, choosing.back)
                self.claims.draft(self._target, claim.value, choosing.back, reason)
        fruitless = choosing.fruitless + 1
        self._choosing = Choosing(fruitless=fruitless)
        if probe is not None:
            self._choosing = Choosing(self._now_ns + self._wait_ns(probe), fruitless)

    def _wait_ns(self, probe: Probe) -> int:
        """Jitter comes from who probes and when, so that the same flight twice is the same flight."""
        seed = f"{self.policy.name}/{self.rule.name}/{self.rule.identity}/{self._now_ns}"
        digest = hashlib.blake2b(seed.encode(), digest_size=8).digest()
        share = int.from_bytes(digest) / 2**63 - 1
        growth = min(probe.backoff ** min(self._choosing.fruitless, 64), MOST_BACKOFF)
        return round(probe.every_ns * growth * (1 + probe.jitter * share))

    # Blind

    def _without_input(self, why: Missing) -> None:
        if self._choosing.until_ns is not None:
            self._end_probe("probe over: blind")
        super()._without_input(why)
        if self._target not in self.claims.held:
            self._enter(Phase.INACTIVE)
