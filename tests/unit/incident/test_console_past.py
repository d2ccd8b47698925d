"""A recording as the console's scrubber has it: thinned, and nothing that matters lost by that."""

from dataclasses import replace

from recorded import Flown

from kvpilot.api.console.past import MOST_ROWS, incident
from kvpilot.api.console.wire import encoded
from kvpilot.incident.case import Case
from kvpilot.incident.evidence import gather
from kvpilot.incident.recording import Recording
from kvpilot.incident.verdict import judge
from kvpilot.journal.past import Past
from kvpilot.journal.records import OverrideRecord, SwitchRecord


def case(recording: Recording, past: Past | None = None) -> Case:
    evidence = gather(recording)
    return Case(recording, past or Past(), (), None, None, evidence, judge(recording, evidence), ())


def test_a_single_slow_step_among_thousands_is_still_there() -> None:
    start = Flown().step(ms=10, count=3000).step(ms=700).step(ms=10, count=3000)
    told = incident(case(start.recording()))
    assert len(told["rows"]) <= MOST_ROWS + 1
    longest = told["columns"].index("step_max_s")
    assert max(row[longest] for row in told["rows"]) == 0.7
    times = [row[0] for row in told["rows"]]
    assert times == sorted(set(times))
    assert times[-1] == round(told["end_wall_s"], 3), "the last moment is the end"


def test_levels_are_those_of_the_moment_and_what_is_not_recorded_is_none() -> None:
    start = Flown("waiting").step(kv_blocks_free=90).step(kv_blocks_free=10, knob_max_running=8)
    told = incident(case(start.recording()))
    last = dict(zip(told["columns"], told["rows"][-1], strict=True))
    assert last["kv_used"] == 0.8
    assert last["waiting"] is None
    assert last["knob.max_running"] == 8
    encoded(told)


def test_a_start_without_a_step_has_no_rows() -> None:
    told = incident(case(Flown().recording()))
    assert told["rows"] == []
    assert told["end_wall_s"] is None or told["headline"]


def test_moments_are_in_the_order_of_their_time() -> None:
    start = Flown().step(count=10)
    at = start.wall_ns()
    past = Past(
        overrides=(OverrideRecord(at - 5, "max_running", "all", 4.0, at, "why", "ada"),),
        switches=(SwitchRecord(at - 9, True, "why", "ada"),),
    )
    told = incident(replace(case(start.recording()), past=past))
    assert [moment["text"] for moment in told["moments"]] == ["ada: off", "ada: max_running = 4"]
