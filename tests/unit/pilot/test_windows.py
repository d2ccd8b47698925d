"""Windows: each aggregation, and each way of being missing."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.adapters.windows import MOST_READINGS, Reading, Value, Windows
from kvpilot.clock import NS
from kvpilot.link.histogram import BUCKETS, HistogramSnapshot, bucket_index
from kvpilot.signals import Missing


@dataclass(frozen=True)
class View:
    signal: str = "requests_waiting"
    agg: str = "last"
    window_s: float | None = None
    min_samples: int = 1
    max_age_s: float = 2.0
    klass: str | None = None


GAUGE = "requests_waiting"
COUNTER = "preemptions"
RATIO = "spec_acceptance_ratio"
LATENCY = "itl_seconds"


class Bench:
    """Windows of one view, fed by second."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.windows = Windows()
        self.windows.require([view])

    def feed(self, *samples: tuple[float, Value]) -> "Bench":
        for at_s, value in samples:
            self.windows.take({(self.view.signal, None): Reading(round(at_s * NS), value)})
        return self

    def at(self, now_s: float) -> float | Missing:
        return self.windows.value(self.view, round(now_s * NS))

    def reason(self, now_s: float) -> str:
        found = self.at(now_s)
        assert isinstance(found, Missing), found
        return found.reason


def histogram(*durations_s: float) -> HistogramSnapshot:
    counts = [0] * BUCKETS
    for duration_s in durations_s:
        counts[bucket_index(round(duration_s * NS))] += 1
    return HistogramSnapshot(counts, round(sum(durations_s) * NS))


@pytest.mark.parametrize(("agg", "expected"), [("last", 4.0), ("mean", 3.0), ("min", 2.0), ("max", 4.0)])
def test_a_gauge_over_its_window(agg: str, expected: float) -> None:
    bench = Bench(View(GAUGE, agg, 3.0)).feed((0, 100.0), (1, 2.0), (2, 3.0), (3, 4.0))
    assert bench.at(3.9) == expected


def test_a_counter_is_read_from_before_the_window_to_now() -> None:
    samples = [(0, 0.0), (1, 10.0), (2, 20.0), (3, 50.0)]
    assert Bench(View(COUNTER, "increase", 2.0)).feed(*samples).at(3) == 40.0
    assert Bench(View(COUNTER, "rate", 2.0)).feed(*samples).at(3) == 20.0


def test_a_counter_that_stands_still_has_a_rate_of_zero_not_none() -> None:
    bench = Bench(View(COUNTER, "rate", 2.0)).feed((0, 7.0), (1, 7.0), (2, 7.0))
    assert bench.at(2) == 0.0


def test_a_ratio_is_weighted_by_its_denominator_and_silent_without_one() -> None:
    bench = Bench(View(RATIO, "mean", 2.0, min_samples=50))
    bench.feed((0, (0.0, 0.0)), (1, (10.0, 100.0)), (2, (90.0, 200.0)))
    assert bench.at(2) == pytest.approx(0.45)
    bench.feed((3, (90.0, 200.0)), (4, (90.0, 200.0)))
    assert bench.reason(4) == "no_samples"


def test_a_distribution_is_that_of_what_came_within_the_window() -> None:
    slow, both = histogram(*[1.0] * 100), histogram(*[1.0] * 100, *[0.01] * 100)
    bench = Bench(View(LATENCY, "p95", 2.0, min_samples=100)).feed((0, slow), (3, both))
    assert bench.at(3) == pytest.approx(0.01, rel=0.05)
    assert Bench(View(LATENCY, "mean", 2.0)).feed((0, slow), (3, both)).at(3) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("view", "samples", "now_s", "reason"),
    [
        (View(GAUGE), [], 0, "no_samples"),
        (View(GAUGE), [(0, 1.0)], 2.1, "too_old"),
        (View(GAUGE, "mean", 5.0, min_samples=3), [(0, 1.0), (1, 1.0)], 1, "too_few_samples"),
        (View(GAUGE), [(0, math.nan)], 0, "not_finite"),
        (View(COUNTER, "rate", 5.0), [(0, 1.0)], 0, "too_few_samples"),
        (View(COUNTER, "rate", 5.0), [(0, 9.0), (1, 2.0)], 1, "reset"),
        (View(RATIO, "mean", 5.0), [(0, (1.0, 9.0)), (1, (0.0, 3.0))], 1, "no_samples"),
        (View(LATENCY, "p95", 5.0), [(0, histogram()), (1, histogram())], 1, "no_samples"),
        (View(LATENCY, "p95", 5.0, 9), [(0, histogram()), (1, histogram(0.1))], 1, "too_few_samples"),
    ],
)
def test_what_cannot_be_said_is_missing_with_its_reason(
    view: View, samples: list[tuple[float, Value]], now_s: float, reason: str
) -> None:
    assert Bench(view).feed(*samples).reason(now_s) == reason


def test_missing_says_how_old_the_last_value_is() -> None:
    found = Bench(View(GAUGE)).feed((0, 1.0)).at(5)
    assert found == Missing("too_old", 5.0)


def test_after_clearing_the_reason_stays_until_there_is_enough_again() -> None:
    bench = Bench(View(COUNTER, "rate", 5.0)).feed((0, 1.0), (1, 2.0))
    bench.windows.clear("restarted")
    assert bench.reason(1) == "restarted"
    assert bench.feed((2, 0.0)).reason(2) == "restarted"
    assert bench.feed((3, 5.0)).at(3) == 5.0


def test_a_signal_that_turns_missing_is_forgotten_and_one_left_out_ages() -> None:
    bench = Bench(View(GAUGE)).feed((0, 1.0))
    bench.windows.take({})
    assert bench.at(1) == 1.0
    bench.windows.take({(GAUGE, None): Missing("not_provided")})
    assert bench.reason(1) == "not_provided"


def test_the_same_reading_twice_is_one_sample() -> None:
    bench = Bench(View(GAUGE, "mean", 5.0, min_samples=2)).feed((1, 1.0), (1, 1.0), (1, 1.0))
    assert bench.reason(1) == "too_few_samples"


def test_windows_that_are_still_asked_for_keep_their_readings() -> None:
    bench = Bench(View(GAUGE)).feed((0, 3.0))
    bench.windows.require([bench.view, View(COUNTER, "rate", 1.0)])
    assert bench.at(0) == 3.0
    assert set(bench.windows.wanted) == {(GAUGE, None), (COUNTER, None)}


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 50)), min_size=2, max_size=400),
    st.integers(1, 20),
)
def test_a_counters_increase_is_never_more_than_what_it_grew_by(
    steps: list[tuple[int, int]], window_s: int
) -> None:
    """Whatever the spacing: not negative, at most the whole growth, at least that within the window."""
    bench = Bench(View(COUNTER, "increase", float(window_s)))
    now_ms, total, history = 0, 0, []
    for gap_ms, grown in steps:
        now_ms, total = now_ms + gap_ms, total + grown
        history.append((now_ms, total))
        bench.feed((now_ms / 1000, float(total)))
    found = bench.at(now_ms / 1000)
    assert not isinstance(found, Missing)
    within = [value for at_ms, value in history if at_ms > now_ms - window_s * 1000]
    assert total - within[0] <= found <= total - history[0][1]


def test_memory_is_bounded_however_long_the_window() -> None:
    bench = Bench(View(GAUGE, "mean", 3600.0))
    for tick in range(40_000):
        bench.feed((tick / 10, 1.0))
    (track,) = bench.windows._tracks.values()
    assert len(track.readings) <= 1.1 * MOST_READINGS


def test_two_views_that_are_alike_see_the_same() -> None:
    one, other = View(), View()
    windows = Windows()
    windows.require([one, other])
    windows.take({(GAUGE, None): Reading(NS, 3.0)})
    assert (windows.value(one, NS), windows.value(other, NS)) == (3.0, 3.0)
