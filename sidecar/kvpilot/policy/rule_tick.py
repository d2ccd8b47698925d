"""A rule with `when` over one tick: its condition, its phase, and the steps it takes while it is active.

Invariants beside those of every turn: an inactive rule's claims only walk home; while active, `when` is not
consulted; a claim that follows an expression or a model moves with it every tick, and in no other phase.
"""

from collections.abc import Mapping

from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.expr import Expression, Reading
from kvpilot.policy.grid import Placed, place, stride
from kvpilot.policy.lease import Target
from kvpilot.policy.phase import advance, asks_when
from kvpilot.policy.rules import TOP_TENANT, Action, Policy, Rule, Solve
from kvpilot.policy.solve import MODEL_OF, solve
from kvpilot.policy.state import Claim, Phase, RuleState
from kvpilot.policy.turn import Step, Turn
from kvpilot.signals import Missing

MOST_FORMER = 3
"""Tenants that were the top one and whose claims still walk home: leases have to fit a page."""


def rests(policy: Policy, rule: Rule, state: RuleState, readings: Mapping[str, Reading]) -> bool:
    """Whether a turn would leave everything as it is: nothing held, said or awaited, and a condition that
    does not hold, or is missing still. Most rules, most of the time.
    """
    if (
        rule.when is None
        or state.phase is not Phase.INACTIVE
        or state.claims
        or state.check is not None
        or state.suspended_ns is not None
        or state.notified is not None
        or state.disappointed is not None
    ):
        return False
    if state.missing_since_ns is not None:
        return policy.on_missing != "fallback" and isinstance(rule.when.evaluate(readings), Missing)
    if any(action.tracks or action.scope == TOP_TENANT for action in rule.actions):
        return False
    return rule.when.evaluate(readings) is False


class RuleTick(Turn):
    """See the module docstring."""

    # Inputs

    def _consult(self) -> bool | Missing:
        """The condition of this phase; missing if it, or a value that the rule would have to follow, is."""
        rule = self.rule
        entering = asks_when(self._standing.phase)
        condition = rule.when if entering or rule.until is None else rule.until
        assert condition is not None, "a rule that does not choose has `when`"
        answer = self._value_of(condition)
        if isinstance(answer, Missing):
            return answer
        self._tracked: dict[Target, float] = {}
        for action in rule.actions:
            if action.tracks:
                value = self._tracked_value(action)
                if isinstance(value, Missing):
                    return value
                self._tracked[action.knob, action.scope] = value
            if action.scope == TOP_TENANT and isinstance(self._context.top_tenant, Missing):
                self._absent = "who holds most KV memory"
                return self._context.top_tenant
        holds = bool(answer)
        return holds if entering or rule.until is not None else not holds

    def _tracked_value(self, action: Action) -> float | Missing:
        amount = action.amount
        if isinstance(amount, Expression):
            return self._value_of(amount)
        assert isinstance(amount, Solve), "what is followed is an expression or a model"
        target = amount.target if isinstance(amount.target, float) else self._value_of(amount.target)
        if isinstance(target, Missing):
            return target
        value = solve(amount, target, self._context)
        if isinstance(value, Missing):
            self._absent = MODEL_OF[amount.klass is None]
        return value

    def _value_of(self, expression: Expression) -> float | Missing:
        value = expression.evaluate(self._given.readings)
        if isinstance(value, Missing):
            absent = expression.missing(self._given.readings)
            self._absent = absent[0] if absent is not None else "a value"
        return value

    # Phases

    def _move(self, holds: bool) -> None:
        rule, was = self.rule, self._standing.phase
        self._standing = advance(self._standing, holds, self._now_ns, rule.for_ns, rule.keep_for_ns)
        phase = self._standing.phase
        if phase is Phase.ACTIVE:
            if asks_when(was):
                self._steps, self._blocked = 0, None
                self._report_unsupported()
            self._act()
        elif phase is Phase.INACTIVE:
            self.claims.leave(self._why_it_leaves(was))
        if phase is not Phase.PENDING:
            self.claims.recover()

    def _why_it_leaves(self, was: Phase) -> str:
        if asks_when(was):
            return "its inputs are back"
        until, when = self.rule.until, self.rule.when
        assert when is not None, "a rule that does not choose has `when`"
        return f"until: {until.text}" if until else f"no longer: {when.text}"

    # Actions

    def _act(self) -> None:
        """Active: follow expressions, and take the steps that are wanted, if cooldown and limits allow."""
        wanted: list[Step] = []
        for action, target in self._targets():
            knob = self._context.knobs.get(action.knob)
            if knob is None:
                continue
            claim = self.claims.stop_recovering(target)
            placed = self._wish(action, target, knob, claim)
            if claim is None:
                wanted.append(Step(action, target, None, *placed))
            elif action.tracks:
                self.claims.put(target, placed.value)
            elif placed.value != claim.value and claim.overruled_by is None:
                wanted.append(Step(action, target, claim.value, *placed))
        if wanted and self._may_step(wanted):
            assert self.rule.when is not None, "a rule that does not choose has `when`"
            self._take(wanted, f"when: {self.rule.when.text}")
        self._release_former()

    def _wish(self, action: Action, target: Target, knob: ManifestKnob, claim: Claim | None) -> Placed:
        amount = action.amount
        if action.tracks:
            return place(self._tracked[action.knob, action.scope], action, knob)
        assert isinstance(amount, float | int), "what is not followed is a number"
        if action.kind == "set":
            return place(amount, action, knob)
        start = self._in_force(target, knob) if claim is None else claim.value
        return stride(start, start + amount if action.kind == "add" else start * amount, action, knob)

    def _release_former(self) -> None:
        """Claims on former top tenants walk home, once the one that is has been claimed."""
        held = self.claims.held
        targets = [target for action, target in self._targets() if action.scope == TOP_TENANT]
        for knob, scope in [target for target in targets if target in held]:
            former = [
                target
                for target, claim in held.items()
                if target[0] == knob and target[1] != scope and self._is_of_top(claim)
            ]
            former.sort(key=lambda target: held[target].recover_at_ns is None)
            for target in former[: max(0, len(former) - MOST_FORMER)]:
                self.claims.drop(target, "no longer among those who hold most KV memory")
            for target in former[max(0, len(former) - MOST_FORMER) :]:
                if held[target].recover_at_ns is None:
                    self.claims.leave_one(target, "no longer who holds most KV memory")

    def _is_of_top(self, claim: Claim) -> bool:
        action = self.rule.action_on(claim.knob, claim.scope)
        return action is not None and action.scope == TOP_TENANT
