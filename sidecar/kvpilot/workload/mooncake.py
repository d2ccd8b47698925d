"""Mooncake's traces (FAST '25): one JSON object a line, with the blocks that prompts share.

    {"timestamp": 277, "input_length": 32140, "output_length": 92, "hash_ids": [198, 199, ...]}

`timestamp` is in milliseconds and ascends; each id of `hash_ids` stands for 512 tokens of the prompt and all
before them, so that two prompts share exactly what their equal leading ids cover. O(rows and ids).
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from kvpilot.workload.trace import TraceError, TraceRow

BLOCK_TOKENS = 512
_NUMBERS = ("timestamp", "input_length", "output_length")
_EXPECTED = '{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [n, ...]}'


def parse_mooncake(lines: Iterable[str], name: str = "trace") -> list[TraceRow]:
    """The rows of JSON lines. Raises TraceError."""
    rows: list[TraceRow] = []
    first_ms = 0.0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        at_ms, row = _row(line, f"{name}:{number}")
        if not rows:
            first_ms = at_ms
        row = row._replace(at_s=(at_ms - first_ms) / 1e3)
        if rows and row.at_s < rows[-1].at_s:
            raise TraceError(f"{name}:{number}: earlier than the line before; sort by timestamp")
        rows.append(row)
    if not rows:
        raise TraceError(f"{name}: no rows; give a Mooncake trace, a line each: {_EXPECTED}")
    return rows


def _row(line: str, where: str) -> tuple[float, TraceRow]:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where}: not JSON; expected {_EXPECTED}") from error
    if not isinstance(raw, dict):
        raise TraceError(f"{where}: not a JSON object; expected {_EXPECTED}")
    at_ms, prompt, output = (_number(raw, key, where) for key in _NUMBERS)
    ids = raw.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(one) is int and one >= 0 for one in ids):
        raise TraceError(f"{where}: hash_ids: a list of whole numbers, one for {BLOCK_TOKENS} prompt tokens")
    prompt = int(prompt)
    if len(ids) > -(-prompt // BLOCK_TOKENS):
        raise TraceError(f"{where}: {len(ids)} hash_ids for {prompt} tokens: one for each {BLOCK_TOKENS}")
    return at_ms, TraceRow(0.0, prompt, int(output), tuple(ids))


def _number(raw: Mapping[str, Any], key: str, where: str) -> float:
    value = raw.get(key)
    whole = type(value) is int or (key == "timestamp" and type(value) is float)
    # Also false for NaN and infinity, which Python's JSON reads.
    if not whole or not 0 <= value < 1e15:  # type: ignore[operator]
        raise TraceError(f"{where}: {key}={value!r}: a number, not below 0; expected {_EXPECTED}"[:300])
    return float(value)  # type: ignore[arg-type]
