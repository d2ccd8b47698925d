"""Decisions explained, as plain data for JSON."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from kvpilot.explain.inquiry import Explained


def as_json(explained: Iterable[Explained], pilot: bool) -> dict[str, Any]:
    """`pilot`: whether one answered; without, nothing is said of what is now."""
    return {"pilot": pilot, "decisions": [_one(each) for each in explained]}


def _one(explained: Explained) -> dict[str, Any]:
    plain: dict[str, Any] = asdict(explained)
    decision = plain.pop("decision")
    decision["engine_nonce"] = f"{explained.decision.engine_nonce:016x}"
    found: dict[str, Any] = _finite({**decision, **plain})
    return found


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
