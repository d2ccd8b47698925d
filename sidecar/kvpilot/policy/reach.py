"""Rules that can never act, or never end: found by intervals, where that is certain.

Every variable lies in the plausible range of its signal, an `slo` target above 0. Conditions that are joined
by `&&` narrow each other's variables; whatever is not understood may be anything. So what is reported is
certain, and what is not reported may still be a mistake.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from kvpilot.policy.expr import Expression
from kvpilot.policy.rules import Policy, Rule
from kvpilot.policy.source import Problem, Source
from kvpilot.policy.syntax import Binary, Choice, Name, Node, Number, Unary, parse
from kvpilot.signals import SIGNALS

_INF = math.inf
_NEGATED = {"<": ">=", ">=": "<", ">": "<=", "<=": ">", "==": "!=", "!=": "=="}
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_MOST_TERMS = 64
"""Of a condition as alternatives of conjunctions; a longer one is not looked into."""


class Range(NamedTuple):
    """An interval; an open end is not in it."""

    low: float = -_INF
    high: float = _INF
    low_open: bool = False
    high_open: bool = False

    @property
    def empty(self) -> bool:
        return self.low > self.high or (self.low == self.high and (self.low_open or self.high_open))

    def meet(self, other: "Range") -> "Range":
        """What is in both."""
        low = max((self.low, self.low_open), (other.low, other.low_open))
        high = min((self.high, not self.high_open), (other.high, not other.high_open))
        return Range(low[0], high[0], low[1], not high[1])


_ANY = Range()
_SLO = Range(0.0, _INF, low_open=True)


class _Term(NamedTuple):
    """One comparison; of a whole condition, one of its conjuncts."""

    left: Node
    operator: str
    right: Node


def unreachable(policy: Policy, source: Source) -> list[Problem]:
    """What can be said of the rules of one policy."""
    ranges = {
        name: Range(*SIGNALS[spec.signal].plausible)
        for name, spec in policy.inputs.items()
        if spec.signal in SIGNALS
    }
    return [problem for rule in policy.rules for problem in _of_rule(rule, ranges, source)]


def _of_rule(rule: Rule, ranges: Mapping[str, Range], source: Source) -> list[Problem]:
    if rule.when is None:
        return []
    path = source.rule(rule.name)
    when = _terms(_tree(rule.when), True)
    if not _possible(when, ranges):
        return [source.inside((*path, "when"), 0, "when: can never be true: this rule never acts")]
    if rule.until is None:
        return []
    tree = _tree(rule.until)
    if not _possible(_terms(tree, True), ranges):
        return [source.inside((*path, "until"), 0, "until: can never be true: this rule never ends")]
    both = _joined(when, _terms(tree, False))
    if rule.keep_for_ns == 0 and not _possible(both, ranges):
        message = "until: is true whenever `when` is: this rule would end as soon as it acts"
        return [source.inside((*path, "until"), 0, message)]
    return []


def _tree(expression: Expression) -> Node | None:
    return parse(expression.text)


_Terms = list[list[_Term]] | None
"""Alternatives, each a conjunction; None: not looked into."""


def _terms(node: Node | None, wanted: bool) -> _Terms:
    """The condition that `node` is `wanted`."""
    match node:
        case Unary("!", inner):
            return _terms(inner, not wanted)
        case Binary("&&" | "||" as operator, left, right):
            one, other = _terms(left, wanted), _terms(right, wanted)
            return _joined(one, other) if (operator == "&&") == wanted else _either(one, other)
        case Binary(operator, left, right) if operator in _NEGATED:
            return [[_Term(left, operator if wanted else _NEGATED[operator], right)]]
    return None


def _either(one: _Terms, other: _Terms) -> _Terms:
    if one is None or other is None or len(one) + len(other) > _MOST_TERMS:
        return None
    return one + other


def _joined(one: _Terms, other: _Terms) -> _Terms:
    if one is None or other is None:
        # Half a conjunction can still be found impossible.
        return other if one is None else one
    if len(one) * len(other) > _MOST_TERMS:
        return None
    return [left + right for left in one for right in other]


def _possible(terms: _Terms, ranges: Mapping[str, Range]) -> bool:
    return terms is None or any(_holds(conjunction, dict(ranges)) for conjunction in terms)


def _holds(conjunction: list[_Term], ranges: dict[str, Range]) -> bool:
    """Whether all may be true at once."""
    for _ in range(2):
        for left, operator, right in conjunction:
            for name, relation, other in ((left, operator, right), (right, _TURNED[operator], left)):
                if isinstance(name, Name):
                    bound = _value(other, ranges)
                    ranges[name.text] = _range(name.text, ranges).meet(_allowed(relation, bound))
                    if ranges[name.text].empty:
                        return False
    return all(_may(left, operator, right, ranges) for left, operator, right in conjunction)


def _allowed(relation: str, bound: Range) -> Range:
    """Where something may lie that stands in `relation` to a value in `bound`."""
    match relation:
        case "<":
            return Range(high=bound.high, high_open=True)
        case "<=":
            return Range(high=bound.high, high_open=bound.high_open)
        case ">":
            return Range(low=bound.low, low_open=True)
        case ">=":
            return Range(low=bound.low, low_open=bound.low_open)
        case "==":
            return bound
    return _ANY


def _may(left: Node, operator: str, right: Node, ranges: Mapping[str, Range]) -> bool:
    one, other = _value(left, ranges), _value(right, ranges)
    if operator == "!=":
        return not (one.low == one.high == other.low == other.high)
    return not one.meet(_allowed(operator, other)).empty


def _range(name: str, ranges: Mapping[str, Range]) -> Range:
    return ranges.get(name, _SLO if name.startswith("slo.") else _ANY)


def _value(node: Node, ranges: Mapping[str, Range]) -> Range:
    """Where a number may lie. Ends are closed but for a bare name's: wider is always safe."""
    match node:
        case Number(value):
            return Range(value, value)
        case Name(text):
            return _range(text, ranges)
        case Unary("-", inner):
            found = _value(inner, ranges)
            return Range(-found.high, -found.low)
        case Binary(operator, left, right) if operator in ("+", "-", "*"):
            return _arithmetic(operator, _value(left, ranges), _value(right, ranges))
        case Choice(_, yes, no):
            one, other = _value(yes, ranges), _value(no, ranges)
            return Range(min(one.low, other.low), max(one.high, other.high))
    return _ANY


def _arithmetic(operator: str, one: Range, other: Range) -> Range:
    if operator == "-":
        other = Range(-other.high, -other.low)
    ends = [
        left * right if operator == "*" else left + right
        for left in (one.low, one.high)
        for right in (other.low, other.high)
    ]
    if any(math.isnan(end) for end in ends):
        return _ANY
    if operator == "*":
        return Range(min(ends), max(ends))
    return Range(ends[0], ends[3])
