"""One rule over one tick: its phase, its claims, and what it wants written down.

Mutable while the tick runs and thrown away after; `result` is the rule's state for the next tick. Invariants:
no step on a missing input; no step by a claim that is overruled; an inactive rule's claims only walk home.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.arbitrate import Target
from kvpilot.policy.budget import Budget
from kvpilot.policy.context import Context
from kvpilot.policy.expr import Expression, Reading
from kvpilot.policy.grid import place, recover_step
from kvpilot.policy.outcome import Effect, LeaseWish, Notice
from kvpilot.policy.phase import Standing, advance, asks_when
from kvpilot.policy.quantity import format_duration
from kvpilot.policy.rules import Action, Policy, Recover, Rule
from kvpilot.policy.state import Check, Claim, Phase, RuleState
from kvpilot.signals import Missing


@dataclass(slots=True)
class Draft:
    """A decision before arbitration; a verdict of None is settled by it."""

    knob: str
    scope: Scope
    before: float | None
    after: float | None
    reason: str
    verdict: str | None = None


class RuleTick:
    """See the module docstring. `virtual` is what shadowed rules hold, which only shadowed rules see."""

    def __init__(
        self,
        policy: Policy,
        rule: Rule,
        state: RuleState,
        readings: Mapping[str, Reading],
        context: Context,
        budget: Budget,
        virtual: Mapping[Target, LeaseWish],
    ) -> None:
        self.policy = policy
        self.rule = rule
        self.readings = readings
        self.drafts: list[Draft] = []
        self.notices: list[Notice] = []
        self.effects: list[Effect] = []
        self.claims: dict[Target, Claim] = {(claim.knob, claim.scope): claim for claim in state.claims}
        self._before = state
        self._context = context
        self._budget = budget
        self._virtual = virtual
        self._standing = Standing(state.phase, state.since_ns)
        self._changed_ns = state.changed_ns
        self._steps = state.steps
        self._blocked = state.blocked
        self._missing_since_ns: int | None = None
        self._notified = state.notified
        self._check = state.check
        self._tracked: dict[Target, float] = {}

    def run(self) -> None:
        """Take the rule through this tick."""
        self._measure()
        answer = self._consult()
        if isinstance(answer, Missing):
            self._without_input(answer)
        else:
            self._missing_since_ns = None
            self._move(answer)
        self._tell()

    def result(self, overruled: Mapping[Target, str]) -> RuleState:
        """The state after arbitration: `overruled` says which claims do not hold, and who does."""
        claims = tuple(
            claim
            if claim.overruled_by == overruled.get(target)
            else replace(claim, overruled_by=overruled.get(target))
            for target, claim in sorted(self.claims.items(), key=lambda item: str(item[0]))
        )
        return RuleState(
            identity=self.rule.identity,
            phase=self._standing.phase,
            since_ns=self._standing.since_ns,
            shadow=self._before.shadow,
            claims=claims,
            changed_ns=self._changed_ns,
            steps=self._steps,
            blocked=self._blocked,
            missing_since_ns=self._missing_since_ns,
            notified=self._notified,
            check=self._check,
        )

    # Inputs

    def _consult(self) -> bool | Missing:
        """The condition of this phase; missing if it, or a value that the rule would have to follow, is."""
        rule = self.rule
        entering = asks_when(self._standing.phase)
        condition = rule.when if entering or rule.until is None else rule.until
        answer = condition.evaluate(self.readings)
        if isinstance(answer, Missing):
            return answer
        for action in rule.actions:
            if isinstance(action.amount, Expression):
                value = action.amount.evaluate(self.readings)
                if isinstance(value, Missing):
                    return value
                self._tracked[action.knob, action.scope] = value
        holds = bool(answer)
        return holds if entering or rule.until is not None else not holds

    def _without_input(self, why: Missing) -> None:
        now_ns = self._context.now_ns
        since_ns = self._before.missing_since_ns
        self._missing_since_ns = now_ns if since_ns is None else since_ns
        phase = self._standing.phase
        hold = self.policy.on_missing == "hold" and now_ns - self._missing_since_ns < self.policy.hold_for_ns
        if asks_when(phase):
            self._enter(Phase.INACTIVE)
        elif hold:
            # Leaving needs `until` to have been true throughout, which nobody can say now.
            self._enter(Phase.ACTIVE)
        name = self._absent()
        if hold:
            if since_ns is None:
                reason = (
                    f"held up to {format_duration(self.policy.hold_for_ns)}: {name} is missing ({why.reason})"
                )
                for claim in self.claims.values():
                    self._draft(claim.knob, claim.scope, claim.value, claim.value, reason, "missing_input")
            return
        self._drop_all(f"released: {name} is missing ({why.reason})", "missing_input")
        self._enter(Phase.INACTIVE)

    def _absent(self) -> str:
        expressions = [self.rule.when, self.rule.until, *(action.amount for action in self.rule.actions)]
        for expression in expressions:
            absent = expression.missing(self.readings) if isinstance(expression, Expression) else None
            if absent is not None:
                return absent[0]
        return "a value"

    # Phases

    def _move(self, holds: bool) -> None:
        rule, was = self.rule, self._standing.phase
        self._standing = advance(self._standing, holds, self._context.now_ns, rule.for_ns, rule.keep_for_ns)
        phase = self._standing.phase
        if phase is Phase.ACTIVE:
            if asks_when(was):
                self._steps, self._blocked = 0, None
                self._report_unsupported()
            self._act()
        elif phase is Phase.INACTIVE:
            if not asks_when(was):
                self._leave()
            else:
                self._recover()

    def _enter(self, phase: Phase) -> None:
        if self._standing.phase is not phase:
            self._standing = Standing(phase, self._context.now_ns)

    def _leave(self) -> None:
        """Just inactive: claims start to recover, or drop."""
        condition = (
            f"until: {self.rule.until.text}" if self.rule.until else f"no longer: {self.rule.when.text}"
        )
        for target, claim in list(self.claims.items()):
            knob, recover = self._context.knobs.get(claim.knob), self._recover_of(target)
            if knob is None or recover is None or claim.value == knob.baseline:
                self._drop(target, condition)
            else:
                self.claims[target] = replace(claim, recover_at_ns=self._context.now_ns + recover.every_ns)

    def _recover(self) -> None:
        """Inactive: every claim whose step is due takes it."""
        now_ns = self._context.now_ns
        for target, claim in list(self.claims.items()):
            knob, recover, action = self._knob(target), self._recover_of(target), self._action_of(target)
            if knob is None or recover is None or action is None:
                self._drop(target, "cannot recover")
                continue
            if claim.recover_at_ns is not None and now_ns < claim.recover_at_ns:
                continue
            value = recover_step(claim.value, recover, action, knob)
            if value is None:
                self._drop(target, "recovered to baseline")
                continue
            self.claims[target] = replace(claim, value=value, recover_at_ns=now_ns + recover.every_ns)
            self._draft(claim.knob, claim.scope, claim.value, value, "recovering")

    # Actions

    def _act(self) -> None:
        """Active: follow expressions, and take the steps that are wanted, if cooldown and limits allow."""
        wanted: list[tuple[Action, float | None, float, bool]] = []
        for action in self.rule.actions:
            target = (action.knob, action.scope)
            knob, claim = self._knob(target), self.claims.get(target)
            if knob is None:
                continue
            if claim is not None and claim.recover_at_ns is not None:
                claim = self.claims[target] = replace(claim, recover_at_ns=None)
            placed = place(self._wish(action, knob, claim), action, knob)
            if claim is None:
                wanted.append((action, None, *placed))
            elif action.tracks:
                self.claims[target] = replace(claim, value=placed.value)
            elif placed.value != claim.value and claim.overruled_by is None:
                wanted.append((action, claim.value, *placed))
        if wanted and self._may_step(wanted):
            for action, before, value, clamped in wanted:
                self._step(action, before, value, clamped)

    def _wish(self, action: Action, knob: ManifestKnob, claim: Claim | None) -> float:
        target = (action.knob, action.scope)
        if isinstance(action.amount, Expression):
            return self._tracked[target]
        if action.kind == "set":
            return action.amount
        start = self._in_force(target, knob) if claim is None else claim.value
        return start + action.amount if action.kind == "add" else start * action.amount

    def _in_force(self, target: Target, knob: ManifestKnob) -> float:
        held = self._virtual.get(target) if self._before.shadow else None
        return self._context.value_in_force(knob, target[1]) if held is None else held.value

    def _may_step(self, wanted: list[tuple[Action, float | None, float, bool]]) -> bool:
        now_ns, changed_ns = self._context.now_ns, self._changed_ns
        if changed_ns is not None and now_ns - changed_ns < self.rule.cooldown_ns:
            # Between the steps of one episode waiting is the ordinary rhythm; at its start it is a refusal.
            if self._steps == 0:
                left = format_duration(self.rule.cooldown_ns - (now_ns - changed_ns))
                self._refuse("cooling_down", f"acts in {left}, if still active", wanted)
            return False
        if not self.rule.protective and not self._budget.allows(len(wanted)):
            self._refuse("rate_limited", "the policy's limits are used up", wanted)
            return False
        return True

    def _step(self, action: Action, before: float | None, value: float, clamped: bool) -> None:
        target = (action.knob, action.scope)
        if before is None:
            knob = self._context.knobs[action.knob]
            self.claims[target] = Claim(action.knob, action.scope, value)
            before = self._in_force(target, knob)
        else:
            self.claims[target] = replace(self.claims[target], value=value)
        if not self.rule.protective:
            self._budget.spend(1)
        self._changed_ns = self._context.now_ns
        self._steps += 1
        self._blocked = None
        if not action.tracks:
            verdict = "clamped" if clamped and not self._before.shadow else None
            self._draft(action.knob, action.scope, before, value, f"when: {self.rule.when.text}", verdict)
        self._expect()

    def _refuse(
        self, verdict: str, reason: str, wanted: list[tuple[Action, float | None, float, bool]]
    ) -> None:
        if self._blocked == verdict:
            return
        self._blocked = verdict
        for action, before, _, _ in wanted:
            self._draft(action.knob, action.scope, before, before, reason, verdict)

    def _report_unsupported(self) -> None:
        for action in self.rule.actions:
            if action.knob not in self._context.knobs:
                self._draft(
                    action.knob, action.scope, None, None, "this engine has no such knob", "unsupported"
                )

    def _drop_all(self, reason: str, verdict: str | None = None) -> None:
        for target in list(self.claims):
            self._drop(target, reason, verdict)

    def _drop(self, target: Target, reason: str, verdict: str | None = None) -> None:
        claim = self.claims.pop(target)
        self._draft(claim.knob, claim.scope, claim.value, None, reason, verdict)

    def _draft(
        self,
        knob: str,
        scope: Scope,
        before: float | None,
        after: float | None,
        reason: str,
        verdict: str | None = None,
    ) -> None:
        self.drafts.append(Draft(knob, scope, before, after, reason, verdict))

    # Effects and notices

    def _expect(self) -> None:
        """A change was made: remember what its input was, unless nobody can say."""
        verify = self.rule.verify
        if verify is None or self._before.shadow:
            return
        if self._check is not None:
            self._judge(self._check, None, "the rule stepped again meanwhile")
        before = self.readings.get(verify.input)
        self._check = None
        if isinstance(before, float | int):
            self._check = Check(float(before), self._context.now_ns + verify.within_ns)

    def _measure(self) -> None:
        check, verify = self._check, self.rule.verify
        if check is None or verify is None or self._context.now_ns < check.due_ns:
            return
        after = self.readings.get(verify.input)
        if isinstance(after, float | int):
            self._judge(check, float(after), "measured")
        else:
            self._judge(check, None, f"{verify.input} is missing")
        self._check = None

    def _judge(self, check: Check, after: float | None, reason: str) -> None:
        verify = self.rule.verify
        assert verify is not None, "only a rule with `verify` has a check"
        met = None
        if after is not None:
            falls = verify.direction == "falls"
            bar = check.before * (1 - verify.ratio if falls else 1 + verify.ratio)
            met = after <= bar if falls else after >= bar
        expected = f"{verify.direction} {verify.ratio:.0%} within {format_duration(verify.within_ns)}"
        self.effects.append(
            Effect(self.policy.name, self.rule.name, verify.input, expected, check.before, after, met, reason)
        )

    def _tell(self) -> None:
        notify = self.rule.notify
        if notify is None:
            return
        firing = not asks_when(self._standing.phase) and not self._before.shadow
        if firing == (self._notified is not None):
            return
        notice = Notice(
            self.policy.name, self.rule.name, notify.receiver, notify.severity, notify.summary, firing
        )
        self._notified = notice if firing else None
        self.notices.append(notice)

    # Looking up

    def _knob(self, target: Target) -> ManifestKnob | None:
        return self._context.knobs.get(target[0])

    def _action_of(self, target: Target) -> Action | None:
        return next((a for a in self.rule.actions if (a.knob, a.scope) == target), None)

    def _recover_of(self, target: Target) -> Recover | None:
        return next(
            (r for r in self.rule.recover if r.knob == target[0] and r.scope in (None, target[1])), None
        )
