"""One tick: inputs and the last state in; leases, changes and the next state out. Pure.

The same inputs and state always give the same outcome, whatever the order of the policies. Cost is linear in
the rules, a few microseconds each, nearly all of it expressions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from kvpilot.policy.arbitrate import Bid, Ruling, Target, arbitrate
from kvpilot.policy.budget import Budget
from kvpilot.policy.claims import Draft
from kvpilot.policy.context import Context, Slo
from kvpilot.policy.expr import Reading
from kvpilot.policy.grid import place
from kvpilot.policy.outcome import OVERRIDE, Decision, Effect, LeaseWish, Notice, Outcome
from kvpilot.policy.rule_tick import RuleTick
from kvpilot.policy.rules import Policy, PolicySet, Rule
from kvpilot.policy.state import Claim, RuleState, State
from kvpilot.policy.trail import Told, worth_telling
from kvpilot.signals import Missing

Inputs = Mapping[tuple[str, str], Reading]
"""By (policy name, input name). What is absent is missing."""

_NOT_PROVIDED = Missing("not_provided")


def evaluate(
    policies: PolicySet | Sequence[Policy], state: State, inputs: Inputs, context: Context
) -> Outcome:
    """See the module docstring. `State()` is the beginning; hand each outcome's `state` to the next tick."""
    given = policies.policies if isinstance(policies, PolicySet) else policies
    return _Tick(sorted(given, key=lambda policy: policy.name), state, inputs, context).run()


class _Tick:
    """The working memory of one `evaluate`."""

    def __init__(self, policies: Sequence[Policy], state: State, inputs: Inputs, context: Context) -> None:
        self._policies = policies
        self._state = state
        self._inputs = inputs
        self._context = context
        self._slo = _flatten(context.slo)
        self._readings: dict[str, dict[str, Reading]] = {}
        self._budgets: dict[tuple[str, bool], Budget] = {}
        self._ticks: list[tuple[RuleTick, RuleState]] = []
        self._decisions: list[Decision] = []
        self._notices: list[Notice] = []
        self._effects: list[Effect] = []
        self._told: dict[Target, Told] = {}

    def run(self) -> Outcome:
        for policy in self._policies:
            readings: dict[str, Reading] = {
                name: self._inputs.get((policy.name, name), _NOT_PROVIDED) for name in policy.inputs
            }
            self._readings[policy.name] = {**readings}
            readings.update(self._slo)
            if policy.mode != "off":
                for rule in policy.rules:
                    self._run_rule(policy, rule, readings)
        self._withdraw_removed()
        real, shadow = self._arbitrate(False), self._arbitrate(True)
        rules = {}
        for tick, before in self._ticks:
            ruling = shadow if before.shadow else real
            overruled = _of_rule(ruling, tick)
            after = tick.result(overruled)
            rules[tick.policy.name, tick.rule.name] = after
            self._settle(tick, before, after, ruling)
            self._notices += tick.notices
            self._effects += tick.effects
        self._journal_orders(real.leases)
        return Outcome(
            state=State(
                rules=rules,
                leases=real.leases,
                told=self._told,
                shadow=shadow.leases,
                steps_ns={key: budget.steps_ns for key, budget in self._budgets.items() if budget.steps_ns},
            ),
            leases=_sorted(real.leases),
            shadow=_sorted(shadow.leases),
            decisions=tuple(self._decisions),
            notices=tuple(self._notices),
            effects=tuple(self._effects),
        )

    def _run_rule(self, policy: Policy, rule: Rule, readings: Mapping[str, Reading]) -> None:
        context = self._context
        shadow = policy.mode == "shadow" or context.off or not (context.armed or rule.protective)
        before = self._begin(policy, rule, shadow)
        key = (policy.name, shadow)
        budget = self._budgets.get(key)
        if budget is None:
            budget = Budget(policy.limits, self._state.steps_ns.get(key, ()), context.now_ns)
            self._budgets[key] = budget
        tick = RuleTick(policy, rule, before, readings, context, budget, self._state.shadow)
        tick.run()
        self._ticks.append((tick, before))

    def _begin(self, policy: Policy, rule: Rule, shadow: bool) -> RuleState:
        """The state to go on from: afresh for a rule that is new, changed, or went into or out of shadow."""
        state = self._state.rules.get((policy.name, rule.name))
        if state is None:
            return RuleState(rule.identity, since_ns=self._context.now_ns, shadow=shadow)
        if state.shadow != shadow:
            # What was worked out open loop is no basis for acting, nor the other way round.
            reason = "into shadow: off, or not armed" if shadow else "out of shadow"
            for claim in state.claims:
                self._withdraw(policy.name, rule.name, state, claim, reason)
            self._silence(state)
            return RuleState(
                rule.identity, since_ns=self._context.now_ns, shadow=shadow, changed_ns=state.changed_ns
            )
        if state.identity != rule.identity:
            self._silence(state)
            return self._changed(policy, rule, state)
        return state

    def _changed(self, policy: Policy, rule: Rule, state: RuleState) -> RuleState:
        """The text changed: inactive, with the claims that the new text knows how to walk home."""
        kept, now_ns = [], self._context.now_ns
        for claim in state.claims:
            action = next((a for a in rule.actions if (a.knob, a.scope) == (claim.knob, claim.scope)), None)
            recovers = any(r.knob == claim.knob and r.scope in (None, claim.scope) for r in rule.recover)
            knob = self._context.knobs.get(claim.knob)
            if action is not None and recovers and knob is not None:
                value = place(claim.value, action, knob).value
                kept.append(replace(claim, value=value, recover_at_ns=now_ns))
            else:
                self._withdraw(policy.name, rule.name, state, claim, "the rule's text changed")
        return RuleState(
            rule.identity,
            since_ns=self._context.now_ns,
            shadow=state.shadow,
            claims=tuple(kept),
            changed_ns=state.changed_ns,
        )

    def _withdraw_removed(self) -> None:
        present = {(tick.policy.name, tick.rule.name) for tick, _ in self._ticks}
        for (policy, rule), state in sorted(self._state.rules.items()):
            if (policy, rule) not in present:
                for claim in state.claims:
                    self._withdraw(policy, rule, state, claim, "the rule was removed or switched off")
                self._silence(state)

    def _withdraw(self, policy: str, rule: str, state: RuleState, claim: Claim, reason: str) -> None:
        """A claim is gone with the rule that made it; only one that held the knob changes anything."""
        verdict = "overruled" if claim.overruled_by is not None else "applied"
        draft = Draft(claim.knob, claim.scope, claim.value, None, reason)
        self._decide(policy, rule, draft, "shadowed" if state.shadow else verdict)

    def _silence(self, state: RuleState) -> None:
        """A rule that starts afresh is no longer firing."""
        old = state.notified
        if old is not None:
            self._notices.append(Notice(old.policy, old.rule, old.receiver, old.severity, old.summary, False))

    def _arbitrate(self, shadow: bool) -> Ruling:
        bids = [
            Bid(
                tick.policy.name,
                tick.rule.name,
                tick.policy.priority,
                tick.rule.protective,
                claim.knob,
                claim.scope,
                claim.value,
                tick.rule.lease_ns,
            )
            for tick, before in self._ticks
            if before.shadow is shadow
            for claim in tick.claims.held.values()
        ]
        context = self._context
        real = not shadow and not context.off
        orders = [o for o in context.overrides if o.until_ns > context.now_ns] if real else ()
        return arbitrate(bids, context.knobs, orders, context.now_ns)

    def _settle(self, tick: RuleTick, before: RuleState, after: RuleState, ruling: Ruling) -> None:
        """The verdicts of what the rule drafted, and what arbitration alone changed for it."""
        policy, rule = tick.policy.name, tick.rule.name
        was = {(claim.knob, claim.scope): claim for claim in before.claims}
        # A claim that was dropped changes something only if it held the knob until now.
        overruled = {
            (claim.knob, claim.scope): claim.overruled_by for claim in (*before.claims, *after.claims)
        }
        stepped = set()
        for draft in tick.claims.drafts:
            target = (draft.knob, draft.scope)
            if draft.verdict in (None, "clamped"):
                stepped.add(target)
            self._decide(policy, rule, draft, self._verdict(draft, after, overruled.get(target)))
        if before.shadow:
            return
        for claim in after.claims:
            target = (claim.knob, claim.scope)
            old, by, lease = was.get(target), claim.overruled_by, ruling.leases.get(target)
            if lease is not None and (lease.policy, lease.rule) == (policy, rule):
                self._follow(tick, lease, target in stepped)
            elif old is not None and by not in (None, old.overruled_by) and target not in stepped:
                self._decide(policy, rule, Draft(*target, old.value, claim.value, f"by {by}"), "overruled")

    def _verdict(self, draft: Draft, after: RuleState, overruled_by: str | None) -> str:
        if draft.verdict is not None and (draft.verdict != "clamped" or overruled_by is None):
            return draft.verdict
        if after.shadow:
            if after.steps > 1 and draft.after is not None:
                draft.reason = f"{draft.reason} (open_loop)"
            return "shadowed"
        if overruled_by is not None:
            draft.reason = f"{draft.reason}; by {overruled_by}"
            return "overruled"
        return "applied"

    def _follow(self, tick: RuleTick, lease: LeaseWish, stepped: bool) -> None:
        """The rule holds this lease: journal it where that is news, unless a step of the rule says it."""
        target, now_ns = (lease.knob, lease.scope), self._context.now_ns
        told, knob = self._state.told.get(target), self._context.knobs[lease.knob]
        action = next(a for a in tick.rule.actions if (a.knob, a.scope) == target)
        reason = "follows its expression" if action.tracks else "holds the knob again"
        if told is not None and (told.policy, told.rule) == (lease.policy, lease.rule):
            before = told.value
            news = worth_telling(told, lease.value, now_ns, action, knob)
        else:
            held = self._state.leases.get(target)
            before, news = knob.baseline if held is None else held.value, True
        if news and not stepped:
            self._decide(lease.policy, lease.rule, Draft(*target, before, lease.value, reason), "applied")
        if news or stepped or told is None:
            told = Told(lease.policy, lease.rule, lease.value, now_ns)
        self._told[target] = told

    def _journal_orders(self, leases: Mapping[Target, LeaseWish]) -> None:
        old = {target: lease for target, lease in self._state.leases.items() if lease.policy == OVERRIDE}
        new = {target: lease for target, lease in leases.items() if lease.policy == OVERRIDE}
        why = {(order.knob, order.scope): order.why for order in self._context.overrides}
        for target in sorted({*old, *new}, key=str):
            was, now = old.get(target), new.get(target)
            if was is not None and now is not None and (was.value, was.rule) == (now.value, now.rule):
                continue
            lease = now or was
            assert lease is not None, "one of the two is there"
            before = (
                was.value if was else self._context.value_in_force(self._context.knobs[target[0]], target[1])
            )
            reason = why.get(target, "") if now else "the order ended"
            self._decide(
                OVERRIDE, lease.rule, Draft(*target, before, now.value if now else None, reason), "applied"
            )

    def _decide(self, policy: str, rule: str, draft: Draft, verdict: str) -> None:
        self._decisions.append(
            Decision(
                at_ns=self._context.now_ns,
                policy=policy,
                rule=rule,
                knob=draft.knob,
                scope=draft.scope,
                before=draft.before,
                after=draft.after,
                verdict=verdict,
                reason=draft.reason,
                inputs=self._readings.get(policy, {}),
            )
        )


def _of_rule(ruling: Ruling, tick: RuleTick) -> dict[Target, str]:
    name = (tick.policy.name, tick.rule.name)
    return {
        (bid.knob, bid.scope): by for bid, by in ruling.overruled.items() if (bid.policy, bid.rule) == name
    }


def _sorted(leases: Mapping[Target, LeaseWish]) -> tuple[LeaseWish, ...]:
    return tuple(sorted(leases.values(), key=lambda lease: (lease.knob, str(lease.scope))))


def _flatten(slo: Slo) -> Iterable[tuple[str, Reading]]:
    flat: list[tuple[str, Reading]] = []
    for name, target in slo.items():
        if isinstance(target, Mapping):
            flat += [(f"slo.{name}.{part}", value) for part, value in target.items()]
        else:
            flat.append((f"slo.{name}", target))
    return flat
