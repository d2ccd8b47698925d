"""From outcomes to journal rows: numbers every decision, and keeps the newest in memory for whoever looks.

A decision's number is its lease's decision id, so that an engine's page, the journal and the status agree on
which one they mean.
"""

from collections import Counter, deque
from collections.abc import Callable
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
from kvpilot.policy.outcome import Outcome
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
        """Changes that were written for the engine or the valves."""
        self._add = add
        self._number = last_number

    def record(self, outcome: Outcome, nonce: int, wall_ns: int) -> dict[Target, int]:
        """Journal a tick's decisions and effects. Returns the numbers of those that go to the engine."""
        sent: dict[Target, int] = {}
        for decision in outcome.decisions:
            self._number += 1
            self.counts[decision.policy, decision.rule, decision.knob, decision.verdict] += 1
            if decision.verdict in _SENT:
                self.actions += 1
                sent[decision.knob, decision.scope] = self._number
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
