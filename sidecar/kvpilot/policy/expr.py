"""Policy expressions: a small part of CEL, typed when loaded, evaluated to a value or to *missing*.

The part is numbers, inputs, `slo.*`, arithmetic, comparison, logic and `?:`. No calls, hence no macros, hence
evaluation is linear in the text, which is at most MAX_LENGTH characters. Every variable is a double.

Two traps are closed here and nowhere else: an expression that names a missing input is missing, whatever
CEL's short-circuit would conclude; and CEL reports errors as *values* that are truthy, so only the expected
type counts as an answer.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cel_expr_python import cel

from kvpilot.policy.slips import slips
from kvpilot.policy.thresholds import implausible
from kvpilot.policy.tokens import (
    SLO_TARGETS,
    ExpressionError,
    Fault,
    Token,
    cel_name,
    slo_target,
    slo_variable,
    tokenize,
)
from kvpilot.signals import Missing, Signal

MAX_LENGTH = 500

Wanted = Literal["bool", "number"]
Reading = float | Missing

_NUMBERS = (float, int)
_RESULT_TYPES = {"bool": (cel.Type.BOOL,), "number": (cel.Type.DOUBLE, cel.Type.INT)}
_CEL_ERROR = re.compile(r"ERROR: <input>:(\d+):(\d+): (.*)")
_DASHED = re.compile(r"\bslo\.([-\w.]*-[-\w.]*)\.(itl|ttft)\b", re.ASCII)
"""A class's target that CEL reads as a subtraction."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A checked expression. Equal texts are equal expressions."""

    text: str
    names: tuple[str, ...]
    """Every variable it names, sorted: if one is missing, so is the result."""
    wanted: Wanted
    program: Any = field(compare=False, repr=False)
    spelt: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)
    """Variables that the program knows by another name, with that name."""
    _known: list[Any] = field(default_factory=list, init=False, compare=False, repr=False)
    """The last readings that were all numbers, in the order of `names`, and what came of them."""

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
        values = [readings.get(name) for name in self.names]
        if self._known and values == self._known[0]:
            answer: bool | float | Missing = self._known[1]
            return answer
        answer = self._evaluated(values, readings)
        if set(map(type, values)) == {float}:
            self._known[:] = values, answer
        return answer

    def _evaluated(
        self, values: Sequence[Reading | None], readings: Mapping[str, Reading]
    ) -> bool | float | Missing:
        data = {}
        for name, reading in zip(self.names, values, strict=True):
            if not isinstance(reading, _NUMBERS) or reading != reading:
                absent = self.missing(readings)
                assert absent is not None, "this one is"
                return absent[1]
            data[name] = reading
        for name, spelling in self.spelt:
            data[spelling] = data.pop(name)
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
    if not text.strip():
        what = "a condition, such as `kv > 0.8`" if wanted == "bool" else "a number"
        raise ExpressionError([Fault(0, f"empty: write {what}")])
    slipped = [Fault(*slip) for slip in slips(text, inputs)]
    if slipped:
        raise ExpressionError(slipped)
    tokens = tokenize(text)
    slo = {token.text for token in tokens if token.kind == "name" and _is_slo(token.text, classes)}
    declared = {*inputs, *slo}
    program = _compile(text, tokens, sorted(declared), [*inputs, "slo.itl", "slo.ttft", *slo], classes)
    if program.return_type() not in _RESULT_TYPES[wanted]:
        what = "a condition (true or false)" if wanted == "bool" else "a number"
        raise ExpressionError([Fault(0, f"must be {what}, but is {program.return_type().name().lower()}")])
    names = sorted({token.text for token in tokens if token.text in declared})
    if not fixed and not any(name in inputs for name in names):
        raise ExpressionError([Fault(0, "names no input, so it can never change")])
    faults = implausible(tokens, inputs)
    if faults:
        raise ExpressionError(faults)
    spelt = tuple((name, cel_name(name)) for name in names if cel_name(name) != name)
    return Expression(text, tuple(names), wanted, program, spelt)


def _is_slo(name: str, classes: Sequence[str] | None) -> bool:
    found = slo_target(name)
    return found is not None and (classes is None or found[0] in (None, LOWEST, *classes))


def _compile(
    text: str,
    tokens: Sequence[Token],
    declared: Sequence[str],
    known: list[str],
    classes: Sequence[str] | None,
) -> Any:
    """Every integer literal becomes a double: all variables are, and CEL does not mix the two."""
    promoted, origin = "", list[int]()
    at = 0
    for token in (token for token in tokens if token.kind in ("int", "name")):
        written = f"{token.text}.0" if token.kind == "int" else cel_name(token.text)
        last = token.offset + token.length - 1
        promoted += text[at : token.offset] + written
        origin += range(at, token.offset)
        origin += (min(token.offset + i, last) for i in range(len(written)))
        at = last + 1
    promoted += text[at:]
    origin += [*range(at, len(text)), len(text)]
    variables = {cel_name(name): cel.Type.DOUBLE for name in declared}
    try:
        return cel.NewEnv(variables=variables).compile(promoted)
    except RuntimeError as error:
        known += [slo_variable(klass, target) for klass in classes or () for target in SLO_TARGETS]
        faults = _faults(str(error), promoted, origin, tokens, known)
    raise ExpressionError(_undashed(text, faults, classes))


def _undashed(text: str, faults: list[Fault], classes: Sequence[str] | None) -> list[Fault]:
    """`slo.batch-low.itl` is one mistake, not two names that nobody knows."""
    for found in _DASHED.finditer(text):
        if classes is None or found[1] in classes:
            written = slo_variable(found[1], found[2])
            faults = [fault for fault in faults if not found.start() <= fault.offset < found.end()]
            faults.append(Fault(found.start(), f"'{found[0]}' is a subtraction: write {written}"))
    return sorted(faults)


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
            (t for t in tokens if t.kind == "name" and t.offset <= offset < t.offset + t.length), None
        )
        if name is not None:
            by_lower = {each.lower(): each for each in known}
            near = difflib.get_close_matches(name.text.lower(), by_lower, n=1, cutoff=0.5)
            hint = f" (did you mean '{by_lower[near[0]]}'?)" if near else ""
            return Fault(name.offset, f"undeclared reference to '{name.text}'{hint}")
    if message.startswith("Syntax error"):
        return Fault(offset, _unexpected(message))
    return Fault(offset, message[:1].lower() + message[1:])


def _unexpected(message: str) -> str:
    """A parser speaks of inputs and what it was expecting; people want to know which word is wrong."""
    found = re.search(r"(?:mismatched|extraneous) input (end|'.*?')(?: |$)", message)
    if found is None:
        return message[:1].lower() + message[1:]
    return "something is missing at the end" if found[1] == "end" else f"unexpected {found[1]}"
