"""The words of an expression, each with its place. A class's target is one word: `slo.chat.itl`.

A class name that is no plain word stands in quotes: `slo["batch-low"].itl`, the variable `slo.batch-low.itl`.
"""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

_WORDS = (
    "slo true false null in as break const continue else for function if import let loop package namespace "
    "return var void while bool bytes double duration dyn int list map string timestamp type uint"
)
RESERVED = frozenset(_WORDS.split())
"""Words that CEL keeps to itself."""

SLO_TARGETS = ("itl", "ttft")
NAME = (
    r"slo\s*\[\s*(?:\"[-\w.]+\"|'[-\w.]+')\s*\]\s*\.\s*[A-Za-z_]\w*"
    r"|[A-Za-z_]\w*(?:\s*\.\s*[A-Za-z_]\w*)*"
)
"""A variable as people write it; `variable_of` says which one it is."""

_TOKENS = re.compile(
    r"(?P<space>\s+|//[^\n]*)"
    r"|(?P<float>(?:\d+\.\d+|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)"
    r"|(?P<int>\d+)"
    rf"|(?P<name>{NAME})"
    r"|(?P<operator>&&|\|\||[<>=!]=|[-+*/%<>!?:().])",
    re.ASCII,
)
_PLAIN = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class Fault(NamedTuple):
    """What is wrong with an expression, and at which character of it."""

    offset: int
    message: str


class ExpressionError(ValueError):
    """The text is no valid expression; `faults` says all that is wrong with it."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(fault.message for fault in faults))
        self.faults = tuple(faults)


class Token(NamedTuple):
    """`text` of a name is its variable; `length` is that of what was written."""

    kind: str
    text: str
    offset: int
    length: int


def tokenize(text: str) -> list[Token]:
    """All words of `text` but space and comments. Raises ExpressionError."""
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        match = _TOKENS.match(text, position)
        if match is None:
            raise ExpressionError([Fault(position, f"unexpected character {text[position]!r}")])
        kind, written = str(match.lastgroup), match[0]
        if kind != "space":
            said = variable_of(written) if kind == "name" else written
            tokens.append(Token(kind, said, position, len(written)))
        position = match.end()
    calls = [
        Fault(name.offset, f"{name.text}(...): expressions have no functions and no macros")
        for name, after in itertools.pairwise(tokens)
        if name.kind == "name" and after.text == "("
    ]
    if calls:
        raise ExpressionError(calls)
    return tokens


def variable_of(written: str) -> str:
    """`slo["batch-low"].itl` and `slo . chat . itl` are `slo.batch-low.itl` and `slo.chat.itl`."""
    return re.sub(r"[\s\]\"']+", "", written).replace("[", ".")


def slo_target(variable: str) -> tuple[str | None, str] | None:
    """(class, target) of a variable such as `slo.chat.itl`, (None, target) of `slo.itl`; else None."""
    first, _, rest = variable.partition(".")
    klass, _, target = rest.rpartition(".")
    return (klass or None, target) if first == "slo" and target in SLO_TARGETS else None


def slo_variable(klass: str, target: str) -> str:
    """How a class's target is written."""
    plain = _PLAIN.fullmatch(klass) and klass not in RESERVED
    return f"slo.{klass}.{target}" if plain else f'slo["{klass}"].{target}'


def cel_name(variable: str) -> str:
    """What CEL can be told to call it: a class name that is no plain word is spelt in hexadecimal."""
    found = slo_target(variable)
    if found is None:
        return variable
    klass, target = found
    if klass is None or slo_variable(klass, target) == variable:
        return variable
    return f"slo.quoted.q{klass.encode().hex()}.{target}"
