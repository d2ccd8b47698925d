"""The offered load: by the valves where there are any, else by what the engine has held and ended."""

import pytest

from kvpilot.adapters.engine import Sight
from kvpilot.adapters.offered import OfferedLoad
from kvpilot.adapters.valves import ValveSight
from kvpilot.clock import NS
from kvpilot.link.records import StepRecord
from kvpilot.signals import Missing

NAMES = {name: i for i, name in enumerate(("running", "waiting", "finished_total", "cancelled_total"))}


def sight(second: float, *values: float, offered: int | None = None, nonce: int = 1) -> Sight:
    valve = None if offered is None else ValveSight(1, {("offered", None): offered}, 0, 0, {})
    return Sight(round(second * NS), nonce=nonce, record=StepRecord(1, values, NAMES), valve=valve)


def test_by_what_the_engine_holds_and_has_ended() -> None:
    load = OfferedLoad()
    assert load.observe(sight(0, 1, 2, 3, 4)) == Missing("too_few_samples")
    assert load.observe(sight(4, 1, 2, 3, 4)) == Missing("too_few_samples")
    assert load.observe(sight(5, 2, 3, 5, 5)) == pytest.approx(1.0)
    for tenth in range(51, 120):
        rate = load.observe(sight(tenth / 10, 2, 3, 5 + (tenth - 50), 5))
    assert rate == pytest.approx(10.0, rel=0.05), "over the last five seconds alone"


def test_valves_see_what_the_engine_does_not() -> None:
    load = OfferedLoad()
    for second in range(11):
        rate = load.observe(sight(second, 1, 1, 1, 1, offered=1000 + 7 * second))
    assert rate == pytest.approx(7.0)


def test_counts_that_begin_anew_are_no_rate() -> None:
    load = OfferedLoad()
    for second in range(11):
        load.observe(sight(second, 9, 9, 100 + second, 9))
    assert load.observe(sight(11, 0, 0, 0, 0, nonce=2)) == Missing("too_few_samples")
    for second in range(12, 20):
        load.observe(sight(second, 1, 0, 2, 0, nonce=2))
    assert load.observe(sight(20, 0, 0, 0, 0, nonce=2)) == Missing("too_few_samples"), "a total never falls"
    assert load.observe(sight(21, 0, 0, 0, 0, offered=3, nonce=2)) == Missing("too_few_samples")


def test_an_engine_that_does_not_say() -> None:
    record = StepRecord(1, (1,), {"running": 0})
    assert OfferedLoad().observe(Sight(0, record=record)) == Missing("not_provided")
    assert OfferedLoad().observe(Sight(0)) == Missing("not_provided")
