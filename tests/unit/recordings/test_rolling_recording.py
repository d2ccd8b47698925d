"""Recordings: a simulated flight comes back as it was; torn, foreign and newer files; bounds; no text."""

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpilot.clock import NS
from kvpilot.policy_directory import shipped
from kvpilot.recordings.recorded import read_recording
from kvpilot.recordings.recorder import Kept, Moment, Recorder, Rolling, segments_in
from kvpilot.recordings.segment import MAGIC, Chunk, RecordingError, read_segment
from kvpilot.score import Slo
from kvpilot.simulate.deployment import Deployment, Promises
from kvpilot.simulate.legs import load_policies
from kvpilot.simulate.replica import START_NS, Replica
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.client import Patience
from kvpilot.workload.outcome import Fate

ABOUT = {"engine": "test", "promises": [["batch", 4.0, 0.1, 0.0], ["interactive", 0.5, 0.03, 0.0]]}
PROMISES = Promises(
    {"batch": Slo(4.0, 0.1), "interactive": Slo(0.5, 0.03)},
    {"batch": Patience(30.0), "interactive": Patience(8.0)},
)
SMALL = Deployment(blocks=400, max_model_len=2048, max_running=32, prefix_cache=True)
SECRET = 0x5EC12E7


class Linear:
    """Milliseconds a step, more with tokens."""

    def step_seconds(self, features: Any) -> float:
        return 0.002 + 66e-6 * features.prefill_tokens + 150e-6 * features.decode_sequences

    def activation_bytes(self, features: Any) -> int | None:
        return None


def arrivals(seconds: float = 20.0, per_s: float = 12.0) -> list[Arrival]:
    dice, made, at_s = random.Random(3), list[Arrival](), 0.0
    while (at_s := at_s + dice.expovariate(per_s)) < seconds:
        klass, tenant = dice.choice(("batch", "interactive")), dice.choice(("acme", "globex"))
        prompt, output = dice.randrange(16, 900), dice.randrange(1, 60)
        made.append(Arrival(at_s, prompt, output, klass, tenant, "", dice.getrandbits(31), (7,), 128))
    return made


def prompt(arrival: Arrival) -> list[int]:
    shared = [SECRET] * min(128, arrival.prompt_tokens)
    return shared + [SECRET + arrival.seed % 1000] * (arrival.prompt_tokens - len(shared))


@pytest.fixture(scope="module")
def flight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Replica]:
    """A piloted flight, recorded; and the replica that flew it."""
    directory = tmp_path_factory.mktemp("flight") / "recording"
    rolling = Rolling(directory, ABOUT, Kept(1 << 26, 86_400.0))
    policies = load_policies(shipped(), SMALL.classes)
    replica = Replica(SMALL, Linear(), PROMISES, policies, prompt=prompt, record=rolling.add)
    replica.fly(arrivals(), 30.0)
    rolling.flush(replica.clock.monotonic_ns())
    rolling.close_file()
    return directory, replica


def test_who_came_comes_back_exactly(flight: tuple[Path, Replica]) -> None:
    directory, replica = flight
    recorded = read_recording(directory)
    admitted = {
        (one.arrival.at_ns, one.arrival.prompt_tokens, one.arrival.output_tokens, one.arrival.tenant)
        for one in replica.outcomes
        if one.fate is Fate.FINISHED
    }
    told = {
        (one.received_ns - START_NS, one.prompt_tokens, one.output_tokens, one.tenant)
        for one in recorded.requests
        if one.fate == "finished"
    }
    assert told == admitted
    assert len(told) > 100
    assert recorded.begin_ns == START_NS
    assert [each.name for each in recorded.promises] == ["batch", "interactive"]


def test_first_tokens_steps_and_decisions_come_back(flight: tuple[Path, Replica]) -> None:
    directory, replica = flight
    recorded = read_recording(directory)
    first = {
        o.received_ns + round((o.ttft_s or 0) * 1e9): o for o in replica.outcomes if o.fate is Fate.FINISHED
    }
    assert {one.first_ns for one in recorded.requests if one.fate == "finished"} <= {
        one.emitted[0][0] for one in first.values()
    }
    assert replica.cockpit is not None
    assert [(one.at_ns, one.values) for one in recorded.held if one.values] == [
        (at_ns, values) for at_ns, values in replica.cockpit.flown.leases if values
    ]
    counts = [step["steps_total"] for step in recorded.steps]
    # An engine of 2 ms a step takes more of them in a tick than a look has room for.
    assert sum(after - before <= 1 for before, after in pairwise(counts)) > 0.95 * len(counts)
    assert counts == sorted(counts)
    assert recorded.steps[-1]["finished_total"] == replica.engine.core.totals.finished


def test_what_valves_counted_adds_up(flight: tuple[Path, Replica]) -> None:
    directory, replica = flight
    recorded = read_recording(directory)
    assert sum(one.admitted for one in recorded.counted) == replica.clients._requests
    assert recorded.has_valve


def test_shared_prompts_are_known_by_their_hashes_alone(flight: tuple[Path, Replica]) -> None:
    """128 tokens of 16 are 8 blocks: depths 0 to 3 agree within a tenant, deeper ones do not."""
    recorded = read_recording(flight[0])
    acme = [one.prefix for one in recorded.requests if one.tenant == "acme" and len(one.prefix) > 4]
    assert len({one[3] for one in acme}) == 1
    assert len({one[4] for one in acme}) > len(acme) / 2


def test_no_text_gets_in(flight: tuple[Path, Replica]) -> None:
    """Not one token id, however it is written, in anything that is stored."""
    directory, _ = flight
    for path in segments_in(directory):
        for chunk in read_segment(path).chunks:
            assert not {SECRET, float(SECRET)} & {value for row in chunk.rows for value in row}
            assert str(SECRET) not in str(chunk.head)
            assert set(chunk.columns) <= ALLOWED | {c for c in chunk.columns if c.startswith("knob.")}


ALLOWED = {
    *("time_ns", "duration_ns", "running", "waiting", "waiting_prompt_tokens", "kv_blocks_free"),
    *("kv_blocks_cached", "steps_total", "prefill_tokens_total", "decode_tokens_total"),
    *("drafted_tokens_total", "accepted_tokens_total", "rejected_rounds_total", "decode_sequences_total"),
    "draft_rounds_total",
    *("context_tokens_total", "chunk_positions_total", "preemptions_total", "recomputed_tokens_total"),
    *("finished_total", "rejected_total", "cancelled_total", "failed_total", "oom_total"),
    *("prefix_tokens_queried_total", "prefix_tokens_hit_total"),
    *("tenant", "received_ns", "first_ns", "ended_ns", "level", "prompt_tokens", "output_tokens", "fate"),
    *("preemptions", "at_ns", "offered", "admitted", "offered_tokens", "admitted_tokens"),
    *(f"prefix.{depth}" for depth in range(12)),
}
"""Counts, times, lengths and hashes: a column that is new here wants a look at what it could tell."""


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(1, 3000))
def test_a_torn_tail_is_cut_and_told(flight: tuple[Path, Replica], cut: int) -> None:
    path = segments_in(flight[0])[0]
    whole = read_segment(path)
    data = path.read_bytes()
    torn = path.parent / "torn"
    torn.write_bytes(data[:-cut])
    read = read_segment(torn)
    assert read.chunks == whole.chunks[: len(read.chunks)]
    assert len(read.chunks) < len(whole.chunks)
    assert read.torn_bytes >= 0


def test_a_damaged_byte_ends_what_is_believed(flight: tuple[Path, Replica]) -> None:
    path = segments_in(flight[0])[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    (path.parent / "damaged").write_bytes(data)
    read, whole = read_segment(path.parent / "damaged"), read_segment(path)
    assert 0 < len(read.chunks) < len(whole.chunks)
    assert read.torn_bytes > 0


def _line(write: Callable[[Path], object], path: Path) -> str:
    write(path)
    with pytest.raises(RecordingError) as error:
        read_recording(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_recordings_are_refused_in_one_line(tmp_path: Path, flight: tuple[Path, Replica]) -> None:
    data = segments_in(flight[0])[0].read_bytes()
    one = tmp_path / "00000001.kvr"
    assert "version 2" in _line(lambda p: p.write_bytes(MAGIC + b"2\n{}\n"), one)
    assert "no recording of a flight" in _line(lambda p: p.write_bytes(b"TIMESTAMP,ContextTokens\n"), one)
    assert "truncated" in _line(lambda p: p.write_bytes(data[:30]), one)
    assert "truncated" in _line(lambda p: p.write_bytes(data.split(b"\n")[0] + b"\n{}\n"), one)
    one.unlink()
    assert "no recording there" in _line(lambda p: None, tmp_path)
    assert "No such file" in _line(lambda p: None, tmp_path / "nowhere")


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.floats(allow_nan=False)), max_size=40),
    st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=3),
)
def test_chunks_come_back_as_they_were(rows: list[tuple[int, float]], head: dict[str, int]) -> None:
    chunk = Chunk("kind", head, ("whole", "part"), frozenset({"part"}), rows)
    with NamedTemporaryFile() as file:
        file.write(MAGIC + b"1\n{}\n" + chunk.pack())
        file.flush()
        (back,) = read_segment(Path(file.name)).chunks
    assert list(back.rows) == rows
    assert {name: back.head[name] for name in head} == head


def test_size_is_a_bound_and_the_newest_stays(tmp_path: Path) -> None:
    rolling = Rolling(tmp_path / "tight", ABOUT, Kept(20_000, 3600.0))
    policies = load_policies(shipped(), SMALL.classes)
    replica = Replica(SMALL, Linear(), PROMISES, policies, prompt=prompt, record=rolling.add)
    most = 0
    for arrival in arrivals(30.0):
        replica.fly_to(arrival.at_s - 0.1)
        replica.offer(arrival)
        if rolling.directory.is_dir():
            most = max(most, sum(path.stat().st_size for path in segments_in(rolling.directory)))
    rolling.close_file()
    assert 0 < most <= 20_000 * 1.3
    newest = read_recording(rolling.directory)
    assert newest.begin_ns > START_NS
    assert newest.end_ns > START_NS + 25 * NS
    assert 0 < sum(one.admitted for one in newest.counted) < replica.clients._requests / 2


def test_a_disk_that_fails_costs_recording_and_no_tick(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    recorder = Recorder(Rolling(tmp_path / "file" / "recording", ABOUT, Kept(1 << 20, 60.0)))
    recorder.start()
    manifest = Replica(SMALL, Linear(), PROMISES, load_policies(shipped(), SMALL.classes))
    moments: list[Moment] = []
    manifest.cockpit.pilot.record = moments.append  # type: ignore[union-attr]
    manifest.fly(arrivals(6.0), 10.0)
    for moment in moments:
        recorder.take(moment)
    recorder.close(5.0)
    assert recorder.lost > 0
    assert sum("the flight goes on" in line.message for line in caplog.records) == 1


def test_a_full_queue_drops_and_counts() -> None:
    recorder = Recorder(SimpleNamespace())  # type: ignore[arg-type]
    for _ in range(700):
        recorder.take(SimpleNamespace())  # type: ignore[arg-type]
    assert recorder.lost == 100


def test_what_ended_before_the_recording_is_not_in_it(tmp_path: Path) -> None:
    """A pilot that comes later finds the ring full of requests that are long over."""
    rolling = Rolling(tmp_path, ABOUT, Kept(1 << 26, 86_400.0))
    policies = load_policies(shipped(), SMALL.classes)
    late = START_NS + 8 * NS

    def record(moment: Moment) -> None:
        if moment.tick.at_ns >= late:
            rolling.add(moment)
        else:
            held.extend(moment.requests)

    held: list[Any] = []
    replica = Replica(SMALL, Linear(), PROMISES, policies, prompt=prompt, record=record)
    told, asked = replica.cockpit.pilot.engine.ended_requests, []  # type: ignore[union-attr]

    def all_of_them() -> list[Any]:
        new = told()
        asked.extend(new)
        at_ns = replica.clock.monotonic_ns()
        return list(asked) if late <= at_ns < late + NS // 10 else new

    replica.cockpit.pilot.engine.ended_requests = all_of_them  # type: ignore
    replica.fly(arrivals(16.0), 10.0)
    rolling.flush(replica.clock.monotonic_ns())
    rolling.close_file()
    recorded = read_recording(tmp_path)
    assert recorded.begin_ns == late
    assert held
    assert min(one.ended_ns for one in recorded.requests) >= late
    assert len(recorded.requests) == sum(one.ended_ns >= late for one in asked)


def test_a_stretch_of_a_recording_can_be_read(flight: tuple[Path, Replica]) -> None:
    whole = read_recording(flight[0])
    part = read_recording(flight[0], last_s=6.0, ago_s=4.0)
    until_ns = part.begin_ns + 6 * NS
    assert whole.begin_ns < part.begin_ns < part.end_ns <= until_ns < whole.end_ns
    assert part.end_ns > until_ns - NS
    assert {step["time_ns"] for step in part.steps} == {
        step["time_ns"] for step in whole.steps if part.begin_ns <= step["time_ns"] <= until_ns
    }
    came = [one for one in whole.requests if one.received_ns <= until_ns and one.ended_ns >= part.begin_ns]
    assert list(part.requests) == came
    assert 0 < len(came) < len(whole.requests)
    before = [held for held in whole.held if held.at_ns < part.begin_ns]
    assert part.held[0].values == before[-1].values
    assert part.held[0].at_ns == part.begin_ns
    assert all(part.begin_ns <= one.at_ns <= until_ns for one in part.counted)
