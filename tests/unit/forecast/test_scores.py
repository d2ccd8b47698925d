"""The scorer itself: losses, bands and warnings on cases that can be worked out by hand."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.scores import Outcome, alarms, judge, pinball, warned, warnings


def test_pinball_charges_each_side_by_its_quantile() -> None:
    assert pinball(0.9, 10.0, 12.0) == pytest.approx(1.8)
    assert pinball(0.9, 12.0, 10.0) == pytest.approx(0.2)
    assert pinball(0.5, 3.0, 3.0) == 0.0


def test_the_loss_is_least_at_the_true_quantile() -> None:
    dice = random.Random(1)
    actual = [dice.gauss(100, 10) for _ in range(4000)]

    def loss(said: float) -> float:
        return sum(pinball(0.9, said, each) for each in actual)

    assert min((100 + step for step in range(30)), key=loss) == pytest.approx(112.8, abs=1.5)


def test_a_verdict_counts_both_sides_of_the_band_and_of_the_middle() -> None:
    band = Estimate(1.0, 2.0, 4.0)
    verdict = judge([Outcome(band, actual) for actual in (0.5, 1.5, 3.0, 3.5, 9.0)])
    assert verdict is not None
    assert (verdict.outcomes, verdict.inside, verdict.below, verdict.above) == (5, 0.6, 0.2, 0.2)
    assert verdict.over_middle == 0.6


def test_infinite_is_a_value_like_any_other_except_for_the_loss() -> None:
    never = Estimate(5.0, math.inf, math.inf)
    verdict = judge([Outcome(never, math.inf), Outcome(never, 3.0)])
    assert verdict is not None
    assert (verdict.inside, verdict.below, verdict.above) == (0.5, 0.5, 0.0)
    assert verdict.pinball == pytest.approx(0.9 * 2.0), "of the one finite pair"


def test_no_outcomes_no_verdict() -> None:
    assert judge([]) is None


@given(
    st.lists(
        st.tuples(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 1e3)), min_size=1
    )
)
def test_shares_add_up(rows: list[tuple[float, float, float, float]]) -> None:
    verdict = judge(Outcome(Estimate(*sorted(row[:3])), row[3]) for row in rows)
    assert verdict is not None
    assert verdict.inside + verdict.below + verdict.above == pytest.approx(1)
    assert verdict.pinball >= 0


def test_an_alarm_that_lasts_up_to_its_event_has_a_lead_and_one_that_does_not_is_false() -> None:
    said = [(float(t), 100.0) for t in range(10)]
    said += [(float(t), 2.0) for t in range(10, 13)]  # an alarm about nothing
    said += [(float(t), 100.0) for t in range(13, 20)]
    said += [(float(t), 2.0) for t in range(20, 25)]  # an alarm, and at 25 the event
    said += [(float(t), 100.0) for t in range(26, 3600)]
    found = warnings(said, [25.0], horizon_s=3.0)
    assert (found.events, found.warned, found.lead_s) == (1, 1, (5.0,))
    assert (found.alarms, found.false_alarms) == (2, 1)
    assert found.false_per_hour == pytest.approx(1, rel=0.01)


def test_an_event_without_an_alarm_is_not_warned_of() -> None:
    said = [(float(t), 100.0) for t in range(10)]
    found = warnings(said, [5.0], horizon_s=3.0)
    assert (found.events, found.warned, found.lead_s, found.alarms) == (1, 0, (), 0)


def test_an_alarm_cut_short_by_the_end_is_not_called_false() -> None:
    found = warnings([(0.0, 9.0), (1.0, 1.0)], [], horizon_s=3.0)
    assert (found.alarms, found.false_alarms) == (1, 0)
    assert warnings([], [], 3.0).false_per_hour == 0.0


def said(*p10: float) -> list[tuple[float, Estimate]]:
    return [(float(at_s), Estimate(low, low + 1, low + 2)) for at_s, low in enumerate(p10)]


def test_an_alarm_lasts_until_all_was_well_for_a_while() -> None:
    rows = said(30, 4, 12, 30, 4, 30, 30, 30, 30, 4)
    assert alarms(rows, 5, 20, 3) == [(1.0, 5.0), (9.0, 9.0)]
    assert alarms(rows, 5, 20, 1) == [(1.0, 5.0), (9.0, 9.0)]
    assert alarms(rows, 5, 20, 0) == [(1.0, 3.0), (4.0, 5.0), (9.0, 9.0)]
    assert alarms(said(30, 30), 5, 20, 1) == []


def test_who_always_warns_warns_of_nothing() -> None:
    whole = [(0.0, 200.0)]
    none = warned(whole, [], [], 200.0, standing_s=60.0)
    assert (none.false_alarms, none.false_per_hour) == (3, pytest.approx(54.0))
    busy = warned(whole, [50.0], [50.0, 90.0, 140.0, 190.0], 200.0, 60.0)
    assert (busy.events, busy.warned, busy.lead_s, busy.false_alarms) == (1, 1, (50.0,), 0)


def test_alarms_that_end_for_nothing_are_false_and_late_ones_have_no_lead() -> None:
    found = warned([(10.0, 20.0), (40.0, 50.0)], [44.0, 90.0], [44.0, 90.0], 100.0, 60.0)
    assert (found.warned, found.lead_s, found.false_alarms) == (1, (4.0,), 1)
    cut_short = warned([(90.0, 100.0)], [], [], 100.0, 60.0)
    assert cut_short.false_alarms == 0
