"""What the journal says of decisions: each with its rule's text, its condition with values, its effect."""

import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpilot.journal.past import opened
from kvpilot.journal.records import DecisionRecord, EffectRecord
from kvpilot.journal.store import JournalError, decision_of, decisions_query, effects_query, rule_of
from kvpilot.policy.tokens import NAME, variable_of

_CONDITION = re.compile(r"(?:when|until|no longer): ([^;]+?)(?: \(open_loop\))?(?:;|$)")


@dataclass(frozen=True, slots=True)
class Now:
    """What has become of it, as the pilot says: the rule's state, and who holds the knob at which value."""

    state: str | None
    """None where the rule is no more."""
    for_s: float | None
    value: float | None
    """None where nobody holds the knob: it is at baseline."""
    holder: str | None


@dataclass(frozen=True, slots=True)
class Explained:
    """One decision. `rule` is the rule's text then (`describe_rule`); None where the journal has none."""

    decision: DecisionRecord
    rule: Mapping[str, Any] | None = None
    condition: str | None = None
    """The expression that moved it."""
    with_values: str | None = None
    """The same, with the values of that moment."""
    effects: tuple[EffectRecord, ...] = ()
    now: Now | None = None


def inquire(journal: Path, number: int | None, last: int) -> list[Explained]:
    """The decision of that number, or the newest, newest first. Raises JournalError."""
    try:
        with opened(journal) as (database, version):
            query = decisions_query(version)
            if number is None:
                rows = database.execute(f"{query} ORDER BY number DESC LIMIT ?", (last,)).fetchall()
            else:
                rows = database.execute(f"{query} WHERE number = ?", (number,)).fetchall()
                if not rows:
                    raise JournalError(f"journal {journal}: no decision {number}; {_range(database)}")
            return [_explain(database, version, decision_of(row)) for row in rows]
    except (sqlite3.Error, TypeError, ValueError) as error:
        raise JournalError(f"journal {journal}: {error}") from error


def _range(database: sqlite3.Connection) -> str:
    first, newest = database.execute("SELECT min(number), max(number) FROM decisions").fetchone()
    return "it has none yet" if newest is None else f"it has {first} to {newest}"


def _explain(database: sqlite3.Connection, version: int, decision: DecisionRecord) -> Explained:
    found: tuple[EffectRecord, ...] = ()
    if version > 1 and decision.before != decision.after:
        found = _effects(database, version, decision)
    record = rule_of(database, decision.text) if decision.text is not None else None
    rule = None if record is None else record.described
    condition = _condition(decision, rule)
    values = None if condition is None else _filled(condition, decision, rule)
    return Explained(decision, rule, condition, None if values == condition else values, found)


def _effects(
    database: sqlite3.Connection, version: int, decision: DecisionRecord
) -> tuple[EffectRecord, ...]:
    """Of the step that the decision is part of: a rule that moves two knobs at once has one effect."""
    step = "SELECT number FROM decisions WHERE policy = ? AND rule = ? AND at_wall_ns = ?"
    query = f"{effects_query(version)} WHERE number IN ({step}) ORDER BY id"
    rows = database.execute(query, (decision.policy, decision.rule, decision.at_wall_ns))
    return tuple(EffectRecord(*row) for row in rows)


def _condition(decision: DecisionRecord, rule: Mapping[str, Any] | None) -> str | None:
    """The one that the reason quotes; else the one that holds while the rule is active."""
    quoted = _CONDITION.search(decision.reason)
    if quoted is not None:
        return quoted[1].strip()
    when = rule.get("when") if rule is not None and decision.phase == "active" else None
    return when if isinstance(when, str) else None


def _filled(condition: str, decision: DecisionRecord, rule: Mapping[str, Any] | None) -> str:
    """Each name replaced by what it was."""
    slo = rule.get("slo", {}) if rule is not None else {}

    def value(name: re.Match[str]) -> str:
        key = variable_of(name[0])
        found = decision.inputs.get(key, slo.get(key))
        if found is None:
            return name[0]
        return f"{found:.4g}" if isinstance(found, float | int) else f"({found})"

    # What follows a digit is an exponent: 1e-3.
    return re.sub(rf"(?<![\w.])(?:{NAME})", value, condition)


def now(explained: Explained, status: Mapping[str, Any]) -> Now:
    """What a running pilot's status says of the same rule and knob."""
    decision = explained.decision
    rules = (r for r in status["rules"] if (r["policy"], r["rule"]) == (decision.policy, decision.rule))
    rule = next(rules, None)
    leases = (
        lease
        for lease in status["leases"]
        if (lease["knob"], lease["scope"]) == (decision.knob, decision.scope)
    )
    lease = next(leases, None)
    return Now(
        state=None if rule is None else f"{rule['state']}{' (shadow)' if rule['shadow'] else ''}",
        for_s=None if rule is None else rule["for_s"],
        value=None if lease is None else lease["value"],
        holder=None if lease is None else f"{lease['policy']}/{lease['rule']}",
    )
