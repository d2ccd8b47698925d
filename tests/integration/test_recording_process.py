"""The rolling recording of a real `kvpilot run`: what a killed pilot leaves is whole up to its last chunk."""

import signal
from pathlib import Path

from pilot_lab import Lab
from pilot_process import ended, eventually

from kvpilot.link.controls import Scope
from kvpilot.recordings.recorded import Recorded, read_recording
from kvpilot.recordings.segment import RecordingError


def recorded(directory: Path) -> Recorded | None:
    try:
        return read_recording(directory)
    except RecordingError:
        return None


def test_a_killed_pilot_leaves_a_recording_and_the_next_goes_on_with_it(lab: Lab) -> None:
    engine = lab.engine()
    engine.fields["waiting"] = 11
    child = lab.flying()
    directory = lab.folder / "journal.recording"
    eventually(lambda: recorded(directory) is not None)
    child.kill()
    child.wait()
    whole = recorded(directory)
    assert whole is not None
    steps = len(whole.steps)
    assert steps >= 64
    assert any(held.values == {("prefill_chunk_tokens", Scope("all")): 64} for held in whole.held)
    assert [each.name for each in whole.promises] == ["default"]
    again = lab.flying()
    eventually(lambda: len(getattr(recorded(directory), "steps", ())) > steps + 64)
    again.send_signal(signal.SIGTERM)
    code, err = ended(again)
    assert code == 0
    assert "recording" not in err


def test_nothing_is_recorded_where_nothing_may_be_kept(lab: Lab) -> None:
    lab.engine()
    lab.configure(recording={"size_mb": 0})
    child = lab.flying()
    eventually(lambda: lab.status()["engine"]["state"] == "live")
    child.send_signal(signal.SIGTERM)
    assert ended(child)[0] == 0
    assert not (lab.folder / "journal.recording").exists()
