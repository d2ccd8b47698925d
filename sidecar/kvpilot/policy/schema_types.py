"""The scalars of a policy file: how each is written, what it becomes, and what an editor is told of it."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from kvpilot.knobs import KNOBS
from kvpilot.policy.quantity import parse_amount, parse_duration, parse_number, parse_seconds

_NUMBER: dict[str, Any] = {
    "anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[-+]?\d+(\.\d+)?\s*%$"}]
}
_BY_KNOB: dict[str, Any] = {
    "type": "object",
    "propertyNames": {"enum": sorted(KNOBS)},
    "additionalProperties": _NUMBER,
}
_FALLBACK: dict[str, Any] = {
    "description": "A value for the one knob that the rules move, or a value by knob.",
    "anyOf": [*_NUMBER["anyOf"], _BY_KNOB],
}


def _closed(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """An object with this one key."""
    return {
        "type": "object",
        "properties": {name: schema},
        "required": [name],
        "additionalProperties": False,
    }


ON_MISSING: dict[str, Any] = {
    "anyOf": [
        {"enum": ["release", "hold"], "type": "string"},
        _closed("fallback", _closed("set", _FALLBACK)),
    ]
}
"""JSON Schema of `onMissing`, which is a word or an object."""


def _series(value: object) -> str:
    """A series of one number is a YAML number; everything else is text already."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    if isinstance(value, str):
        return value
    raise ValueError('a series is text such as "0.02x7 0.06x19 _ stale"')


def _numbers(value: object) -> float | dict[str, float]:
    if isinstance(value, dict):
        return {str(name): parse_number(each) for name, each in value.items()}
    return parse_number(value)


Duration = Annotated[
    int,
    BeforeValidator(parse_duration),
    WithJsonSchema(
        {"type": "string", "pattern": r"^\d+(\.\d+)?(ms|s|m|h)$", "examples": ["250ms", "5s", "2m"]}
    ),
]
"""Nanoseconds."""
Number = Annotated[float, BeforeValidator(parse_number), WithJsonSchema(_NUMBER)]
Amount = Annotated[
    float | str,
    BeforeValidator(parse_amount),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]}),
]
"""A number, or the text of an expression."""
Seconds = Annotated[
    float | str,
    BeforeValidator(parse_seconds),
    WithJsonSchema(
        {"anyOf": [{"type": "number"}, {"type": "string"}], "examples": ["40ms", "0.8 * slo.itl"]}
    ),
]
"""Seconds, or the text of an expression."""
Numbers = Annotated[float | dict[str, float], BeforeValidator(_numbers)]
"""One number, or numbers by name."""
Series = Annotated[str, BeforeValidator(_series), WithJsonSchema({"type": ["string", "number"]})]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
InputName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]
KnobName = Annotated[str, Field(json_schema_extra={"enum": sorted(KNOBS)})]
