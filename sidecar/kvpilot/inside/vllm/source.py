"""What a method does with an attribute, read from its source.

A knob is safe to move only where the code that reads it does so in a way that was understood; the version's
number says nothing about that, a fork or a patch even less.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple


class Uses(NamedTuple):
    """How often an attribute appears, by the place where it does."""

    reads: int = 0
    writes: int = 0
    asserted: int = 0
    """Reads inside an `assert`."""
    compared: tuple[str, ...] = ()
    """For each comparison with the attribute on its right: the operator (`GtE`, `Eq`, ...)."""


class Methods:
    """All definitions of one method along the classes of an object: a subclass may call its parent's."""

    def __init__(self, owner: Any, name: str) -> None:
        self._trees = tuple(_trees(owner, name))
        self.known = bool(self._trees)
        """False where there is no source to read, or no such method."""

    def uses(self, dotted: str) -> Uses:
        """How the method uses `dotted`, such as `self.waiting`."""
        found = Uses()
        for tree in self._trees:
            for node in ast.walk(tree):
                found = _counted(found, node, dotted)
        return found

    def names(self, name: str) -> bool:
        """Whether a local variable or parameter of that name occurs."""
        nodes = [node for tree in self._trees for node in ast.walk(tree)]
        return any(
            (isinstance(node, ast.Name) and node.id == name)
            or (isinstance(node, ast.arg) and node.arg == name)
            for node in nodes
        )


def _counted(found: Uses, node: ast.AST, dotted: str) -> Uses:
    if isinstance(node, ast.Attribute) and _dotted(node) == dotted:
        if isinstance(node.ctx, ast.Load):
            return found._replace(reads=found.reads + 1)
        return found._replace(writes=found.writes + 1)
    if isinstance(node, ast.Assert):
        inside = sum(_dotted(part) == dotted for part in ast.walk(node))
        return found._replace(asserted=found.asserted + inside)
    if isinstance(node, ast.Compare) and _dotted(node.comparators[-1]) == dotted:
        return found._replace(compared=(*found.compared, type(node.ops[-1]).__name__))
    return found


def _dotted(node: ast.AST) -> str | None:
    """`self.waiting` for that expression; None for any other kind."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else None


def _trees(owner: Any, name: str) -> Iterator[ast.AST]:
    for kind in type(owner).__mro__:
        method = kind.__dict__.get(name)
        if inspect.isfunction(method):
            tree = _parsed(inspect.unwrap(method))
            if tree is not None:
                yield tree


@cache
def _parsed(function: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def module_mentions(module: str, word: str) -> bool:
    """Whether the source of `module` contains `word`. The module is found, not imported."""
    import importlib.util

    try:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.origin:
            return False
        with open(spec.origin, encoding="utf-8") as file:
            return word in file.read()
    except (ImportError, OSError, ValueError):
        return False
