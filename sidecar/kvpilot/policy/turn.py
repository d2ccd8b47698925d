"""One rule over one tick, whatever kind of rule: its claims, what it may do, what it wants written down.

Mutable while the tick runs and thrown away after; `result` is the rule's state for the next tick. Invariants:
no step on a missing input, but to the fallback that a policy names for it; no step by a claim that is
overruled; no step inside `cooldown` or beyond the policy's limits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.budget import Budget
from kvpilot.policy.claims import Claims
from kvpilot.policy.context import Context
from kvpilot.policy.crier import Crier
from kvpilot.policy.expr import Reading
from kvpilot.policy.grid import place
from kvpilot.policy.lease import LeaseWish, Target
from kvpilot.policy.outcome import Effect
from kvpilot.policy.phase import Standing, asks_when
from kvpilot.policy.quantity import format_duration
from kvpilot.policy.rules import TOP_TENANT, Action, Policy, Rule
from kvpilot.policy.state import Choosing, Phase, RuleState
from kvpilot.policy.trial import Trial
from kvpilot.signals import Missing

LONGEST_SUSPENSION_NS = 600_000_000_000


@dataclass(frozen=True, slots=True)
class Given:
    """What a rule's turn is given. `virtual` is what shadowed rules hold, which only shadowed rules see."""

    readings: Mapping[str, Reading]
    context: Context
    budget: Budget
    virtual: Mapping[Target, LeaseWish]


class Step(NamedTuple):
    """A change of a claim that a rule wants; `before` None makes the claim."""

    action: Action
    target: Target
    before: float | None
    value: float
    clamped: bool


class Turn:
    """See the module docstring. What a kind of rule adds: `_consult` and `_move`."""

    def __init__(self, policy: Policy, rule: Rule, state: RuleState, given: Given) -> None:
        self.policy = policy
        self.rule = rule
        self.before = state
        self.crier = Crier(policy, rule, state)
        self.trial = Trial(policy, rule, state.check, given.readings, given.context)
        self.claims = Claims(rule, state.claims, given.context.knobs, given.context.now_ns)
        self._given = given
        self._context = given.context
        self._budget = given.budget
        self._virtual = given.virtual
        self._now_ns = given.context.now_ns
        self._standing = Standing(state.phase, state.since_ns)
        self._absent = "a value"
        self._changed_ns = state.changed_ns
        self._steps = state.steps
        self._blocked = state.blocked
        self._missing_since_ns: int | None = None
        self._undos = state.undos
        self._suspended_ns = state.suspended_ns
        self._choosing = state.choosing

    def run(self) -> None:
        """Take the rule through this tick."""
        if self.trial.check is not None:
            found = self.trial.follow(self.claims.held)
            if found is not None:
                self._weigh(found)
        if self._suspended_ns is not None and self._now_ns >= self._suspended_ns:
            self._suspended_ns = None
        answer = self._consult()
        if self._suspended_ns is not None:
            self._stand_by(answer, self._suspended_ns)
        elif isinstance(answer, Missing):
            self._without_input(answer)
        else:
            self._move(answer)
        if self._standing.phase is Phase.INACTIVE and not asks_when(self.before.phase) and self._follows:
            # A claim that follows something moves all the time: what cools down is its coming and going.
            self._changed_ns = self._now_ns
        self.crier.tell(not asks_when(self._standing.phase) and not self.before.shadow)

    def result(self, overruled: Mapping[Target, str]) -> RuleState:
        """The state after arbitration: `overruled` says which claims do not hold, and who does."""
        held = self.claims.held
        for target, claim in held.items():
            if claim.overruled_by != overruled.get(target):
                held[target] = replace(claim, overruled_by=overruled.get(target))
        claims = tuple(held.values())
        if len(claims) > 1:
            claims = tuple(claim for _, claim in sorted(held.items(), key=lambda item: str(item[0])))
        before = self.before
        if self._standing.phase is before.phase and claims == before.claims and self._is_as_before():
            return before
        return RuleState(
            identity=self.rule.identity,
            phase=self._standing.phase,
            since_ns=self._standing.since_ns,
            shadow=before.shadow,
            claims=claims,
            changed_ns=self._changed_ns,
            apart_ns=before.apart_ns,
            steps=self._steps,
            blocked=self._blocked,
            missing_since_ns=self._missing_since_ns,
            notified=self.crier.notified,
            disappointed=self.crier.disappointed,
            check=self.trial.check,
            undos=self._undos,
            suspended_ns=self._suspended_ns,
            choosing=self._choosing,
        )

    def _is_as_before(self) -> bool:
        was = self.before
        return (
            self._standing.since_ns == was.since_ns
            and self._changed_ns == was.changed_ns
            and self._steps == was.steps
            and self._blocked == was.blocked
            and self._missing_since_ns == was.missing_since_ns
            and self.crier.notified is was.notified
            and self.crier.disappointed is was.disappointed
            and self.trial.check is was.check
            and self._undos == was.undos
            and self._suspended_ns == was.suspended_ns
            and self._choosing is was.choosing
        )

    # What a kind of rule adds

    def _consult(self) -> bool | Missing:
        """What this kind of rule goes by; sets `_absent` to the name of what is missing."""
        raise NotImplementedError

    def _move(self, holds: bool) -> None:
        """The rule sees: let it change phase and act."""
        raise NotImplementedError

    @property
    def _follows(self) -> bool:
        return any(action.tracks or action.kind == "choose" for action in self.rule.actions)

    # Blind, or suspended

    def _without_input(self, why: Missing) -> None:
        policy, since_ns = self.policy, self.before.missing_since_ns
        self._missing_since_ns = self._now_ns if since_ns is None else since_ns
        patient = (
            policy.on_missing != "release" and self._now_ns - self._missing_since_ns < policy.hold_for_ns
        )
        if asks_when(self._standing.phase):
            self._enter(Phase.INACTIVE)
        elif patient:
            # Leaving needs `until` to have been true throughout, which nobody can say now.
            self._enter(Phase.ACTIVE)
        what = f"{self._absent} is missing ({why.reason})"
        if not patient:
            self.claims.drop_all(f"released: {what}", "missing_input")
            self._enter(Phase.INACTIVE)
        elif policy.on_missing == "fallback":
            self._fall_back(what)
        elif since_ns is None:
            reason = f"held up to {format_duration(policy.hold_for_ns)}: {what}"
            for target, claim in self.claims.held.items():
                self.claims.draft(target, claim.value, claim.value, reason, "missing_input")

    def _fall_back(self, what: str) -> None:
        """Claim what the policy says to be at while blind; a knob that it says nothing of is released."""
        wanted = []
        for action, target in self._targets():
            knob, value = self._context.knobs.get(action.knob), self.policy.fallback.get(action.knob)
            if knob is None or value is None:
                continue
            claim = self.claims.held.get(target)
            placed = place(value, action, knob)
            if claim is None:
                wanted.append(Step(action, target, None, *placed))
            elif claim.overruled_by is None or claim.value == placed.value:
                self.claims.stop_recovering(target)
                if claim.value != placed.value:
                    wanted.append(Step(action, target, claim.value, *placed))
        for target, claim in list(self.claims.held.items()):
            if claim.knob not in self.policy.fallback:
                self.claims.drop(target, f"released: {what}", "missing_input")
        if wanted and self._may_step(wanted):
            self._take(wanted, f"fallback: {what}")

    def _stand_by(self, answer: bool | Missing, until_ns: int) -> None:
        """Suspended: claim nothing, but say once where the rule would have acted."""
        self._enter(Phase.INACTIVE)
        if answer is True and self._blocked != "suspended":
            self._blocked = "suspended"
            left = format_duration(until_ns - self._now_ns)
            for _, target in self._targets():
                self.claims.draft(target, None, None, f"suspended for {left} more", "suspended")

    def _enter(self, phase: Phase) -> None:
        if self._standing.phase is not phase:
            self._standing = Standing(phase, self._now_ns)

    # Steps

    def _targets(self) -> Iterator[tuple[Action, Target]]:
        """Each action with what it acts on now; nothing for the top tenant where there is none."""
        for action in self.rule.actions:
            if action.scope != TOP_TENANT:
                yield action, (action.knob, action.scope)
            elif isinstance(self._context.top_tenant, str):
                yield action, (action.knob, Scope("tenant", self._context.top_tenant))

    def _in_force(self, target: Target, knob: ManifestKnob) -> float:
        held = self._virtual.get(target) if self.before.shadow else None
        return self._context.value_in_force(knob, target[1]) if held is None else held.value

    def _cools(self) -> int:
        """How long the rule still has to wait since its last step, in ns; 0 or less: not at all."""
        return 0 if self._changed_ns is None else self._changed_ns + self.rule.cooldown_ns - self._now_ns

    def _may_step(self, wanted: Sequence[Step]) -> bool:
        left_ns = self._cools()
        if left_ns > 0:
            # Between the steps of one episode waiting is the ordinary rhythm; at its start it is a refusal.
            if self._steps == 0:
                self._refuse("cooling_down", f"acts in {format_duration(left_ns)}, if still active", wanted)
            return False
        if not self.rule.protective and not self._budget.allows(len(wanted)):
            self._refuse("rate_limited", "the policy's limits are used up", wanted)
            return False
        return True

    def _take(self, wanted: Sequence[Step], reason: str) -> None:
        """Make these changes, which may be made."""
        self._changed_ns = self._now_ns
        self._steps += 1
        self._blocked = None
        for step in wanted:
            before = step.before
            if before is None:
                before = self._in_force(step.target, self._context.knobs[step.action.knob])
            self.claims.put(step.target, step.value)
            if not step.action.tracks or self._missing_since_ns is not None:
                verdict = "clamped" if step.clamped and not self.before.shadow else None
                self.claims.draft(step.target, before, step.value, reason, verdict)
        if not self.rule.protective:
            self._budget.spend(len(wanted))
        if not self.before.shadow and self._missing_since_ns is None:
            self.trial.begin(tuple((step.target, step.value) for step in wanted))

    def _refuse(self, verdict: str, reason: str, wanted: Sequence[Step]) -> None:
        if self._blocked != verdict:
            self._blocked = verdict
            for step in wanted:
                self.claims.draft(step.target, step.before, step.before, reason, verdict)

    def _report_unsupported(self) -> None:
        for action in self.rule.actions:
            if action.knob not in self._context.knobs:
                target = (action.knob, action.scope)
                self.claims.draft(target, None, None, "this engine has no such knob", "unsupported")

    # Effects

    def _weigh(self, found: Effect) -> None:
        """The effect of an earlier change is known: undo the change, tell people, or let it be."""
        verify = self.rule.verify
        assert verify is not None, "only a rule with `verify` has effects"
        if found.met:
            self._undos = 0
        if not verify.undo:
            if found.met is not None:
                self.crier.judge(found)
        elif asks_when(self._standing.phase):
            # It has left already: there is nothing to undo.
            pass
        elif found.met is None:
            for target, claim in self.claims.held.items():
                reason = f"not undone: {found.reason}"
                self.claims.draft(target, claim.value, claim.value, reason, "inconclusive")
        elif not found.met:
            self._undo(found, verify.within_ns)

    def _undo(self, found: Effect, within_ns: int) -> None:
        """The effect did not come: back to before, and no more of it for a while, longer each time."""
        length_ns = min(within_ns << min(self._undos, 40), LONGEST_SUSPENSION_NS)
        self._undos += 1
        self._suspended_ns = self._now_ns + length_ns
        reason = (
            f"{found.input} went from {found.before:.4g} to {found.after:.4g}, expected {found.expected}: "
            f"suspended for {format_duration(length_ns)}"
        )
        self.claims.drop_all(reason, "undone")
        self._choosing = Choosing()
        self._blocked = None
        self._enter(Phase.INACTIVE)
