"""JSON as the console sends it: one line of bytes."""

import json
from typing import Any


def encoded(value: Any) -> bytes:
    """JSON on one line, as an event needs it. Raises ValueError for a number that is not finite."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="replace")
