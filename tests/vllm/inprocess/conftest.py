"""Flights of a real scheduler under a hook, with a clock and a controls page that the test moves."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flown import Flown
from plane import Make, Plane


@pytest.fixture
def fly(tmp_path: Path) -> Iterator[Callable[..., Flown]]:
    """`fly(Make(...))`: a scheduler with a hook; each call a new one."""
    flights: list[Flown] = []

    def make(settings: Make, seed: int = 0, callers: str | None = None) -> Flown:
        folder = tmp_path / f"flight-{len(flights)}"
        folder.mkdir()
        flights.append(Flown(settings, folder, seed, callers))
        return flights[-1]

    yield make
    for flight in flights:
        flight.scheduler.shutdown()


@pytest.fixture
def fly_alone(tmp_path: Path) -> Callable[..., Plane]:
    """`fly_alone(Make(...))`: the same without a hook."""

    def make(settings: Make, seed: int = 0) -> Plane:
        return Plane(settings, tmp_path, seed)

    return make


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What kvpilot logged as a warning."""
    caplog.set_level(logging.WARNING, "kvpilot")
    # vLLM's own set-up keeps loggers from reaching the root.
    for name in ("kvpilot", "kvpilot.vllm", "kvpilot.link"):
        logging.getLogger(name).propagate = True
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("kvpilot")]
