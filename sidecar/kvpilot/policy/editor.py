"""JSON Schemas for editors: what the models say, in the words of people who write YAML.

Names of the catalogues come with what they mean; defaults are written as they would be typed; which
aggregation fits a signal follows from its kind.
"""

import json
from typing import Any

from kvpilot.knobs import KNOBS
from kvpilot.policy.quantity import format_duration, format_number
from kvpilot.policy.schema import PolicyFile, TestFile
from kvpilot.signals import AGGREGATIONS, SIGNALS

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_DURATION = "(ms|s|m|h)$"


def schema_of_policies() -> dict[str, Any]:
    """Of a policy file."""
    return _schema(PolicyFile.model_json_schema(by_alias=True), "kvpilot policy")


def schema_of_tests() -> dict[str, Any]:
    """Of `NAME.test.yaml`."""
    return _schema(TestFile.model_json_schema(by_alias=True), "kvpilot policy tests")


def as_text(schema: dict[str, Any]) -> str:
    """As it is printed, and committed."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _schema(generated: dict[str, Any], title: str) -> dict[str, Any]:
    tidy: dict[str, Any] = _tidied(generated)
    models = tidy["$defs"]
    if "Input" in models:
        models["Input"]["properties"]["signal"] |= _described(_signals())
        models["Input"]["allOf"] = [_fitting(kind) for kind in AGGREGATIONS]
    for model in models.values():
        properties = model.get("properties", {})
        if "enum" in properties.get("knob", {}):
            properties["knob"] |= _described(_knobs())
        if "knobs" in properties:
            properties["knobs"]["propertyNames"] = {"enum": sorted(KNOBS)}
    return {"$schema": DRAFT, **tidy, "title": title}


def _signals() -> dict[str, str]:
    fitting = {kind: ", ".join(aggregations) for kind, aggregations in AGGREGATIONS.items()}
    return {
        name: f"{signal.meaning} A {signal.kind} in {signal.unit}: use {fitting[signal.kind]}."
        for name, signal in sorted(SIGNALS.items())
    }


def _knobs() -> dict[str, str]:
    return {
        name: f"{knob.meaning} {_between(*knob.plausible)} {knob.unit}; "
        f"{knob.protective} is safer; moved in the {knob.where}."
        for name, knob in sorted(KNOBS.items())
    }


def _between(low: float, high: float) -> str:
    return f"{format_number(low)} to {format_number(high)}"


def _described(meanings: dict[str, str]) -> dict[str, Any]:
    return {"enum": list(meanings), "markdownEnumDescriptions": list(meanings.values())}


def _fitting(kind: str) -> dict[str, Any]:
    """The aggregations for signals of one kind; `last`, where nothing is said, fits gauges alone."""
    names = sorted(name for name, signal in SIGNALS.items() if signal.kind == kind)
    aggregations = list(AGGREGATIONS[kind])  # type: ignore[index] # its own keys
    then: dict[str, Any] = {"properties": {"agg": {"enum": aggregations}}}
    if "last" not in aggregations:
        then["required"] = ["agg", "window"]
    return {"if": {"properties": {"signal": {"enum": names}}, "required": ["signal"]}, "then": then}


def _tidied(value: Any, name: str | None = None) -> Any:
    """Without what pydantic says to programs: titles of fields, nulls, defaults in nanoseconds."""
    if isinstance(value, list):
        return [_tidied(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _tidied(item, key) for key, item in value.items() if key != "title" or name == "$defs"}
    choices = found.get("anyOf")
    # A field that may be left out; where nothing is a value of its own, it has no default.
    if choices is not None and {"type": "null"} in choices and "default" in found:
        rest = [choice for choice in choices if choice != {"type": "null"}]
        found.pop("anyOf")
        found = {**(rest[0] if len(rest) == 1 else {"anyOf": rest}), **found}
    found.pop("gt", None)
    default = found.get("default", "")
    if default in (None, {}, []):
        found.pop("default")
    elif isinstance(default, int) and str(found.get("pattern", "")).endswith(_DURATION):
        found["default"] = format_duration(default)
    return found
