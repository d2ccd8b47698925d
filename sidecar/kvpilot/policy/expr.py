"""Policy expressions: a small part of CEL, typed when loaded, evaluated to a value or to *missing*.

The part is numbers, inputs, `slo.*`, arithmetic, comparison, logic and `?:`. No calls, hence no macros, hence
evaluation is linear in the text, which is at most MAX_LENGTH characters. Every variable is a double.

Two traps are closed here and nowhere else: an expression that names a missing input is missing, whatever
CEL's short-circuit would conclude; and CEL reports errors as *values* that are truthy, so only the expected
type counts as an answer.
"""

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from cel_expr_python import cel

from kvpilot.signals import Missing, Signal

MAX_LENGTH = 500

Wanted = Literal["bool", "number"]
Reading = float | Missing

_NUMBERS = (float, int)
_SLO_TARGETS = ("itl", "ttft")
_SLO_PLAUSIBLE = (0.0, 1000.0)
_COMPARISONS = {"<", "<=", ">", ">=", "==", "!="}
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_EDGES = {"(", ")", "&&", "||", "!", "?", ":", ""}
_RESULT_TYPES = {"bool": (cel.Type.BOOL,), "number": (cel.Type.DOUBLE, cel.Type.INT)}
_TOKENS = re.compile(
    r"(?P<space>\s+|//[^\n]*)"
    r"|(?P<float>(?:\d+\.\d+|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)"
    r"|(?P<int>\d+)"
    r"|(?P<name>[A-Za-z_]\w*(?:\s*\.\s*[A-Za-z_]\w*)*)"
    r"|(?P<operator>&&|\|\||[<>=!]=|[-+*/%<>!?:().])",
    re.ASCII,
)
_CEL_ERROR = re.compile(r"ERROR: <input>:(\d+):(\d+): (.*)")


class Fault(NamedTuple):
    """What is wrong with an expression, and at which character of it."""

    offset: int
    message: str


class ExpressionError(ValueError):
    """The text is no valid expression; `faults` says all that is wrong with it."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(fault.message for fault in faults))
        self.faults = tuple(faults)


@dataclass(frozen=True, slots=True)
class Expression:
    """A checked expression. Equal texts are equal expressions."""

    text: str
    names: tuple[str, ...]
    """Every variable it names, sorted: if one is missing, so is the result."""
    wanted: Wanted
    program: Any = field(compare=False, repr=False)

    def missing(self, readings: Mapping[str, Reading]) -> tuple[str, Missing] | None:
        """The first variable without a usable value, and why; None when all are there."""
        for name in self.names:
            reading = readings.get(name)
            if reading is None:
                return name, Missing("not_provided")
            if isinstance(reading, Missing):
                return name, reading
            if reading != reading:
                return name, Missing("not_finite")
        return None

    def evaluate(self, readings: Mapping[str, Reading]) -> bool | float | Missing:
        """The value, or Missing if an input is, or if evaluation failed or gave no finite number."""
        data = {}
        for name in self.names:
            reading = readings.get(name)
            if not isinstance(reading, _NUMBERS) or reading != reading:
                absent = self.missing(readings)
                assert absent is not None, "this one is"
                return absent[1]
            data[name] = reading
        try:
            result = self.program.eval(data=data)
        except RuntimeError:
            return Missing("eval_error")
        if result.type() not in _RESULT_TYPES[self.wanted]:
            return Missing("eval_error")
        value: bool | int | float = result.value()
        if self.wanted == "bool":
            return bool(value)
        return float(value) if math.isfinite(value) else Missing("not_finite")


class Token(NamedTuple):
    kind: str
    text: str
    offset: int


LOWEST, HIGHEST = "lowest", "highest"
"""`slo.lowest.ttft` is the target of the lowest class, whatever its name: shipped policies know no names."""


def compile_expression(
    text: str,
    inputs: Mapping[str, Signal | None],
    wanted: Wanted,
    classes: Sequence[str] | None = None,
    fixed: bool = False,
) -> Expression:
    """Type-check `text` against the declared inputs (None: declared, its signal unknown) and `slo`.

    `classes` are the class names of the configuration; None accepts any, for checking without one.
    `fixed`: it may name no input at all, as a model's target does. Raises ExpressionError.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError([Fault(0, f"expression of {len(text)} characters: at most {MAX_LENGTH}")])
    tokens = tokenize(text)
    slo = {token.text for token in tokens if token.kind == "name" and _is_slo(token.text, classes)}
    declared = {*inputs, *slo}
    program = _compile(text, tokens, sorted(declared), [*inputs, "slo.itl", "slo.ttft", *slo])
    if program.return_type() not in _RESULT_TYPES[wanted]:
        what = "a condition (true or false)" if wanted == "bool" else "a number"
        raise ExpressionError([Fault(0, f"must be {what}, but is {program.return_type().name().lower()}")])
    names = sorted({token.text for token in tokens if token.text in declared})
    if not fixed and not any(name in inputs for name in names):
        raise ExpressionError([Fault(0, "names no input, so it can never change")])
    faults = [*_implausible(tokens, inputs)]
    if faults:
        raise ExpressionError(faults)
    return Expression(text, tuple(names), wanted, program)


def tokenize(text: str) -> list[Token]:
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        match = _TOKENS.match(text, position)
        if match is None:
            raise ExpressionError([Fault(position, f"unexpected character {text[position]!r}")])
        kind = str(match.lastgroup)
        if kind == "name":
            tokens.append(Token(kind, re.sub(r"\s+", "", match[0]), position))
        elif kind != "space":
            tokens.append(Token(kind, match[0], position))
        position = match.end()
    calls = [
        Fault(name.offset, f"{name.text}(...): expressions have no functions and no macros")
        for name, after in itertools.pairwise(tokens)
        if name.kind == "name" and after.text == "("
    ]
    if calls:
        raise ExpressionError(calls)
    return tokens


def _is_slo(name: str, classes: Sequence[str] | None) -> bool:
    match name.split("."):
        case ["slo", target]:
            return target in _SLO_TARGETS
        case ["slo", klass, target]:
            return target in _SLO_TARGETS and (classes is None or klass == LOWEST or klass in classes)
    return False


def _compile(text: str, tokens: Sequence[Token], declared: list[str], known: list[str]) -> Any:
    """Every integer literal becomes a double: all variables are, and CEL does not mix the two."""
    promoted, origin = "", []
    at = 0
    for token in (token for token in tokens if token.kind == "int"):
        end = token.offset + len(token.text)
        promoted += text[at:end] + ".0"
        origin += [*range(at, end), end - 1, end - 1]
        at = end
    promoted += text[at:]
    origin += [*range(at, len(text)), len(text)]
    try:
        return cel.NewEnv(variables=dict.fromkeys(declared, cel.Type.DOUBLE)).compile(promoted)
    except RuntimeError as error:
        raise ExpressionError(_faults(str(error), promoted, origin, tokens, known)) from None


def _faults(
    report: str, promoted: str, origin: list[int], tokens: Sequence[Token], known: list[str]
) -> list[Fault]:
    starts = [0]
    for row in promoted.split("\n"):
        starts.append(starts[-1] + len(row) + 1)
    faults: dict[int, Fault] = {}
    for found in _CEL_ERROR.finditer(report):
        line, column = int(found[1]), int(found[2])
        index = min(starts[min(line, len(starts)) - 1] + column - 1, len(origin) - 1)
        fault = _readable(found[3], origin[index], tokens, known)
        faults.setdefault(fault.offset, fault)
    if not faults:
        deep = "recursion" in report
        return [
            Fault(0, "nested too deeply" if deep else f"not a valid expression: {report.splitlines()[0]}")
        ]
    return [faults[offset] for offset in sorted(faults)]


def _readable(message: str, offset: int, tokens: Sequence[Token], known: list[str]) -> Fault:
    message = message.removesuffix("[INVALID_ARGUMENT]").replace(" (in container '')", "").strip()
    message = re.sub(r" expecting \{.*|:? ?no viable alternative.*", "", message).replace("'<EOF>'", "end")
    message = re.sub(
        r"found no matching overload for '_?(\S+?)_?' applied to '\((.*)\)'",
        r"cannot apply '\1' to (\2)",
        message,
    )
    if message.startswith("undeclared reference"):
        # CEL points at the last dot of `slo.x`; people look for the start of the name.
        name = next(
            (t for t in tokens if t.kind == "name" and t.offset <= offset < t.offset + len(t.text)), None
        )
        if name is not None:
            near = difflib.get_close_matches(name.text, known, n=1, cutoff=0.5)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            return Fault(name.offset, f"undeclared reference to '{name.text}'{hint}")
    return Fault(offset, message[:1].lower() + message[1:])


def _implausible(tokens: Sequence[Token], inputs: Mapping[str, Signal | None]) -> list[Fault]:
    """Comparisons of one bare variable with one bare number that cannot be meant, or can never hold."""
    folded = _fold_signs(tokens)
    faults = []
    for i in range(len(folded) - 2):
        left, operator, right = folded[i : i + 3]
        before = folded[i - 1].text if i else ""
        after = folded[i + 3].text if i + 3 < len(folded) else ""
        if operator.text not in _COMPARISONS or before not in _EDGES or after not in _EDGES:
            continue
        if left.kind == "name" and right.kind in ("float", "int"):
            name, comparison, number = left, operator.text, right
        elif right.kind == "name" and left.kind in ("float", "int"):
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
        if token.kind in ("float", "int") and sign is not None and sign.text == "-":
            before = folded[-2].text if len(folded) > 1 else ""
            if before in _COMPARISONS or before in _EDGES:
                folded[-1] = Token(token.kind, f"-{token.text}", sign.offset)
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
