"""A file against its model: every mistake in its shape at its place, and then what is left of it."""

import difflib

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kvpilot.policy.schema import key_owners
from kvpilot.policy.source import Path, Source

_MOST_ROUNDS = 20
_MOST_HINTS = 100
"""In one file: finding what a key is near to takes half a millisecond."""
_EMPTY = ("too_short", "string_too_short")
_TEXTS = {
    "model_type": "should be a mapping",
    "dict_type": "should be a mapping",
    "list_type": "should be a list",
    "string_type": "should be text",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "bool_type": "should be true or false",
    **dict.fromkeys(_EMPTY, "should not be empty"),
}
"""For people who write YAML; pydantic speaks to those who write Python."""


def validate(source: Source, model: type[BaseModel]) -> BaseModel | None:
    """The model of the file. What is wrong is reported and cut out, so that the rest is still checked."""
    for attempt in range(_MOST_ROUNDS):
        data = source.data()
        if data is None:
            return None
        try:
            return model.model_validate(data)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=False, include_input=False)
        _report(source, details, first=attempt == 0)
        cuts = [_path(detail)[:-1] if detail["type"] == "missing" else _path(detail) for detail in details]
        if not source.prune(cuts):
            return None
    return None


def _report(source: Source, details: list[ErrorDetails], first: bool) -> None:
    misspelt = {_path(detail)[:-1] for detail in details if detail["type"] == "extra_forbidden"}
    for detail in details:
        path, kind = _path(detail), detail["type"]
        # After a cut, or beside a misspelt key, what is missing is no second mistake.
        if kind == "missing" and not (first and path[:-1] not in misspelt):
            continue
        if kind in _EMPTY and not first:
            continue
        at_key = kind in ("missing", "extra_forbidden") or detail["loc"][-1:] == ("[key]",)
        hint = len(source.problems) < _MOST_HINTS
        source.problems.append(source.at(path, _message(kind, detail["msg"], path, hint), at_key))


def _path(detail: ErrorDetails) -> Path:
    """Of a key that is wrong pydantic says so at the end."""
    path = detail["loc"]
    return path[:-1] if path[-1:] == ("[key]",) else path


def _message(kind: str, message: str, path: Path, hint: bool) -> str:
    name = str(path[-1]) if path else "file"
    if kind == "missing":
        return f"'{name}' is missing"
    if kind == "extra_forbidden":
        return f"unknown key '{name}'{_hint(name) if hint else ''}"
    if not path and kind == "model_type":
        return "the file should be a mapping: lines of `key: value`"
    text = _TEXTS.get(kind) or message.removeprefix("Value error, ").removeprefix("Input ")
    if kind == "string_pattern_mismatch":
        named = path[:1] == ("metadata",) or name == "name"
        allowed = "lower-case letters, digits and dashes" if named else "letters, digits and underscores"
        text = f"must be a name: {allowed}"
    return f"{'.'.join(str(step) for step in path) or 'file'}: {text}"


def _hint(key: str) -> str:
    owners = key_owners()
    if key in owners:
        return f": it belongs to {' or '.join(owners[key])}"
    near = difflib.get_close_matches(key, owners, n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""
