"""Histograms: resolution, differences, and readings in the middle of a batch."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from link_pages import read_at

from kvpilot.link.histogram import (
    BUCKETS,
    HISTOGRAM_WORDS,
    PENDING,
    HistogramSnapshot,
    HistogramWriter,
    bucket_bounds_ns,
    bucket_index,
    read_histogram,
)

MEASURED = st.integers(100_000, 1_000_000_000_000)


def filled(*durations_ns: int) -> tuple[bytearray, HistogramWriter]:
    page = bytearray(8 * HISTOGRAM_WORDS)
    writer = HistogramWriter(memoryview(page).cast("Q"), 0)
    for duration_ns in durations_ns:
        writer.record(duration_ns)
    writer.flush()
    return page, writer


def reading(page: bytearray) -> HistogramSnapshot:
    snapshot = read_histogram(read_at(page), 0)
    assert snapshot is not None
    return snapshot


@given(st.integers(-(2**40), 2**70))
def test_every_duration_has_the_bucket_whose_bounds_hold_it(duration_ns: int) -> None:
    index = bucket_index(duration_ns)
    low, high = bucket_bounds_ns(index)
    assert 0 <= index < BUCKETS
    assert duration_ns < high or index == BUCKETS - 1
    assert low <= duration_ns or index == 0


def test_buckets_join_without_gap_or_overlap() -> None:
    for index in range(BUCKETS - 1):
        assert bucket_bounds_ns(index)[1] == bucket_bounds_ns(index + 1)[0]


@given(MEASURED)
def test_a_duration_reads_back_within_five_percent(duration_ns: int) -> None:
    page, _ = filled(duration_ns)
    assert reading(page).quantile(0.5) == pytest.approx(duration_ns / 1e9, rel=0.05)


@given(st.lists(MEASURED, min_size=1, max_size=200), st.floats(0, 1))
def test_quantiles_are_those_of_the_sample(durations_ns: list[int], q: float) -> None:
    page, _ = filled(*durations_ns)
    exact = sorted(durations_ns)[max(1, math.ceil(q * len(durations_ns))) - 1]
    assert reading(page).quantile(q) == pytest.approx(exact / 1e9, rel=0.05)


@given(st.lists(MEASURED, max_size=50), st.lists(MEASURED, max_size=50))
def test_a_window_is_the_difference_of_two_readings(before: list[int], after: list[int]) -> None:
    page, writer = filled(*before)
    earlier = reading(page)
    for duration_ns in after:
        writer.record(duration_ns)
    writer.flush()
    window = reading(page).minus(earlier)
    assert window.count == len(after)
    assert window.mean() == (pytest.approx(sum(after) / len(after) / 1e9) if after else None)
    assert list(window.counts) == list(reading(filled(*after)[0]).counts)


def test_an_empty_window_has_no_quantile() -> None:
    """Unknown is not zero."""
    page, _ = filled()
    assert reading(page).quantile(0.99) is None
    assert reading(page).mean() is None


def test_a_later_reading_cannot_be_subtracted() -> None:
    page, writer = filled(10**6)
    earlier = reading(page)
    writer.record(10**6)
    writer.flush()
    with pytest.raises(ValueError, match="not an earlier reading"):
        earlier.minus(reading(page))


@given(st.data())
def test_a_mixture_of_two_states_lies_between_them(data: st.DataObject) -> None:
    """Whatever words of a batch a reader sees, each count lies between the two true ones."""
    first = data.draw(st.lists(MEASURED, max_size=20))
    batch = data.draw(st.lists(MEASURED, min_size=1, max_size=20))
    page, writer = filled(*first)
    old = bytes(page)
    for duration_ns in batch:
        writer.record(duration_ns)
    writer.flush()
    new = bytes(page)
    seed = data.draw(st.randoms(use_true_random=False))
    torn = bytearray(b"".join(seed.choice((old, new))[i : i + 8] for i in range(0, len(old), 8)))
    middle = reading(torn)
    assert middle.minus(reading(bytearray(old))).count >= 0
    assert reading(bytearray(new)).minus(middle).count >= 0


def test_a_reading_in_the_middle_of_a_batch_is_taken_again() -> None:
    """So that the mean is that of the counted durations."""
    page, writer = filled(10**6)
    middle = bytearray(page)
    writer.record(10**9)
    writer.flush()
    middle[0] += 1
    middle[8:16] = page[8:16]
    states = iter((middle, page, page))
    snapshot = read_histogram(lambda offset, size: bytes(next(states)[offset : offset + size]), 0)
    assert snapshot is not None
    assert (snapshot.count, snapshot.mean()) == (2, 0.5005)
    assert page[0] == 4, "two stores a batch"


def test_a_writer_killed_in_a_batch_leaves_a_histogram_that_reads() -> None:
    page, _ = filled(10**6, 10**6)
    page[0] |= 1
    assert reading(page).count == 2


def test_a_page_that_is_too_short_has_no_histogram() -> None:
    page, _ = filled(10**6)
    assert read_histogram(read_at(page[:100]), 0) is None


def test_what_is_pending_is_bounded() -> None:
    _, writer = filled()
    for _ in range(PENDING + 10):
        writer.record(1)
    assert len(writer.pending) == PENDING


def test_disabled_it_records_nothing() -> None:
    page, writer = filled()
    kept = writer.record
    writer.disable()
    writer.record(10**6)
    kept(10**6)
    writer.flush()
    assert reading(page).count == 0
