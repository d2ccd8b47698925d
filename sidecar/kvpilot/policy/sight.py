"""Whether a rule can see: every input that its expressions name is there, and every model it goes by."""

from collections.abc import Iterator, Mapping

from kvpilot.policy.context import Context
from kvpilot.policy.expr import Expression, Reading
from kvpilot.policy.rules import Rule, Solve
from kvpilot.policy.solve import solve
from kvpilot.signals import Missing


def sees(rule: Rule, readings: Mapping[str, Reading], context: Context) -> bool:
    """Stricter than a tick, which asks only for what the rule's phase consults. `readings` by input name."""
    for expression in expressions(rule):
        for name in expression.names:
            if not name.startswith("slo.") and isinstance(readings.get(name), Missing | None):
                return False
    for action in rule.actions:
        if isinstance(action.amount, Solve) and isinstance(solve(action.amount, 1.0, context), Missing):
            return False
    if rule.choose is None:
        return True
    prices = context.forecasts.seconds_per_token
    return any(isinstance(prices.get(round(candidate)), float | int) for candidate in rule.choose.candidates)


def expressions(rule: Rule) -> Iterator[Expression]:
    """Every expression of the rule."""
    unless = rule.choose.unless if rule.choose is not None else None
    for found in (rule.when, rule.until, unless):
        if found is not None:
            yield found
    for action in rule.actions:
        amount = action.amount.target if isinstance(action.amount, Solve) else action.amount
        if isinstance(amount, Expression):
            yield amount
