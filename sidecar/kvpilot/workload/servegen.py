"""ServeGen's clients (arXiv 2505.09999): how each client of a service sends, by windows, over two weeks.

Two files: `..._clients.csv[.gz]` with a row for each client and window of ten minutes (rate, and a renewal
process fitted to its gaps), and beside it `..._tokens.csv` with quantiles of each client's lengths. A client
becomes a tenant, `client-17`.

Arrivals are drawn again, seeded, client by client: gaps of the fitted family and shape whose mean is the
window's rate. (The published scale is of the gaps inside bursts and does not give that rate.) The service
gets some 800 requests a second; `mean_rps` thins all clients alike, which keeps their shares and their
burstiness. Lengths follow the quantiles, log-linear between them, prompt and output independent.
"""

import csv
import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, gamma, log
from typing import NamedTuple

from kvpilot.workload.trace import TraceError, TraceRow

CLIENTS_HEADER = ("client", "window_start_s", "rate_rps", "cv", "pattern", "arg1", "arg2")
TOKENS_HEADER = (
    *("client", "volume_requests_est", "kind", "mean"),
    *("p5", "p25", "p50", "p75", "p90", "p95", "p99", "max"),
)
WINDOW_S = 600.0
PATTERNS = ("Gamma", "Weibull")
MOST_ROWS = 1_000_000
_SHARES = (0.05, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
_LEAST_SHAPE, _MOST_SHAPE = 0.05, 100.0


class Window(NamedTuple):
    """Of one client: from `start_s`, for `WINDOW_S`."""

    start_s: float
    rate_rps: float
    pattern: str
    shape: float

    def gap_s(self, rate_rps: float, rng: random.Random) -> float:
        """One gap of this family and shape, its mean that of `rate_rps`."""
        shape = min(max(self.shape, _LEAST_SHAPE), _MOST_SHAPE)
        if self.pattern == "Gamma":
            return rng.gammavariate(shape, 1 / (shape * rate_rps))
        return rng.weibullvariate(1 / (rate_rps * gamma(1 + 1 / shape)), shape)


class Lengths(NamedTuple):
    """Quantiles at `_SHARES`, ascending, at least 1."""

    marks: tuple[float, ...]

    def draw(self, rng: random.Random) -> int:
        share = rng.random()
        place = bisect_right(_SHARES, share)
        if place == 0:
            return round(self.marks[0])
        low, high = log(self.marks[place - 1]), log(self.marks[place])
        part = (share - _SHARES[place - 1]) / (_SHARES[place] - _SHARES[place - 1])
        return round(exp(low + part * (high - low)))


@dataclass(frozen=True, slots=True)
class Clients:
    """Every client with lengths, by name; those without, of whom nothing can be drawn, are only counted."""

    name: str
    windows: Mapping[str, tuple[Window, ...]]
    prompts: Mapping[str, Lengths]
    outputs: Mapping[str, Lengths]
    without_lengths: int = 0

    def rows(self, seed: int, start_s: float, end_s: float, mean_rps: float) -> list[TraceRow]:
        """Arrivals in [start, end) of the two weeks, times from 0. Raises TraceError where nobody sends."""
        if not (0 <= start_s < end_s and mean_rps > 0):
            raise TraceError(
                f"{self.name}: from {start_s:g} to {end_s:g} s at {mean_rps:g} requests/s: nothing"
            )
        parts = list(self._parts(start_s, end_s))
        total_rps = sum(rate * (end - start) for _, window, start, end in parts for rate in [window.rate_rps])
        if not total_rps:
            raise TraceError(f"{self.name}: no client sends from {start_s:g} to {end_s:g} s")
        thin = mean_rps * (end_s - start_s) / total_rps
        if mean_rps * (end_s - start_s) > MOST_ROWS:
            raise TraceError(
                f"{self.name}: more than {MOST_ROWS:,} requests: a shorter slice or a lower rate"
            )
        rows = []
        for client, window, start, end in parts:
            rng = random.Random(f"servegen/{seed}/{client}/{window.start_s:g}")
            prompts, outputs = self.prompts[client], self.outputs[client]
            # The window is opened at a random moment of a gap.
            at_s = start + rng.random() * window.gap_s(thin * window.rate_rps, rng)
            while at_s < end:
                lengths = max(prompts.draw(rng), 1), max(outputs.draw(rng), 1)
                rows.append(TraceRow(at_s - start_s, *lengths, (), f"client-{client}"))
                at_s += window.gap_s(thin * window.rate_rps, rng)
        return sorted(rows, key=lambda row: row.at_s)

    def _parts(self, start_s: float, end_s: float) -> Iterator[tuple[str, Window, float, float]]:
        """Windows that overlap the slice, with the overlap."""
        for client, windows in sorted(self.windows.items()):
            for window in windows:
                start, end = max(start_s, window.start_s), min(end_s, window.start_s + WINDOW_S)
                if start < end:
                    yield client, window, start, end


def parse_servegen(clients: Iterable[str], tokens: Iterable[str], name: str, tokens_name: str) -> Clients:
    """From the text of both files. Raises TraceError."""
    windows: dict[str, list[Window]] = defaultdict(list)
    for number, cells in _table(clients, CLIENTS_HEADER, name):
        client, window = _window(cells, f"{name}:{number}")
        windows[client].append(window)
    kinds: dict[str, dict[str, Lengths]] = {"input_tokens": {}, "output_tokens": {}}
    for number, cells in _table(tokens, TOKENS_HEADER, tokens_name):
        kind, lengths = _lengths(cells, f"{tokens_name}:{number}")
        kinds[kind][cells[0]] = lengths
    if not windows:
        raise TraceError(f"{name}: no rows; expected {','.join(CLIENTS_HEADER)}")
    prompts, outputs = kinds["input_tokens"], kinds["output_tokens"]
    told = {client: tuple(of) for client, of in windows.items() if client in prompts and client in outputs}
    if not told:
        raise TraceError(f"{tokens_name}: no lengths of any client that {name} has")
    return Clients(name, told, prompts, outputs, len(windows) - len(told))


def _table(lines: Iterable[str], header: Sequence[str], name: str) -> Iterator[tuple[int, list[str]]]:
    try:
        for number, cells in enumerate(csv.reader(lines), 1):
            if number == 1:
                if tuple(cells) != tuple(header):
                    raise TraceError(f"{name}:1: the header must be {','.join(header)}")
            elif cells:
                if len(cells) != len(header):
                    raise TraceError(f"{name}:{number}: {len(cells)} cells, expected {','.join(header)}")
                yield number, cells
    except csv.Error as error:
        raise TraceError(f"{name}: {error}") from error


def _window(cells: Sequence[str], where: str) -> tuple[str, Window]:
    client, start, rate, _, pattern, shape, _ = cells
    if pattern not in PATTERNS:
        raise TraceError(f"{where}: pattern {pattern[:40]!r}: {' or '.join(PATTERNS)}")
    try:
        window = Window(float(start), float(rate), pattern, float(shape))
        if not (0 <= window.start_s < 1e9 and 0 < window.rate_rps < 1e6 and 0 < window.shape < 1e6):
            raise ValueError
    except ValueError as error:
        raise TraceError(f"{where}: not a window, a rate and a shape: {','.join(cells)[:80]!r}") from error
    return client, window


def _lengths(cells: Sequence[str], where: str) -> tuple[str, Lengths]:
    kind = cells[2]
    if kind not in ("input_tokens", "output_tokens"):
        raise TraceError(f"{where}: kind {kind[:40]!r}: input_tokens or output_tokens")
    try:
        marks = tuple(max(float(cell), 1.0) for cell in cells[4:])
        if list(marks) != sorted(marks) or not marks[-1] < 1e9:
            raise ValueError
    except ValueError as error:
        raise TraceError(f"{where}: not ascending quantiles: {','.join(cells)[:80]!r}") from error
    return kind, Lengths(marks)
