"""A rule in plain data, for whoever asks later why it did something: its text may have changed by then."""

from collections.abc import Mapping
from typing import Any

from kvpilot.knobs import KNOBS
from kvpilot.link.controls import Scope
from kvpilot.policy.context import Slo
from kvpilot.policy.expr import Expression
from kvpilot.policy.quantity import format_duration
from kvpilot.policy.rules import TOP_TENANT, Action, InputSpec, Policy, Rule, Solve
from kvpilot.policy.tokens import slo_target

_SCOPES = {"class_at_most": "classAtMost", "tenant": "tenant"}


def describe_rule(policy: Policy, rule: Rule, slo: Slo) -> dict[str, Any]:
    """What the rule says, with the inputs and the SLO targets that it names. For JSON; absent is not said."""
    names = sorted(_names(rule))
    described = {
        "mode": policy.mode,
        "priority": policy.priority,
        "path": policy.path,
        "summary": policy.annotations.get("summary"),
        "runbook_url": policy.annotations.get("runbook_url"),
        "protective": rule.protective or None,
        "when": _text(rule.when),
        "until": _text(rule.until),
        "for": _duration(rule.for_ns),
        "keepFor": _duration(rule.keep_for_ns),
        "cooldown": _duration(rule.cooldown_ns),
        "lease": format_duration(rule.lease_ns),
        "choose": describe_choose(rule),
        "do": [describe_action(action) for action in rule.actions if rule.choose is None],
        "recover": [
            f"{step.knob} {step.add:+g} every {format_duration(step.every_ns)}" for step in rule.recover
        ],
        "verify": describe_verify(rule),
        "inputs": {
            name: describe_input(policy.inputs[name])
            for name in (names if rule.choose is None else policy.inputs)
            if name in policy.inputs
        },
        "slo": {name: value for name in names if (value := _slo(slo, name)) is not None},
    }
    return {key: value for key, value in described.items() if value not in (None, [], {})}


def describe_input(spec: InputSpec) -> str:
    """Such as `p95 of itl_seconds over 1s, 20 samples or more, 2s old at most`."""
    of_class = f" of class {spec.klass}" if spec.klass is not None else ""
    over = f" over {format_duration(round(spec.window_s * 1e9))}" if spec.window_s else ""
    least = f", {spec.min_samples} samples or more" if spec.min_samples > 1 else ""
    oldest = format_duration(round(spec.max_age_s * 1e9))
    return f"{spec.agg} of {spec.signal}{of_class}{over}{least}, {oldest} old at most"


def describe_action(action: Action) -> str:
    """Such as `prefill_chunk_tokens multiply 0.5, at least 256, in steps of 64`."""
    amount = action.amount
    if isinstance(amount, Solve):
        target = amount.target.text if isinstance(amount.target, Expression) else f"{amount.target:g}s"
        kind = f"solve {'stepTime' if amount.klass is None else f'ttft of {amount.klass}'} {target}"
    else:
        kind = f"{action.kind} {amount.text if isinstance(amount, Expression) else f'{amount:g}'}"
    step = f", in steps of {action.step:g}" if action.step is not None else ""
    # What the knob can be anywhere is no bound of the rule's.
    low, high = KNOBS[action.knob].plausible
    least = f", at least {action.minimum:g}" if action.minimum > low else ""
    most = f", at most {action.maximum:g}" if action.maximum < high else ""
    return f"{action.knob}{describe_scope(action.scope)} {kind}{least}{most}{step}"


def describe_scope(scope: Scope) -> str:
    """Nothing for everybody, else with a space before it."""
    if scope.kind == "all":
        return ""
    return " tenant=top" if scope == TOP_TENANT else f" {_SCOPES[scope.kind]}={scope.argument}"


def describe_choose(rule: Rule) -> str | None:
    """Such as `speculative_tokens of 0, 2, 4 by least forecast.seconds_per_token, better by 5%`."""
    choose = rule.choose
    if choose is None:
        return None
    candidates = ", ".join(f"{candidate:g}" for candidate in choose.candidates)
    return f"{choose.knob} of {candidates} by least {choose.minimise}, better by {choose.hysteresis:.0%}"


def describe_verify(rule: Rule) -> str | None:
    """Such as `itl_p95 falls 10% within 2s, else undo`."""
    verify = rule.verify
    if verify is None:
        return None
    within = format_duration(verify.within_ns)
    otherwise = "undo" if verify.undo else "alert"
    return f"{verify.input} {verify.direction} {verify.ratio:.0%} within {within}, else {otherwise}"


def _names(rule: Rule) -> set[str]:
    amounts = [action.amount for action in rule.actions]
    targets = [amount.target for amount in amounts if isinstance(amount, Solve)]
    named = {rule.verify.input} if rule.verify is not None else set[str]()
    unless = rule.choose.unless if rule.choose is not None else None
    for expression in (rule.when, rule.until, unless, *amounts, *targets):
        if isinstance(expression, Expression):
            named.update(expression.names)
    return named


def _slo(slo: Slo, name: str) -> float | None:
    found = slo_target(name)
    if found is None:
        return None
    klass, target = found
    value = slo.get(target if klass is None else klass)
    if klass is not None:
        value = value.get(target) if isinstance(value, Mapping) else None
    return None if isinstance(value, Mapping) else value


def _text(expression: Expression | None) -> str | None:
    return None if expression is None else expression.text


def _duration(duration_ns: int) -> str | None:
    return format_duration(duration_ns) if duration_ns else None
