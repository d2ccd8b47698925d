"""A decision explained, for a terminal: what, why, on what grounds, against whom, to what effect."""

import datetime
from collections.abc import Iterator, Mapping
from typing import Any

from kvpilot.clock import NS
from kvpilot.explain.inquiry import Explained
from kvpilot.journal.records import DecisionRecord, EffectRecord
from kvpilot.policy.lease import OVERRIDE
from kvpilot.policy.source import printable

_VERDICTS = {
    "unconfirmed": "written, not confirmed: the engine has not echoed it",
    "shadowed": "shadowed: nothing was moved",
    "clamped": "clamped: the engine's limits kept it from more",
    "overruled": "overruled: another claim holds the knob",
    "rate_limited": "rate limited: the policy's limits are used up",
    "cooling_down": "cooling down: it acts when the cooldown ends, if still active",
    "missing_input": "missing input: it cannot see",
    "unsupported": "unsupported: this engine has no such knob",
    "rejected_by_engine": "rejected by the engine: it is at another value",
    "lease_expired": "lease expired: the pilot did not renew it in time",
    "undone": "undone: the effect did not come",
    "inconclusive": "inconclusive: nobody can say what the change did",
    "suspended": "suspended: undone before, it pauses",
}
_MET = {True: "came", False: "did not come", None: "cannot be judged"}


def lines(explained: Explained, now_wall_ns: int) -> Iterator[str]:
    """A headline, what changed, and a line for each ground."""
    decision, rule = explained.decision, explained.rule or {}
    yield f"#{decision.number}  {_when(decision.at_wall_ns, now_wall_ns)}  {decision.policy}/{decision.rule}"
    yield f"  {_change(decision)}: {_verdict(decision)}"
    for title, rows in _grounds(explained, rule):
        for i, row in enumerate(rows):
            yield f"  {title if i == 0 else '':<9} {printable(row)}"


def _grounds(explained: Explained, rule: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    decision = explained.decision
    if decision.policy == OVERRIDE:
        yield "because", [f"{decision.rule} ordered it: {decision.reason}"]
    else:
        yield "because", _because(explained, rule)
        yield "rule", _rule(decision, rule)
        yield "inputs", _inputs(decision, rule)
    yield "claims", [_claim(claim) for claim in decision.claims]
    yield "expected", _effects(explained, rule)
    yield "now", _now(explained)
    yield "runbook", [str(rule["runbook_url"])] if rule.get("runbook_url") else []


def _because(explained: Explained, rule: Mapping[str, Any]) -> list[str]:
    rows = [explained.decision.reason]
    if explained.condition is not None and explained.condition not in explained.decision.reason:
        rows.append(explained.condition)
    if explained.with_values is not None:
        rows.append(explained.with_values)
    return rows + ([str(rule["choose"])] if "choose" in rule else [])


def _rule(decision: DecisionRecord, rule: Mapping[str, Any]) -> list[str]:
    state = "no such rule any more"
    if decision.phase is not None:
        state = f"{decision.phase} for {_seconds(decision.phase_s or 0.0)}"
    if not rule:
        return [state]
    limit = ", protective: a limit" if rule.get("protective") else ""
    first = f"{state}; {rule['mode']}, priority {rule['priority']}{limit}; {rule['path']}"
    timing = [f"{key} {rule[key]}" for key in ("for", "keepFor", "cooldown", "lease") if key in rule]
    return [first, f"do {'; '.join(rule.get('do', []))}; {', '.join(timing)}"] if rule.get("do") else [first]


def _inputs(decision: DecisionRecord, rule: Mapping[str, Any]) -> list[str]:
    """Those that the rule names; all of the policy's where the text is not known."""
    windows: Mapping[str, str] = rule.get("inputs", {})
    names = windows or decision.inputs
    rows = []
    for name in names:
        value = decision.inputs.get(name)
        shown = f"{name} = {value:.4g}" if isinstance(value, float | int) else f"{name} {value}"
        age = decision.ages.get(name)
        aged = "" if age is None else f", {_seconds(age)} old"
        rows.append(f"{shown}{aged}" + (f": {windows[name]}" if name in windows else ""))
    rows += [f"{name} = {value:.4g}" for name, value in rule.get("slo", {}).items()]
    return rows


def _claim(claim: Mapping[str, Any]) -> str:
    scope = "" if claim["scope"] == "all" else f" {claim['scope']}"
    fate = "holds" if claim["by"] is None else f"overruled by {claim['by']}"
    return f"{claim['rule']}{scope} {claim['value']:g} {fate}"


def _effects(explained: Explained, rule: Mapping[str, Any]) -> list[str]:
    if explained.effects:
        return [_effect(effect) for effect in explained.effects]
    return [f"{rule['verify']}: not measured"] if "verify" in rule else []


def _effect(effect: EffectRecord) -> str:
    met = None if effect.met is None else bool(effect.met)
    return (
        f"{effect.input} {effect.expected}: {_number(effect.before)} -> {_number(effect.after)}, "
        f"{_MET[met]} ({effect.reason})"
    )


def _now(explained: Explained) -> list[str]:
    now = explained.now
    if now is None:
        return []
    holds = "at baseline" if now.value is None else f"held at {now.value:g} by {now.holder}"
    knob = f"{explained.decision.knob} {holds}"
    if explained.decision.policy == OVERRIDE:
        return [knob]
    state = f"{now.state} for {_seconds(now.for_s or 0.0)}" if now.state is not None else "the rule is gone"
    return [f"{state}; {knob}"]


def _change(decision: DecisionRecord) -> str:
    scope = "" if decision.scope == "all" else f" {decision.scope}"
    if decision.before == decision.after:
        return f"{decision.knob}{scope} stays {_number(decision.after)}"
    after = "baseline" if decision.after is None else _number(decision.after)
    before = "baseline" if decision.before is None else _number(decision.before)
    return f"{decision.knob}{scope} {before} -> {after}"


def _verdict(decision: DecisionRecord) -> str:
    verdict = _VERDICTS.get(decision.verdict, decision.verdict)
    if decision.confirmed_after_s is not None and decision.verdict in ("applied", "clamped"):
        verdict += f", in force {_seconds(decision.confirmed_after_s)} later"
    return verdict


def _when(at_wall_ns: int, now_wall_ns: int) -> str:
    at = datetime.datetime.fromtimestamp(at_wall_ns / NS, datetime.UTC)
    ago = _seconds((now_wall_ns - at_wall_ns) / NS)
    return f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03d} UTC, {ago} ago"


def _seconds(seconds: float) -> str:
    """As people say it."""
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds >= 0.001 else "0 s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / 3_600:.0f} h"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
