"""From outcomes to journal rows: numbers every decision, and keeps the newest in memory for whoever looks.

A decision's number is its lease's decision id, so that an engine's page, the journal and the status agree on
which one they mean. What explains a decision later is written down with it: the rule's text and state, how
old its inputs were, who else claimed the knob.
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from kvpilot.adapters.actuator import Echo, Target
from kvpilot.clock import NS
from kvpilot.journal.records import (
    DecisionRecord,
    EffectRecord,
    EventRecord,
    Record,
    RuleRecord,
    VerdictRecord,
    claim_row,
    format_scope,
)
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.context import Slo
from kvpilot.policy.describe import describe_rule
from kvpilot.policy.lease import OVERRIDE, LeaseWish
from kvpilot.policy.outcome import Decision, Effect, Outcome
from kvpilot.policy.rules import PolicySet
from kvpilot.policy.state import RuleKey
from kvpilot.signals import Missing

Age = Callable[[str, str], float | None]
"""(policy, input) -> seconds since its newest sample, if there is one."""

RECENT = 50
OUTCOMES = {True: "came", False: "did_not_come", None: "inconclusive"}
"""What an effect is called, by `Effect.met`."""
_SENT = ("applied", "clamped")
"""Verdicts of evaluation that put something into a controls page."""


def _unknown(policy: str, name: str) -> float | None:
    return None


class Ledger:
    """Hands rows to `add`, which must not wait."""

    def __init__(self, add: Callable[[Record], None], last_number: int = 0) -> None:
        self.recent: deque[DecisionRecord] = deque(maxlen=RECENT)
        self.effects: deque[EffectRecord] = deque(maxlen=RECENT)
        self.counts: Counter[tuple[str, str, str, str]] = Counter()
        """Decisions by (policy, rule, knob, verdict), as evaluation gave it."""
        self.effect_counts: Counter[tuple[str, str, str]] = Counter()
        """Effects by (policy, rule, outcome)."""
        self.judged: dict[RuleKey, Effect] = {}
        """Of each rule the newest effect that could be judged."""
        self.actions = 0
        """Changes of values in force, as written for the engine or the valves."""
        self._add = add
        self._number = last_number
        self._held: dict[Target, float] = {}
        self._texts: dict[RuleKey, str] = {}
        self._checked: dict[RuleKey, int] = {}
        """The decision whose effect each rule is waiting for."""

    @property
    def newest(self) -> int:
        """The number of the newest decision."""
        return self._number

    def use(self, policies: PolicySet, slo: Slo, wall_ns: int) -> None:
        """Journal the texts of these rules; the decisions that follow are theirs."""
        self._texts = {}
        for policy in policies.policies:
            for rule in policy.rules:
                described = describe_rule(policy, rule, slo)
                text = json.dumps([policy.name, rule.name, described], sort_keys=True)
                key = hashlib.sha256(text.encode()).hexdigest()[:16]
                self._texts[policy.name, rule.name] = key
                self._add(RuleRecord(key, wall_ns, policy.name, rule.name, described))

    def record(self, outcome: Outcome, nonce: int, wall_ns: int, age: Age = _unknown) -> dict[Target, int]:
        """Journal a tick's decisions and effects. Returns the numbers of those that go to the engine."""
        for effect in outcome.effects:
            self._record_effect(effect, wall_ns)
        sent: dict[Target, int] = {}
        holders = {(lease.knob, lease.scope): (lease.policy, lease.rule) for lease in outcome.leases}
        for decision in outcome.decisions:
            self._number += 1
            self.counts[decision.policy, decision.rule, decision.knob, decision.verdict] += 1
            target, decider = (decision.knob, decision.scope), (decision.policy, decision.rule)
            # A lease carries the number of whoever holds it: a restarted pilot asks the journal for its rule.
            if decision.verdict in _SENT and holders.get(target, decider) == decider:
                sent[target] = self._number
            row = self._row(decision, outcome, nonce, wall_ns, age)
            if decision.verdict == "applied" and target in sent:
                row = replace(row, verdict="unconfirmed")
            self.recent.append(row)
            self._add(row)
            state = outcome.state.rules.get(decider)
            if state is not None and state.check is not None and state.check.at_ns == decision.at_ns:
                self._checked[decider] = self._number
        return sent

    def _row(
        self, decision: Decision, outcome: Outcome, nonce: int, wall_ns: int, age: Age
    ) -> DecisionRecord:
        decider = (decision.policy, decision.rule)
        state = outcome.state.rules.get(decider)
        ages = {name: age(decision.policy, name) for name in decision.inputs}
        return DecisionRecord(
            number=self._number,
            at_wall_ns=wall_ns,
            engine_nonce=nonce,
            policy=decision.policy,
            rule=decision.rule,
            knob=decision.knob,
            scope=format_scope(decision.scope),
            before=decision.before,
            after=decision.after,
            verdict=decision.verdict,
            reason=decision.reason,
            inputs={name: _plain(value) for name, value in decision.inputs.items()},
            ages={name: round(seconds, 3) for name, seconds in ages.items() if seconds is not None},
            phase=None if state is None else state.phase.value,
            phase_s=None if state is None else (decision.at_ns - state.since_ns) / NS,
            claims=tuple(_claims(outcome, decision.knob)),
            text=self._texts.get(decider),
        )

    def _record_effect(self, effect: Effect, wall_ns: int) -> None:
        self.effect_counts[effect.policy, effect.rule, OUTCOMES[effect.met]] += 1
        if effect.met is not None:
            self.judged[effect.policy, effect.rule] = effect
        seen = EffectRecord(
            wall_ns,
            effect.policy,
            effect.rule,
            effect.input,
            effect.expected,
            effect.before,
            effect.after,
            effect.met,
            effect.reason,
            self._checked.pop((effect.policy, effect.rule), None),
        )
        self.effects.append(seen)
        self._add(seen)

    def inherit(self, leases: Iterable[LeaseWish]) -> None:
        """Leases that an earlier pilot wrote: going on from them changes nothing."""
        self._held = {(lease.knob, lease.scope): lease.value for lease in leases}

    def count_changes(self, leases: Iterable[LeaseWish], knobs: Mapping[str, ManifestKnob]) -> None:
        """Count each (knob, scope) whose value these leases change; without a lease it is at baseline."""
        held = {(lease.knob, lease.scope): lease.value for lease in leases}
        for target in {*held, *self._held}:
            knob = knobs.get(target[0])
            home = knob.baseline if knob is not None else None
            self.actions += held.get(target, home) != self._held.get(target, home)
        self._held = held

    def confirm(self, echoes: list[Echo]) -> None:
        """Journal what the engine made of earlier decisions."""
        for echo in echoes:
            self._add(VerdictRecord(echo.number, echo.verdict, echo.after_s))
            for index, row in enumerate(self.recent):
                if row.number == echo.number and row.verdict == "unconfirmed":
                    self.recent[index] = replace(row, verdict=echo.verdict, confirmed_after_s=echo.after_s)

    def event(self, kind: str, detail: str, wall_ns: int) -> None:
        """Journal something that explains other rows."""
        self._add(EventRecord(wall_ns, kind, detail))


def _plain(value: float | Missing) -> float | str:
    return f"missing: {value.reason}" if isinstance(value, Missing) else value


def _claims(outcome: Outcome, knob: str) -> Iterator[dict[str, Any]]:
    """Who claims the knob after the tick, for any scope: rules, and people."""
    for (policy, rule), state in sorted(outcome.state.rules.items()):
        for claim in state.claims:
            if claim.knob == knob:
                name = f"{policy}/{rule}{' (shadow)' if state.shadow else ''}"
                yield claim_row(name, claim.scope, claim.value, claim.overruled_by)
    for lease in outcome.leases:
        if lease.knob == knob and lease.policy == OVERRIDE:
            yield claim_row(f"{lease.policy}/{lease.rule}", lease.scope, lease.value, None)
