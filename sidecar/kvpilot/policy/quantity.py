"""How people write quantities in policy files: `250ms`, `5s`, `2m`, `1h`; `10%` where a ratio is meant."""

import math
import re

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_PERCENT = re.compile(r"([-+]?\d+(?:\.\d+)?)\s*%")
_UNIT_NS = {"ms": 1_000_000, "s": 1_000_000_000, "m": 60_000_000_000, "h": 3_600_000_000_000}
_LONGEST_NS = 24 * _UNIT_NS["h"]


def parse_duration(value: object) -> int:
    """Nanoseconds. Raises ValueError, for a number without a unit too: nobody can tell which was meant."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{_shown(value)} is not a duration: write 250ms, 5s or 2m")
    duration_ns = round(float(match[1]) * _UNIT_NS[match[2]])
    if duration_ns > _LONGEST_NS:
        raise ValueError(f"{value} is too long: at most 24h")
    return duration_ns


def parse_number(value: object) -> float:
    """A finite number, or a percentage as a ratio. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    ratio = _percentage(value)
    if ratio is None:
        raise ValueError(f"{_shown(value)} is not a number or a percentage such as 10%")
    return ratio


def parse_amount(value: object) -> float | str:
    """What `set` takes: a number, a percentage, or the text of an expression. Raises ValueError."""
    if isinstance(value, str):
        ratio = _percentage(value)
        return value if ratio is None else ratio
    try:
        return parse_number(value)
    except ValueError:
        raise ValueError(f"{_shown(value)} is not a number, a percentage or an expression") from None


def parse_seconds(value: object) -> float | str:
    """Seconds: a number, a duration, or the text of an expression. Raises ValueError."""
    if isinstance(value, str):
        return parse_duration(value) / 1e9 if _DURATION.fullmatch(value) else value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise ValueError(f"{_shown(value)} is not seconds, a duration such as 40ms, or an expression")


def format_duration(duration_ns: int) -> str:
    """The shortest of the forms above that is exact to the millisecond."""
    milliseconds = round(duration_ns / 1_000_000)
    if milliseconds % 1000:
        return f"{milliseconds}ms"
    seconds = milliseconds // 1000
    return f"{seconds // 60}m" if seconds and seconds % 60 == 0 else f"{seconds}s"


def format_number(value: float) -> str:
    """A whole number as it is, any other to four places that count; infinity as `no limit`."""
    if math.isinf(value):
        return "no limit" if value > 0 else "no lower limit"
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.4g}"


def _percentage(value: object) -> float | None:
    match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    return None if match is None else float(match[1]) / 100


def _shown(value: object) -> str:
    text = (
        "nothing"
        if value is None
        else f"a {type(value).__name__}"
        if isinstance(value, dict | list)
        else str(value)
    )
    return text if len(text) <= 40 else f"{text[:37]}..."
