"""The tree of an expression, for looking into it. Evaluating is CEL's own business.

Takes texts that compiled; anything else gives None, as does what nests too deeply to be worth a look.
"""

from dataclasses import dataclass

from kvpilot.policy.tokens import ExpressionError, Token, tokenize

_LEVELS = (("||",), ("&&",), ("<", "<=", ">", ">=", "==", "!="), ("+", "-"), ("*", "/", "%"))
"""Binary operators, the loosest first; all of them bind to the left."""
_DEEPEST = 50


@dataclass(frozen=True, slots=True)
class Number:
    """A literal."""

    value: float


@dataclass(frozen=True, slots=True)
class Name:
    """A variable: an input, or `slo.` and what follows."""

    text: str


@dataclass(frozen=True, slots=True)
class Unary:
    """`-` or `!`."""

    operator: str
    inner: "Node"


@dataclass(frozen=True, slots=True)
class Binary:
    """Two sides."""

    operator: str
    left: "Node"
    right: "Node"


@dataclass(frozen=True, slots=True)
class Choice:
    """`condition ? yes : no`."""

    condition: "Node"
    yes: "Node"
    no: "Node"


Node = Number | Name | Unary | Binary | Choice


class _NoTree(Exception):
    pass


def parse(text: str) -> Node | None:
    """The tree; None where there is none."""
    try:
        parser = _Parser(tokenize(text))
        node = parser.choice(0)
        return node if parser.at_end else None
    except (_NoTree, ExpressionError):
        return None


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._at = 0

    @property
    def at_end(self) -> bool:
        return self._at == len(self._tokens)

    def choice(self, depth: int) -> Node:
        """Anything."""
        if depth > _DEEPEST:
            raise _NoTree
        condition = self._binary(0, depth)
        if not self._take("?"):
            return condition
        yes = self.choice(depth + 1)
        if not self._take(":"):
            raise _NoTree
        return Choice(condition, yes, self.choice(depth + 1))

    def _binary(self, level: int, depth: int) -> Node:
        if level == len(_LEVELS):
            return self._unary(depth)
        left = self._binary(level + 1, depth)
        while (operator := self._take(*_LEVELS[level])) is not None:
            left = Binary(operator, left, self._binary(level + 1, depth))
        return left

    def _unary(self, depth: int) -> Node:
        if depth > _DEEPEST:
            raise _NoTree
        operator = self._take("-", "!")
        if operator is not None:
            return Unary(operator, self._unary(depth + 1))
        if self._take("("):
            inner = self.choice(depth + 1)
            if not self._take(")"):
                raise _NoTree
            return inner
        if self.at_end:
            raise _NoTree
        token = self._tokens[self._at]
        self._at += 1
        if token.kind in ("float", "int"):
            return Number(float(token.text))
        if token.kind == "name":
            return Name(token.text)
        raise _NoTree

    def _take(self, *operators: str) -> str | None:
        if self.at_end or self._tokens[self._at].text not in operators:
            return None
        self._at += 1
        return operators[0] if len(operators) == 1 else self._tokens[self._at - 1].text
