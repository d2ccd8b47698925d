"""From journal rows to finished decisions: each with its verdict and, where its rule verifies, its effect.

A decision is told when nothing more will come of it: its echo has come, and its effect where one is awaited.
What stays open for `OPEN_FOR_NS` is told as it is. Plain values; nothing here knows OpenTelemetry.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvpilot.clock import NS
from kvpilot.journal.records import DecisionRecord, EffectRecord, Record, RuleRecord, VerdictRecord

OPEN_FOR_NS = 120 * NS
_EFFECTIVE = ("unconfirmed", "applied", "clamped")


@dataclass(frozen=True, slots=True)
class Decided:
    """One decision with what came of it. `expected` is what its rule's `verify` says, in words."""

    decision: DecisionRecord
    expected: str | None = None
    verdict: VerdictRecord | None = None
    effect: EffectRecord | None = None

    @property
    def name(self) -> str:
        """The verdict that holds in the end."""
        return self.decision.verdict if self.verdict is None else self.verdict.verdict

    @property
    def is_open(self) -> bool:
        """Whether something is still to come."""
        if self.name == "unconfirmed":
            return True
        awaited = self.expected is not None and self.name in _EFFECTIVE
        return awaited and self.effect is None


class DecisionSpans:
    """Takes rows in journal order, gives decisions that are complete. Bounded: see `most`."""

    def __init__(self, most: int = 1024) -> None:
        self._most = most
        self._open: dict[int, Decided] = {}
        self._done: deque[Decided] = deque()
        self._expected: dict[str, str] = {}
        """By the key of a rule's text."""

    def add(self, row: Record) -> None:
        """One row."""
        match row:
            case RuleRecord():
                verify = row.described.get("verify")
                if verify:
                    self._expected[row.key] = str(verify)
            case DecisionRecord():
                self._keep(row.number, Decided(row, self._expected.get(row.text or "")))
            case VerdictRecord() if row.number in self._open:
                self._keep(row.number, replace(self._open[row.number], verdict=row))
            case EffectRecord() if row.number in self._open:
                self._keep(row.number or 0, replace(self._open[row.number or 0], effect=row))

    def take(self, wall_ns: int | None) -> list[Decided]:
        """Decisions that are complete, or too old to wait for. Without a time: all that there are."""
        for number, each in list(self._open.items()):
            if wall_ns is None or wall_ns - each.decision.at_wall_ns >= OPEN_FOR_NS:
                self._done.append(self._open.pop(number))
        done = list(self._done)
        self._done.clear()
        return done

    def _keep(self, number: int, decided: Decided) -> None:
        if not decided.is_open:
            self._open.pop(number, None)
            self._done.append(decided)
            return
        self._open[number] = decided
        while len(self._open) > self._most:
            self._done.append(self._open.pop(next(iter(self._open))))


def attributes(decided: Decided) -> dict[str, Any]:
    """What a span says of a decision; numbers as numbers, what was missing as `missing: why`."""
    row, effect = decided.decision, decided.effect
    said: dict[str, Any] = {
        "kvpilot.decision": row.number,
        "kvpilot.policy": row.policy,
        "kvpilot.rule": row.rule,
        "kvpilot.knob": row.knob,
        "kvpilot.scope": row.scope,
        "kvpilot.value.before": row.before,
        "kvpilot.value.after": row.after,
        "kvpilot.verdict": decided.name,
        "kvpilot.reason": row.reason,
        "kvpilot.phase": row.phase,
        "kvpilot.engine.start": f"{row.engine_nonce:016x}",
        "kvpilot.effect.expected": decided.expected,
        **{f"kvpilot.input.{name}": value for name, value in row.inputs.items()},
        **{f"kvpilot.input_age_seconds.{name}": age for name, age in row.ages.items()},
    }
    if effect is not None:
        said |= _effect(effect)
    return {name: value for name, value in said.items() if value is not None}


def _effect(effect: EffectRecord) -> Mapping[str, Any]:
    met = {True: "came", False: "did_not_come", None: "inconclusive"}[effect.met]
    ratio = None
    if effect.after is not None and effect.before:
        ratio = effect.after / effect.before - 1
    return {
        "kvpilot.effect.input": effect.input,
        "kvpilot.effect.before": effect.before,
        "kvpilot.effect.after": effect.after,
        "kvpilot.effect.realised_ratio": ratio,
        "kvpilot.effect.outcome": met,
        "kvpilot.effect.reason": effect.reason,
    }
