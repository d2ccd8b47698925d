"""What is wrong with kvpilot.yaml, in that file's terms: for people who write YAML, not Python."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from kvpilot.policy.source import Problem, Source

Path = tuple[str | int, ...]
KnownKeys = Callable[[Path], list[str]]
"""The keys that the mapping at a path may have."""

_MESSAGES = {
    "extra_forbidden": "unknown key '{key}' ({hint}known: {known})",
    "missing": "'{key}' is missing",
    "string_pattern_mismatch": "not a name: letters, digits, '-', '_' and '.'",
}
_KINDS = {
    "tuple_type": "a list",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "string_type": "text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "is_instance_of": "text",
}
"""What a value of another kind should have been, as YAML's writer knows it."""
_LIMITS = {
    "greater_than": "should be above {gt:g}",
    "greater_than_equal": "should be at least {ge:g}",
    "less_than": "should be below {lt:g}",
    "less_than_equal": "should be at most {le:g}",
    "too_short": "should have at least {min_length}",
    "too_long": "should have at most {max_length}",
    "string_too_short": "should not be empty",
}


def problems_of(source: Source, errors: Sequence[Any], known_keys: KnownKeys) -> list[Problem]:
    """Each error at its place.

    A list counts an item that is wrong as none: too few are said of a list whose items are in order. And a
    key that is misspelt is one mistake, not also one that is missing.
    """
    paths = [error["loc"] for error in errors]
    meant = {
        (*path[:-1], near)
        for error, path in zip(errors, paths, strict=True)
        if error["type"] == "extra_forbidden" and (near := _near(path, known_keys)) is not None
    }
    return [
        _problem(source, error, known_keys)
        for error, path in zip(errors, paths, strict=True)
        if not (error["type"] == "missing" and path in meant)
        if error["type"] != "too_short" or not any(other[:-1][: len(path)] == path for other in paths)
    ]


def _problem(source: Source, error: Any, known_keys: KnownKeys) -> Problem:
    """One pydantic error, in this file's terms."""
    path, kind = error["loc"], error["type"]
    if kind == "value_error":
        return source.at(path, f"{path[-1]}: {error['ctx']['error']}")
    if kind in _MESSAGES:
        known, near = known_keys(path[:-1]), _near(path, known_keys)
        hint = f"did you mean '{near}'? " if near else ""
        message = _MESSAGES[kind].format(key=path[-1], known=", ".join(known), hint=hint)
        return source.at(path, message, key=kind == "extra_forbidden")
    message = error["msg"].replace("Input should be", "should be")
    if kind in _KINDS:
        message = f"should be {_KINDS[kind]}"
    elif kind in _LIMITS:
        message = _LIMITS[kind].format(**error["ctx"])
    return source.at(path, f"{_name_of(path)}: {message}")


def _name_of(path: Path) -> str:
    """The key that a person wrote: of an item of a list, the list's."""
    return str(next((part for part in reversed(path) if isinstance(part, str)), "file"))


def _near(path: Path, known_keys: KnownKeys) -> str | None:
    """The key that was probably meant."""
    near = difflib.get_close_matches(str(path[-1]), known_keys(path[:-1]), n=1, cutoff=0.6)
    return near[0] if near else None
