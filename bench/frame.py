"""What every bench shares: bars, the table, and the one JSON object.

A bench measures and says what holds; it exits 0 whenever it measured, whatever the bars say.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Bar:
    """A figure with its promise; `spread` is (min, max) over the repeats it is the median of."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    spread: tuple[float, float] | None = None

    @property
    def holds(self) -> bool:
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    def as_json(self) -> dict[str, Any]:
        bounds = {"at_least": self.at_least, "at_most": self.at_most, "spread": self.spread}
        given = {key: value for key, value in bounds.items() if value is not None}
        return {"name": self.name, "value": self.value, **given, "holds": self.holds}


def median_bar(
    name: str, values: list[float], *, at_least: float | None = None, at_most: float | None = None
) -> Bar:
    """The bar on the median of `values`, with their range beside it."""
    return Bar(name, statistics.median(values), at_least, at_most, (min(values), max(values)))


def machine() -> dict[str, Any]:
    """What the figures were measured on, without naming the machine."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    cores = sum(line.startswith("processor") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return {"cpu": model, "cores": cores, "python": platform.python_version(), "system": platform.system()}


def run(
    name: str,
    version: int,
    measure: Callable[[argparse.Namespace], tuple[Mapping[str, Any], Mapping[str, Any], list[Bar]]],
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Parse `--quick` and `--json`, measure, print. `measure` returns (settings, results, bars)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick", action="store_true", help="the same bars on less; at most 50 s on two cores"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    add_arguments(parser)
    arguments = parser.parse_args()
    settings, results, bars = measure(arguments)
    if arguments.json:
        print(
            json.dumps(
                {
                    "bench": name,
                    "version": version,
                    "machine": machine(),
                    "settings": settings,
                    "results": results,
                    "bars": [bar.as_json() for bar in bars],
                }
            )
        )
        return
    print(f"{name}  {dict(settings)}")
    for key, value in results.items():
        print(f"  {key:<40} {_shown(value)}")
    print(f"  {'bar':<28}{'value':>10}  {'promise':<12}{'range':<22}")
    for bar in bars:
        promise = f">= {bar.at_least:g}" if bar.at_least is not None else f"<= {bar.at_most:g}"
        spread = f"{bar.spread[0]:.3g} .. {bar.spread[1]:.3g}" if bar.spread else ""
        verdict = "holds" if bar.holds else "MISSED"
        print(f"  {bar.name:<28}{bar.value:>10.4g}  {promise:<12}{spread:<22}{verdict}")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "  ".join(f"{key}={_shown(item)}" for key, item in value.items())
    return str(value)
