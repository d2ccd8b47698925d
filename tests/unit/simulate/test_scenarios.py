"""Scenarios: each a whole, plain value that means something to the engine, the score and the signals."""

import pickle
from dataclasses import fields

import pytest

from kvpilot.link.fields import STEP_FIELDS
from kvpilot.score import Score
from kvpilot.simulate.deployment import Deployment
from kvpilot.simulate.scenarios import METRICS, SCENARIOS, ScenarioError, scenario_named
from kvpilot.workload.arrival import Speed

SPEED = Speed(38_000, 8_000)


def test_every_incident_of_the_field_has_one() -> None:
    assert set(SCENARIOS) == {
        *("metastable-burst", "kv-oversubscription", "sticky-retraction", "speculation-edge", "lost-metric"),
        *("stale-metric", "tenant-hog", "rank-imbalance", "allocator-fragmentation"),
    }


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_a_scenario_is_plain_and_whole(name: str) -> None:
    one = scenario_named(name)
    assert pickle.loads(pickle.dumps(one)) == one, "legs fly in processes of their own"
    assert one.workload.arrivals(1, SPEED) == one.workload.arrivals(1, SPEED)
    assert not one.workload.traces, "a scenario flies without recorded traces"
    assert one.happened
    assert one.source
    assert {field.name for field in fields(Deployment)} >= one.engine.keys()
    assert one.holds
    for bound in one.holds:
        assert bound.metric in METRICS
        assert (bound.at_least is None) != (bound.at_most is None)
    for fault in one.faults:
        assert 0 <= fault.at_s < fault.at_s + fault.for_s <= one.workload.seconds
        assert set(fault.signals) <= set(STEP_FIELDS)


def test_bounds_name_figures_that_the_score_has_or_that_are_described() -> None:
    scored = {field.name for field in fields(Score)}
    described = (
        "recovery_s",
        "reversals_per_min",
        "worst_tenant",
        "worst_rank",
        "worst_actions_during_fault",
    )
    assert set(METRICS) - scored == set(described)


def test_an_unknown_scenario_is_one_line_with_the_nearest_name() -> None:
    with pytest.raises(ScenarioError, match="did you mean metastable-burst"):
        scenario_named("metastable-bursts")


def test_the_burst_is_ten_minutes_of_twice_the_load() -> None:
    before, burst, after = SCENARIOS["metastable-burst"].workload.parts
    assert burst.seconds == 600
    assert burst.load == 2 * before.load == 2 * after.load
