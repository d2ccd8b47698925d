"""Quantities as people say them. What is missing has a reason, never a number."""

from collections.abc import Mapping
from typing import Any

_REASONS = {
    "no_samples": "nothing was measured",
    "too_few_samples": "too little was measured",
    "too_old": "the last value is too old",
    "restarted": "the engine has just started",
    "reset": "a counter began anew",
    "not_provided": "this engine does not report it",
    "not_finite": "the value is not a number",
}


def seconds(value: float) -> str:
    """Such as `38 ms`, `2.4 s`, `45 s`, `12 min`, `3 h`."""
    if value < 1:
        return f"{value * 1000:.3g} ms"
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7_200 else f"{value / 3_600:.0f} h"


def number(value: float) -> str:
    """Such as `2,048`, `0.95`, `12.4`, `1,074M`."""
    if abs(value) >= 1e7:
        return f"{value / 1e6:,.0f}M"
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def value_of(signal: Mapping[str, Any] | None) -> float | None:
    """A signal's number in the status; infinity included, None where it is missing."""
    found = (signal or {}).get("value")
    if isinstance(found, str):
        return float(found.lower()) if found in ("+Inf", "-Inf") else None
    return found


def reason(signal: Mapping[str, Any] | None) -> str:
    """Why a signal is missing."""
    missing = (signal or {}).get("missing", "not_provided")
    return _REASONS.get(missing, str(missing))
