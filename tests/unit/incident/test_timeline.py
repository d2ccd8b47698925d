"""The timeline: counts are differences, levels are the row's last, and nothing is made up."""

from itertools import pairwise

import pytest
from recorded import Flown

from kvpilot.incident.timeline import Move, timeline


def test_rows_come_closer_towards_the_end() -> None:
    rows = timeline(Flown().step(10, count=7000).recording())
    assert [row.to_s for row in rows][:3] == [50, 40, 30]
    assert [row.to_s for row in rows][-4:] == [0.75, 0.5, 0.25, 0]
    assert rows[0].from_s == 60
    assert all(a.to_s == b.from_s for a, b in pairwise(rows))


def test_every_step_is_in_exactly_one_row() -> None:
    flown = Flown().step(10, count=500, decode_tokens_total=3, prefill_tokens_total=2)
    rows = timeline(flown.recording())
    assert sum(row.steps for row in rows) == 500
    assert sum(row.decode_tokens or 0 for row in rows) == 1500
    assert sum(row.prefill_tokens or 0 for row in rows) == 1000


def test_what_was_overwritten_is_not_counted_as_zero_based() -> None:
    """The oldest record left counts from itself: its cumulative value is not work of this minute."""
    rows = timeline(Flown(records=32).step(10, count=1000, decode_tokens_total=3).recording())
    assert sum(row.decode_tokens or 0 for row in rows) == 31 * 3


def test_levels_are_those_of_the_last_record() -> None:
    flown = Flown().step(100, count=5, running=9).step(100, running=2, waiting=7, kv_blocks_free=0)
    last = timeline(flown.recording())[-1]
    assert (last.running, last.waiting) == (2, 7)
    assert last.kv_used == pytest.approx(0.9), "cached blocks that nobody reads are free"


def test_step_times_leave_records_between_steps_out() -> None:
    flown = Flown().step(20, count=3)
    flown.values |= {"duration_ns": 0, "time_ns": flown.now_ns}
    flown.writer.write_step([flown.values[field.name] for field in flown.manifest.fields])
    (row,) = [row for row in timeline(flown.recording(), 1) if row.steps]
    assert (row.steps, row.step_p50_ms, row.step_max_ms) == (3, 20, 20)


def test_knobs_that_moved_are_told_with_their_range() -> None:
    flown = Flown().step(10, count=50).step(10, knob_max_running=4).step(10, knob_max_running=16)
    assert timeline(flown.recording())[-1].moves == (Move("max_running", 32, 16, 2, 4, 32),)


def test_a_pause_is_a_row_without_steps_that_keeps_the_levels() -> None:
    flown = Flown().step(10, count=5, running=3, waiting=2).step(9000)
    quiet = [row for row in timeline(flown.recording()) if row.steps == 0]
    assert quiet
    assert all((row.running, row.waiting, row.decode_tokens) == (3, 2, 0) for row in quiet)


def test_what_the_engine_does_not_record_is_none_and_not_zero() -> None:
    flown = Flown("kv_blocks_free", "preemptions_total", "waiting").step(10, count=20)
    row = timeline(flown.recording())[-1]
    assert (row.kv_used, row.preemptions, row.waiting) == (None, None, None)
    assert row.running == 4


def test_an_engine_without_times_has_no_timeline() -> None:
    assert timeline(Flown("time_ns").step(10, count=3).recording()) == []
