"""One rule over one tick: its phase, its claims, and what it wants written down.

Mutable while the tick runs and thrown away after; `result` is the rule's state for the next tick. Invariants:
no step on a missing input; no step by a claim that is overruled; an inactive rule's claims only walk home.
"""

from collections.abc import Mapping
from dataclasses import replace

from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.arbitrate import Target
from kvpilot.policy.budget import Budget
from kvpilot.policy.claims import Claims
from kvpilot.policy.context import Context
from kvpilot.policy.effect import judge
from kvpilot.policy.expr import Expression, Reading
from kvpilot.policy.grid import place
from kvpilot.policy.outcome import Effect, LeaseWish, Notice
from kvpilot.policy.phase import Standing, advance, asks_when
from kvpilot.policy.quantity import format_duration
from kvpilot.policy.rules import Action, Policy, Rule
from kvpilot.policy.state import Check, Claim, Phase, RuleState
from kvpilot.signals import Missing


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
        self.notices: list[Notice] = []
        self.effects: list[Effect] = []
        self.claims = Claims(rule, state.claims, context.knobs, context.now_ns)
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
            for target, claim in sorted(self.claims.held.items(), key=lambda item: str(item[0]))
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
                for target, claim in self.claims.held.items():
                    self.claims.draft(target, claim.value, claim.value, reason, "missing_input")
            return
        self.claims.drop_all(f"released: {name} is missing ({why.reason})", "missing_input")
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
                until = self.rule.until
                self.claims.leave(f"until: {until.text}" if until else f"no longer: {self.rule.when.text}")
            else:
                self.claims.recover()

    def _enter(self, phase: Phase) -> None:
        if self._standing.phase is not phase:
            self._standing = Standing(phase, self._context.now_ns)

    # Actions

    def _act(self) -> None:
        """Active: follow expressions, and take the steps that are wanted, if cooldown and limits allow."""
        wanted: list[tuple[Action, float | None, float, bool]] = []
        for action in self.rule.actions:
            target = (action.knob, action.scope)
            knob = self._context.knobs.get(action.knob)
            if knob is None:
                continue
            claim = self.claims.stop_recovering(target)
            placed = place(self._wish(action, knob, claim), action, knob)
            if claim is None:
                wanted.append((action, None, *placed))
            elif action.tracks:
                self.claims.move(target, placed.value)
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
            self.claims.make(target, value)
            before = self._in_force(target, knob)
        else:
            self.claims.move(target, value)
        if not self.rule.protective:
            self._budget.spend(1)
        self._changed_ns = self._context.now_ns
        self._steps += 1
        self._blocked = None
        if not action.tracks:
            verdict = "clamped" if clamped and not self._before.shadow else None
            self.claims.draft(target, before, value, f"when: {self.rule.when.text}", verdict)
        self._expect()

    def _refuse(
        self, verdict: str, reason: str, wanted: list[tuple[Action, float | None, float, bool]]
    ) -> None:
        if self._blocked == verdict:
            return
        self._blocked = verdict
        for action, before, _, _ in wanted:
            self.claims.draft((action.knob, action.scope), before, before, reason, verdict)

    def _report_unsupported(self) -> None:
        for action in self.rule.actions:
            if action.knob not in self._context.knobs:
                target = (action.knob, action.scope)
                self.claims.draft(target, None, None, "this engine has no such knob", "unsupported")

    # Effects and notices

    def _expect(self) -> None:
        """A change was made: remember what its input was, unless nobody can say."""
        verify = self.rule.verify
        if verify is None or self._before.shadow:
            return
        if self._check is not None:
            self.effects.append(
                judge(self.policy, self.rule, self._check, None, "the rule stepped again meanwhile")
            )
        before = self.readings.get(verify.input)
        self._check = None
        if isinstance(before, float | int):
            self._check = Check(float(before), self._context.now_ns + verify.within_ns)

    def _measure(self) -> None:
        check, verify = self._check, self.rule.verify
        if check is None or verify is None or self._context.now_ns < check.due_ns:
            return
        after = self.readings.get(verify.input)
        usable = isinstance(after, float | int)
        reason = "measured" if usable else f"{verify.input} is missing"
        self.effects.append(judge(self.policy, self.rule, check, after, reason))
        self._check = None

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
