"""One tick: inputs and the last state in; leases, changes and the next state out. Pure.

The same inputs and state always give the same outcome, whatever the order of the policies. Cost is linear in
the rules, a few microseconds each, nearly all of it expressions.
"""

from collections.abc import Iterable, Mapping, Sequence

from kvpilot.policy.arbitrate import Bid, Ruling, arbitrate
from kvpilot.policy.budget import Budget
from kvpilot.policy.choose_tick import ChooseTick
from kvpilot.policy.claims import Draft
from kvpilot.policy.context import Context, Slo
from kvpilot.policy.expr import Reading
from kvpilot.policy.lease import OVERRIDE, LeaseWish, Target
from kvpilot.policy.notice import Notice
from kvpilot.policy.outcome import Decision, Effect, Outcome
from kvpilot.policy.reload import Restart, goes_on, park, restart, retire
from kvpilot.policy.rule_tick import RuleTick, rests
from kvpilot.policy.rules import Policy, PolicySet, Rule
from kvpilot.policy.state import RuleKey, RuleState, State
from kvpilot.policy.trail import Told, worth_telling
from kvpilot.policy.turn import Given, Turn
from kvpilot.signals import Missing

Inputs = Mapping[tuple[str, str], Reading]
"""By (policy name, input name). What is absent is missing."""

NOT_PROVIDED = Missing("not_provided")


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
        self._given: dict[tuple[str, bool], Given] = {}
        self._turns: list[Turn] = []
        self._rules: dict[RuleKey, RuleState] = {}
        self._decisions: list[Decision] = []
        self._notices: list[Notice] = []
        self._effects: list[Effect] = []
        self._told: dict[Target, Told] = {}

    def run(self) -> Outcome:
        self._open_budgets()
        for policy in self._policies:
            readings: dict[str, Reading] = {
                name: self._inputs.get((policy.name, name), NOT_PROVIDED) for name in policy.inputs
            }
            self._readings[policy.name] = {**readings}
            readings.update(self._slo)
            for rule in policy.rules:
                if policy.mode == "off":
                    self._park(policy, rule)
                else:
                    self._run_rule(policy, rule, readings)
        self._retire()
        real, shadow = self._arbitrate(False), self._arbitrate(True)
        losses = {False: _by_rule(real), True: _by_rule(shadow)}
        for turn in self._turns:
            key = (turn.policy.name, turn.rule.name)
            after = turn.result(losses[turn.before.shadow].get(key, _NOTHING))
            self._rules[key] = after
            self._settle(turn, after, shadow if turn.before.shadow else real)
            self._notices += turn.crier.notices
            self._effects += turn.trial.effects
        self._journal_orders(real.leases)
        return Outcome(
            state=State(
                rules=self._rules,
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

    def _open_budgets(self) -> None:
        """Every policy's, also of those that are off or shadowed now: what was spent stays spent."""
        limits = {policy.name: policy.limits for policy in self._policies}
        for key, steps_ns in self._state.steps_ns.items():
            if key[0] in limits:
                self._budgets[key] = Budget(limits[key[0]], steps_ns, self._context.now_ns)

    def _run_rule(self, policy: Policy, rule: Rule, readings: Mapping[str, Reading]) -> None:
        context = self._context
        shadow = policy.mode == "shadow" or context.off or not (context.armed or rule.protective)
        before = self._state.rules.get((policy.name, rule.name))
        if before is None or not goes_on(before, rule, shadow):
            started = restart(before, rule, shadow, context)
            self._end(policy.name, rule.name, before, started)
            before = started.state
            assert before is not None, "a rule that runs has a state"
        if rests(policy, rule, before, readings):
            self._rules[policy.name, rule.name] = before
            return
        given = self._given.get((policy.name, shadow))
        if given is None:
            given = self._given[policy.name, shadow] = self._give(policy, readings, shadow)
        kind = RuleTick if rule.choose is None else ChooseTick
        turn = kind(policy, rule, before, given)
        turn.run()
        self._turns.append(turn)

    def _give(self, policy: Policy, readings: Mapping[str, Reading], shadow: bool) -> Given:
        budget = self._budgets.get((policy.name, shadow))
        if budget is None:
            budget = self._budgets[policy.name, shadow] = Budget(policy.limits, (), self._context.now_ns)
        return Given(readings, self._context, budget, self._state.shadow)

    def _park(self, policy: Policy, rule: Rule) -> None:
        before = self._state.rules.get((policy.name, rule.name))
        if before is not None:
            parked = park(before, rule)
            self._end(policy.name, rule.name, before, parked)
            if parked.state is not None:
                self._rules[policy.name, rule.name] = parked.state

    def _retire(self) -> None:
        present = {(policy.name, rule.name) for policy in self._policies for rule in policy.rules}
        for (policy, rule), state in sorted(self._state.rules.items()):
            if (policy, rule) not in present:
                self._end(policy, rule, state, retire(state))

    def _end(self, policy: str, rule: str, before: RuleState | None, ended: Restart) -> None:
        """Journal what went with the rule's state; only a claim that held the knob changes anything."""
        for claim, reason in ended.withdrawn:
            assert before is not None, "only a state has claims"
            verdict = "overruled" if claim.overruled_by is not None else "applied"
            draft = Draft(claim.knob, claim.scope, claim.value, None, reason)
            self._decide(policy, rule, draft, "shadowed" if before.shadow else verdict)
        self._notices += ended.over

    def _arbitrate(self, shadow: bool) -> Ruling:
        bids = [
            Bid(
                turn.policy.name,
                turn.rule.name,
                turn.policy.priority,
                turn.rule.protective,
                claim.knob,
                claim.scope,
                claim.value,
                turn.rule.lease_ns,
            )
            for turn in self._turns
            if turn.before.shadow is shadow
            for claim in turn.claims.held.values()
        ]
        context = self._context
        real = not shadow and not context.off
        orders = [o for o in context.overrides if o.until_ns > context.now_ns] if real else ()
        return arbitrate(bids, context.knobs, orders, context.now_ns)

    def _settle(self, turn: Turn, after: RuleState, ruling: Ruling) -> None:
        """The verdicts of what the rule drafted, and what arbitration alone changed for it."""
        before, drafts = turn.before, turn.claims.drafts
        if not drafts and not after.claims:
            return
        policy, rule = turn.policy.name, turn.rule.name
        stepped = set()
        if drafts:
            # A claim that was dropped changes something only if it held the knob until now.
            overruled = {
                (claim.knob, claim.scope): claim.overruled_by for claim in (*before.claims, *after.claims)
            }
            for draft in drafts:
                target = (draft.knob, draft.scope)
                if draft.verdict in (None, "clamped"):
                    stepped.add(target)
                self._decide(policy, rule, draft, self._verdict(draft, after, overruled.get(target)))
        if before.shadow:
            return
        for claim in after.claims:
            target = (claim.knob, claim.scope)
            by, lease = claim.overruled_by, ruling.leases.get(target)
            if lease is not None and (lease.policy, lease.rule) == (policy, rule):
                self._follow(turn, lease, target in stepped)
            elif by is not None and target not in stepped:
                old = next((c for c in before.claims if (c.knob, c.scope) == target), None)
                if old is not None and by != old.overruled_by:
                    draft = Draft(*target, old.value, claim.value, f"by {by}")
                    self._decide(policy, rule, draft, "overruled")

    def _verdict(self, draft: Draft, after: RuleState, overruled_by: str | None) -> str:
        if draft.verdict is not None and (draft.verdict != "clamped" or overruled_by is None):
            return draft.verdict
        if after.shadow:
            first = after.steps == 1 and after.changed_ns == self._context.now_ns
            if not first and draft.after is not None:
                draft.reason = f"{draft.reason} (open_loop)"
            return "shadowed"
        if overruled_by is not None:
            draft.reason = f"{draft.reason}; by {overruled_by}"
            return "overruled"
        return "applied"

    def _follow(self, turn: Turn, lease: LeaseWish, stepped: bool) -> None:
        """The rule holds this lease: journal it where that is news, unless a step of the rule says it."""
        target, now_ns = (lease.knob, lease.scope), self._context.now_ns
        told, knob = self._state.told.get(target), self._context.knobs[lease.knob]
        action = turn.rule.action_on(*target)
        assert action is not None, "a rule claims only what it acts on"
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


_NOTHING: Mapping[Target, str] = {}


def _by_rule(ruling: Ruling) -> dict[RuleKey, dict[Target, str]]:
    """Whose claims do not hold, and who holds the knob instead."""
    losses: dict[RuleKey, dict[Target, str]] = {}
    for bid, by in ruling.overruled.items():
        losses.setdefault((bid.policy, bid.rule), {})[bid.knob, bid.scope] = by
    return losses


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
