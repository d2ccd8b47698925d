"""What a step computed is told by two records with exactly that step between them, and by no others."""

import pytest

from kvpilot.forecast.work import Work, WorkReader
from kvpilot.link.records import StepRecord

NAMES = (
    "steps_total",
    "duration_ns",
    "prefill_tokens_total",
    "decode_sequences_total",
    "context_tokens_total",
    "chunk_positions_total",
    "drafted_tokens_total",
)


def record(steps: float, duration_ns: float, *totals: float, names: tuple[str, ...] = NAMES) -> StepRecord:
    return StepRecord(1, (steps, duration_ns, *totals), {name: i for i, name in enumerate(names)})


def test_a_step_is_the_difference_to_the_record_before_it() -> None:
    reader = WorkReader()
    assert list(reader.read([record(1, 5e6, 100, 2, 300, 9000, 8)])) == []
    (step,) = reader.read([record(2, 7e6, 164, 5, 1300, 9640, 20)])
    assert step.work == Work(64, 3, 1000, 640, 12)
    assert step.seconds == pytest.approx(0.007)


@pytest.mark.parametrize(
    "after",
    [
        record(3, 7e6, 200, 5, 1300, 9640, 20),  # two steps, one duration: the reader fell behind
        record(1, 0, 100, 2, 300, 9000, 8),  # an idle engine tells that something else moved
        record(2, 0, 164, 5, 1300, 9640, 20),  # a step that took no time
        record(2, 7e6, 100, 2, 300, 9000, 8),  # a step that computed nothing: it failed
        record(2, 7e6, 50, 5, 1300, 9640, 20),  # a count that went back
    ],
)
def test_what_is_not_exactly_one_whole_step_is_passed_over(after: StepRecord) -> None:
    reader = WorkReader()
    list(reader.read([record(1, 5e6, 100, 2, 300, 9000, 8)]))
    assert list(reader.read([after])) == []
    totals = [after[name] for name in NAMES[2:]]
    following = record(after["steps_total"] + 1, 5e6, *(total + 1 for total in totals))
    assert [step.work for step in reader.read([following])] == [Work(1, 1, 1, 1, 1)], "and reading goes on"


def test_an_engine_that_tells_less_is_fitted_with_less() -> None:
    few = NAMES[:4]
    reader = WorkReader()
    steps = reader.read([record(1, 5e6, 0, 0, names=few), record(2, 5e6, 64, 3, names=few)])
    assert [step.work for step in steps] == [Work(64, 3)]


def test_an_engine_that_does_not_tell_what_a_step_computed_has_no_steps() -> None:
    none = ("steps_total", "duration_ns", "prefill_tokens_total")
    reader = WorkReader()
    assert list(reader.read([record(1, 5e6, 0, names=none), record(2, 5e6, 64, names=none)])) == []
