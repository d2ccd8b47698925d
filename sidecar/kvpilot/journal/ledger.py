"""From outcomes to journal rows: numbers every decision, and keeps the newest in memory for whoever looks.

A decision's number is its lease's decision id, so that an engine's page, the journal and the status agree on
which one they mean.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from kvpilot.adapters.actuator import Echo, Target
from kvpilot.journal.records import (
    DecisionRecord,
    EffectRecord,
    EventRecord,
    Record,
    VerdictRecord,
    format_scope,
)
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.outcome import LeaseWish, Outcome
from kvpilot.signals import Missing

RECENT = 50
_SENT = ("applied", "clamped")
"""Verdicts of evaluation that put something into a controls page."""


class Ledger:
    """Hands rows to `add`, which must not wait."""

    def __init__(self, add: Callable[[Record], None], last_number: int = 0) -> None:
        self.recent: deque[DecisionRecord] = deque(maxlen=RECENT)
        self.effects: deque[EffectRecord] = deque(maxlen=RECENT)
        self.counts: Counter[tuple[str, str, str, str]] = Counter()
        """Decisions by (policy, rule, knob, verdict), as evaluation gave it."""
        self.actions = 0
        """Changes of values in force, as written for the engine or the valves."""
        self._add = add
        self._number = last_number
        self._held: dict[Target, float] = {}

    def record(self, outcome: Outcome, nonce: int, wall_ns: int) -> dict[Target, int]:
        """Journal a tick's decisions and effects. Returns the numbers of those that go to the engine."""
        sent: dict[Target, int] = {}
        holders = {(lease.knob, lease.scope): (lease.policy, lease.rule) for lease in outcome.leases}
        for decision in outcome.decisions:
            self._number += 1
            self.counts[decision.policy, decision.rule, decision.knob, decision.verdict] += 1
            target, decider = (decision.knob, decision.scope), (decision.policy, decision.rule)
            # A lease carries the number of whoever holds it: a restarted pilot asks the journal for its rule.
            if decision.verdict in _SENT and holders.get(target, decider) == decider:
                sent[target] = self._number
            row = DecisionRecord(
                number=self._number,
                at_wall_ns=wall_ns,
                engine_nonce=nonce,
                policy=decision.policy,
                rule=decision.rule,
                knob=decision.knob,
                scope=format_scope(decision.scope),
                before=decision.before,
                after=decision.after,
                verdict="unconfirmed" if decision.verdict == "applied" else decision.verdict,
                reason=decision.reason,
                inputs={name: _plain(value) for name, value in decision.inputs.items()},
            )
            self.recent.append(row)
            self._add(row)
        for effect in outcome.effects:
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
            )
            self.effects.append(seen)
            self._add(seen)
        return sent

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
                    self.recent[index] = replace(row, verdict=echo.verdict)

    def event(self, kind: str, detail: str, wall_ns: int) -> None:
        """Journal something that explains other rows."""
        self._add(EventRecord(wall_ns, kind, detail))


def _plain(value: float | Missing) -> float | str:
    return f"missing: {value.reason}" if isinstance(value, Missing) else value
