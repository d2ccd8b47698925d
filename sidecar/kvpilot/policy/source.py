"""YAML with positions: bytes in, plain data out, and for every path in it the line and column people see.

YAML 1.2 core scalars only (`no`, `on` and `12:30` are strings), no aliases, no tags, no duplicate keys,
bounded size and depth: whatever the bytes, the result is data or `Problem`s, never an exception.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import yaml

MAX_BYTES = 64 * 1024
MAX_DEPTH = 40
MAX_SHOWN = 1_000
"""Characters of a path or a message that are shown."""

Path = tuple[str | int, ...]

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class Problem(NamedTuple):
    """One error of one file, at one place (1-based)."""

    path: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"{printable(self.path)}:{self.line}:{self.column}: {printable(self.message)}"


def printable(text: str) -> str:
    """`text` on one line of a terminal, whatever a file has in it: bounded, control characters escaped."""
    if len(text) > MAX_SHOWN:
        text = f"{text[: MAX_SHOWN - 3]}..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Loader(yaml.SafeLoader):
    """Resolves no scalar: which are numbers is decided here, by YAML 1.2's core schema."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own name and type


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value and its key stand; `node` is the value's."""

    node: yaml.Node
    key: yaml.Node | None


class Source:
    """One file's text, its YAML nodes, and the way back from a path in the data to a place in the text."""

    def __init__(self, path: str, raw: bytes) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self._text = ""
        self._lines = [0]
        """Where each line begins."""
        self._root: yaml.Node | None = None
        self._cut: set[int] = set()
        self._keys: dict[int, dict[object, _Place]] = {}
        """By node: its children by key, once somebody has asked."""
        self._read(raw)

    def problem(self, line: int, column: int, message: str) -> Problem:
        """A problem at a place, 1-based."""
        return Problem(self.path, line, column, message)

    def data(self) -> object:
        """The document as plain data; keys are strings. None where there is no usable document."""
        return None if self._root is None else _plain(self._root)

    def _problem_at(self, index: int, message: str) -> Problem:
        """At a character of the text. YAML knows more ends of lines than people's editors do."""
        line = bisect_right(self._lines, index)
        return self.problem(line, index - self._lines[line - 1] + 1, message)

    def at(self, path: Sequence[str | int], message: str, key: bool = False) -> Problem:
        """A problem at the value of `path` (or at its key), or at the deepest part of `path` that exists."""
        place = self._find(path)
        if place is None:
            return self.problem(1, 1, message)
        mark = (place.key if key and place.key is not None else place.node).start_mark
        return self._problem_at(mark.index, message)

    def inside(self, path: Sequence[str | int], offset: int, message: str) -> Problem:
        """A problem at character `offset` of the string at `path`."""
        place = self._find(path)
        if place is None or not isinstance(place.node, yaml.ScalarNode):
            return self.at(path, message)
        index = self._index_of(place.node, offset)
        return self._problem_at(index, message)

    def prune(self, paths: Iterable[Path]) -> bool:
        """Drop the values at `paths`, so that the rest can be checked. False when there is none of them."""
        cuts: dict[int, tuple[yaml.Node, set[str | int]]] = {}
        for path in paths:
            parent = self._find(path[:-1], exact=True) if path else None
            if parent is not None:
                cuts.setdefault(id(parent.node), (parent.node, set()))[1].add(path[-1])
        changed = [self._cut_out(node, last) for node, last in cuts.values()]
        return any(changed)

    def _cut_out(self, node: yaml.Node, last: set[str | int]) -> bool:
        if isinstance(node, yaml.MappingNode):
            kept = [(key, value) for key, value in node.value if key.value not in last]
        elif isinstance(node, yaml.SequenceNode):
            kept = [item for i, item in enumerate(node.value) if i not in last]
        else:
            return False
        changed = len(kept) < len(node.value)
        node.value = kept
        if changed:
            self._cut.add(id(node))
            self._keys.pop(id(node), None)
        return changed

    def complete(self, path: Sequence[str | int]) -> bool:
        """Whether nothing was cut at `path`; where something was, what is missing is no mistake."""
        place = self._find(path, exact=True)
        return place is not None and id(place.node) not in self._cut

    def rule(self, name: str) -> Path:
        """The path of the rule of that name; of all rules where there is none."""
        data = self.data()
        spec = data.get("spec") if isinstance(data, dict) else None
        rules = spec.get("rules") if isinstance(spec, dict) else None
        for i, rule in enumerate(rules if isinstance(rules, list) else ()):
            if isinstance(rule, dict) and rule.get("name") == name:
                return ("spec", "rules", i)
        return ("spec", "rules")

    def _read(self, raw: bytes) -> None:
        if len(raw) > MAX_BYTES:
            self.problems.append(self.problem(1, 1, f"file of {len(raw)} bytes: at most {MAX_BYTES}"))
            return
        try:
            self._text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            self._lines = [0, *(match.end() for match in re.finditer("\n", self._text))]
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            column = error.start - raw.rfind(b"\n", 0, error.start)
            self.problems.append(self.problem(line, column, "not UTF-8 text"))
            return
        try:
            root = yaml.compose(self._text, _Loader)
        except RecursionError:
            self.problems.append(self.problem(1, 1, f"nested too deeply: at most {MAX_DEPTH} levels"))
            return
        except yaml.reader.ReaderError as error:
            message = f"character U+{error.character:04X} is not allowed"
            self.problems.append(self._problem_at(int(error.position), message))
            return
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = " ".join(part for part in (error.context, error.problem) if part)
            self.problems.append(self._problem_at(mark.index if mark else 0, f"not YAML: {what}"))
            return
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            # PyYAML leaks these on some malformed escapes, directives and tags.
            self.problems.append(self.problem(1, 1, f"not YAML: {error}"))
            return
        if root is None:
            self.problems.append(
                self.problem(1, 1, "empty: a policy begins with `apiVersion: kvpilot.dev/v1alpha1`")
            )
            return
        self._inspect(root, set(), 0)
        if not self.problems:
            self._root = root

    def _inspect(self, node: yaml.Node, seen: set[int], depth: int) -> None:
        mark = node.start_mark
        if id(node) in seen:
            self._complain(mark, "anchors and aliases are not supported: write the value out")
            return
        seen.add(id(node))
        if depth > MAX_DEPTH:
            self._complain(mark, f"nested too deeply: at most {MAX_DEPTH} levels")
            return
        kind = {yaml.MappingNode: "map", yaml.SequenceNode: "seq", yaml.ScalarNode: "str"}[type(node)]
        if node.tag != f"tag:yaml.org,2002:{kind}":
            self._complain(mark, f"tags are not supported: {str(node.tag)[:80]}")
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._inspect(item, seen, depth + 1)
        elif isinstance(node, yaml.MappingNode):
            self._inspect_keys(node)
            for _, value in node.value:
                self._inspect(value, seen, depth + 1)
        elif isinstance(node, yaml.ScalarNode):
            self._inspect_scalar(node)

    def _inspect_scalar(self, node: yaml.ScalarNode) -> None:
        half = _SURROGATE.search(node.value)
        if half is not None:
            self._complain(node.start_mark, f"U+{ord(half[0]):04X} is half a character")
        elif node.style is None and _scalar(node) is _NOT_A_NUMBER:
            self._complain(node.start_mark, f"number {node.value[:40]} is too long or not finite")

    def _inspect_keys(self, node: yaml.MappingNode) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._complain(key.start_mark, "a key must be a plain word")
            elif _SURROGATE.search(key.value):
                self._inspect_scalar(key)
            elif key.value in lines:
                self._complain(
                    key.start_mark, f"duplicate key '{key.value}' (first on line {lines[key.value]})"
                )
            else:
                lines[key.value] = self._problem_at(key.start_mark.index, "").line

    def _complain(self, mark: yaml.Mark, message: str) -> None:
        self.problems.append(self._problem_at(mark.index, message))

    def _find(self, path: Sequence[str | int], exact: bool = False) -> _Place | None:
        if self._root is None:
            return None
        place = _Place(self._root, None)
        for step in path:
            child = self._child(place.node, step)
            if child is None:
                return None if exact else place
            place = child
        return place

    def _child(self, node: yaml.Node, step: str | int) -> _Place | None:
        if isinstance(node, yaml.MappingNode):
            keys = self._keys.get(id(node))
            if keys is None:
                keys = self._keys[id(node)] = {key.value: _Place(value, key) for key, value in node.value}
            return keys.get(step)
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            return _Place(node.value[step], None)
        return None

    def _index_of(self, node: yaml.ScalarNode, offset: int) -> int:
        """Where character `offset` of a scalar stands in the text: quotes, folds and indents skipped."""
        index, end = node.start_mark.index, node.end_mark.index
        if node.style in ("|", ">"):
            index = min(self._text.find("\n", index) + 1, end)
        elif node.style in ("'", '"'):
            index += 1
        for position, char in enumerate(node.value):
            while index < end and not (
                char == self._text[index] or (char.isspace() and self._text[index].isspace())
            ):
                index += 1
            if position == offset:
                return index
            index += 1
        return min(index, end)


_NOT_A_NUMBER = object()


def _plain(node: yaml.Node) -> object:
    if isinstance(node, yaml.MappingNode):
        return {key.value: _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    assert isinstance(node, yaml.ScalarNode), "YAML has three kinds of node"
    return node.value if node.style is not None else _scalar(node)


def _scalar(node: yaml.ScalarNode) -> object:
    text: str = node.value
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return bool(_TRUE.fullmatch(text))
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        return number if abs(number) < float("inf") else _NOT_A_NUMBER
    return text
