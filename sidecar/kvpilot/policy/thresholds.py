"""Thresholds that cannot be meant: a number that the signal it is compared with never comes near.

Looks at comparisons of one bare variable with one bare number; all others are left alone.
"""

from collections.abc import Mapping, Sequence

from kvpilot.policy.tokens import Fault, Token
from kvpilot.signals import Signal

_SLO_PLAUSIBLE = (0.0, 1000.0)
_COMPARISONS = {"<", "<=", ">", ">=", "==", "!="}
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_EDGES = {"(", ")", "&&", "||", "!", "?", ":", ""}
_NUMBERS = ("float", "int")


def implausible(tokens: Sequence[Token], inputs: Mapping[str, Signal | None]) -> list[Fault]:
    """Comparisons that cannot be meant, or can never hold."""
    folded = _fold_signs(tokens)
    faults = []
    for i in range(len(folded) - 2):
        left, operator, right = folded[i : i + 3]
        before = folded[i - 1].text if i else ""
        after = folded[i + 3].text if i + 3 < len(folded) else ""
        if operator.text not in _COMPARISONS or before not in _EDGES or after not in _EDGES:
            continue
        if left.kind == "name" and right.kind in _NUMBERS:
            name, comparison, number = left, operator.text, right
        elif right.kind == "name" and left.kind in _NUMBERS:
            name, comparison, number = right, _FLIPPED[operator.text], left
        else:
            continue
        message = _objection(name.text, comparison, number.text, inputs)
        if message:
            faults.append(Fault(number.offset, message))
    return faults


def _fold_signs(tokens: Sequence[Token]) -> list[Token]:
    """`-` and a number after a comparison or an edge become one negative number."""
    folded: list[Token] = []
    for token in tokens:
        sign = folded[-1] if folded else None
        if token.kind in _NUMBERS and sign is not None and sign.text == "-":
            before = folded[-2].text if len(folded) > 1 else ""
            if before in _COMPARISONS or before in _EDGES:
                folded[-1] = Token(
                    token.kind, f"-{token.text}", sign.offset, token.offset + token.length - sign.offset
                )
                continue
        folded.append(token)
    return folded


def _objection(name: str, comparison: str, number: str, inputs: Mapping[str, Signal | None]) -> str | None:
    signal = inputs.get(name)
    if signal is not None:
        (low, high), unit, what = signal.plausible, signal.unit, signal.name
    elif name.startswith("slo."):
        (low, high), unit, what = _SLO_PLAUSIBLE, "seconds", name
    else:
        return None
    value = float(number)
    if not low <= value <= high:
        hint = (
            f"; write {value / 100:g} for {value:g} percent" if unit == "ratio" and 1 < value <= 100 else ""
        )
        return (
            f"threshold {number} is outside the plausible range of {what} ({low:g} to {high:g} {unit}){hint}"
        )
    if (comparison == ">" and value == high) or (comparison == "<" and value == low):
        return f"is never true: {what} lies between {low:g} and {high:g} {unit}"
    return None
