"""Lengths without times, as Vidur publishes them: CSV with `num_prefill_tokens,num_decode_tokens,...`.

They have no arrival process, so they get one: Poisson, one request a second, seeded; play it at another speed
or press it to a load.
"""

import csv
import random
from collections.abc import Iterable

from kvpilot.workload.trace import TraceError, TraceRow

HEADER = ("num_prefill_tokens", "num_decode_tokens")


def parse_lengths(lines: Iterable[str], name: str = "trace", seed: int = 0) -> list[TraceRow]:
    """Raises TraceError."""
    rng = random.Random(f"lengths/{seed}")
    rows: list[TraceRow] = []
    at_s = 0.0
    try:
        for number, cells in enumerate(csv.reader(lines), 1):
            if number == 1:
                if tuple(cells[:2]) != HEADER:
                    raise TraceError(f"{name}:1: the header must begin with {','.join(HEADER)}")
            elif cells:
                rows.append(_row(cells, at_s, f"{name}:{number}"))
                at_s += rng.expovariate(1.0)
    except csv.Error as error:
        raise TraceError(f"{name}: {error}") from error
    if not rows:
        raise TraceError(f"{name}: no rows; give CSV with the header {','.join(HEADER)}")
    return rows


def _row(cells: list[str], at_s: float, where: str) -> TraceRow:
    try:
        # Some of these files hold whole numbers as floats.
        prompt, output = (float(cell) for cell in cells[:2])
        if not (0 <= prompt < 1e9 and 0 <= output < 1e9):
            raise ValueError
    except ValueError as error:
        raise TraceError(f"{where}: not two token counts: {','.join(cells)[:80]!r}") from error
    return TraceRow(at_s, round(prompt), round(output))
