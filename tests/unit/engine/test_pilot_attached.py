"""Nothing in the engine may depend on whether a pilot is attached, save the leases themselves."""

import random
from pathlib import Path
from typing import Literal

import pytest
from test_engine_telemetry import Flight

import kvengine

Pilot = Literal["none", "attached", "leasing"]


def flown(pilot: Pilot, seed: int) -> list[object]:
    """Every step's slices, and what came of it, of a random load with cancellations."""
    rng = random.Random(seed)
    flight = Flight()
    seen: list[object] = []
    number = 0
    for tick in range(200):
        for _ in range(rng.choice((0, 0, 1, 3)) if tick < 120 else 0):
            number += 1
            prompt, output, level = rng.randint(1, 40), rng.randint(1, 20), rng.randint(0, 1)
            flight.arrive(number, prompt, output, level, f"t{number % 3}")
        if number and rng.random() < 0.05:
            flight.core.cancel(rng.randint(1, number))
        if pilot == "attached":
            flight.lease(tick)
        elif pilot == "leasing":
            flight.lease(tick, prefill_chunk_tokens=8)
        if flight.core.requests:
            seen.append([(s.request.id, s.start, s.count, s.drafts) for s in flight.step().slices])
        else:
            flight.idle()
    totals = flight.core.totals
    return [*seen, totals.finished, totals.decode_tokens, flight.scheduler.preemptions_total]


@pytest.mark.parametrize("seed", range(5))
def test_a_pilot_that_leases_nothing_changes_no_step(seed: int) -> None:
    alone = flown("none", seed)
    assert len(alone) > 50
    assert flown("attached", seed) == alone
    assert flown("leasing", seed) != alone


def test_the_engine_knows_the_link_and_no_pilot() -> None:
    """Only the hook may ask the controls page; no module of the engine can tell whether anybody writes it."""
    for path in Path(kvengine.__file__).parent.rglob("*.py"):
        text = path.read_text()
        for word in ("kvpilot.pilot", "kvpilot.link.controls", "ControlsFile", "LeaseBook", "in_force("):
            assert word not in text, f"{path.name} names {word}"
