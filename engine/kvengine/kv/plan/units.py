"""Sizes as people write them: decimal (GB) and binary (GiB) units, each taken at its word."""

import re
from decimal import Decimal

from kvengine.errors import ConfigError

UNITS = {
    "": 1,
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str) -> int:
    """`256MiB`, `1.5GiB`, `0.5MB`, `1000000` → bytes, exactly. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in UNITS:
        units = ", ".join(unit for unit in UNITS if unit)
        raise ConfigError(f"{text!r} is not a size: write a number and one of {units}, as in 256MiB")
    return round(Decimal(match[1]) * UNITS[match[2]])


def written(size_bytes: float) -> str:
    """In the decimal unit that suits it, at most two decimals: 39.6 GB, 8 MB, 512 B."""
    for unit in ("TB", "GB", "MB", "kB"):
        if abs(size_bytes) >= UNITS[unit]:
            return f"{_short(size_bytes / UNITS[unit])} {unit}"
    return f"{_short(size_bytes)} B"


def _short(number: float) -> str:
    return f"{number:,.2f}".rstrip("0").rstrip(".")
