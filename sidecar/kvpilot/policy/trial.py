"""One rule's change on trial during a tick: begun at the step, followed, judged when its effect is due."""

from collections.abc import Mapping

from kvpilot.policy import effect
from kvpilot.policy.context import Context
from kvpilot.policy.expr import Reading
from kvpilot.policy.lease import Target
from kvpilot.policy.outcome import Effect
from kvpilot.policy.rules import Policy, Rule
from kvpilot.policy.state import Check, Claim


class Trial:
    """`check` is the change that is still to be judged, for the next tick; `effects` are this tick's."""

    def __init__(
        self,
        policy: Policy,
        rule: Rule,
        check: Check | None,
        readings: Mapping[str, Reading],
        context: Context,
    ) -> None:
        self.check = check
        self.effects: list[Effect] = []
        self._policy = policy
        self._rule = rule
        self._readings = readings
        self._context = context

    def begin(self, changed: tuple[tuple[Target, float], ...]) -> None:
        """A change is made now: what its input is, is remembered, unless nobody can say."""
        verify = self._rule.verify
        if verify is None:
            return
        if self.check is not None:
            why = "the rule stepped again meanwhile"
            self.effects.append(effect.abandon(self._policy, self._rule, self.check, why))
        self.check = effect.begin(self._readings.get(verify.input), changed, self._context)

    def follow(self, held: Mapping[Target, Claim]) -> Effect | None:
        """What this tick shows of the change; its effect, if that is due."""
        check, verify = self.check, self._rule.verify
        if check is None or verify is None:
            return None
        check = self.check = effect.follow(check, held, self._context)
        if not effect.is_due(check, verify, self._context.now_ns):
            return None
        self.check = None
        reading = self._readings.get(verify.input)
        found = effect.judge(self._policy, self._rule, check, self._context, reading)
        self.effects.append(found)
        return found
