"""The step hook: what an engine gets from it, and what a pilot then sees."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from link_pages import IDENTITY, NONCE, Controls, manifest, read_at

from kvpilot.clock import VirtualClock
from kvpilot.inside.hook import StepHook, with_hook_fields
from kvpilot.link.controls import Lease, Scope
from kvpilot.link.fields import HOOK_FIELDS, KNOB_PREFIX
from kvpilot.link.manifest import ManifestKnob
from kvpilot.link.telemetry import TelemetryReader, TelemetryWriter, plan_page

NS = 10**9
BASELINES = {"max_running": 32, "prefill_chunk_tokens": 512, "admission_watermark": 0.95}


class Engine:
    """An engine with a hook, and a pilot's view of it, in virtual time."""

    def __init__(self, **change: object) -> None:
        self.manifest = replace(manifest(), **change)
        full = with_hook_fields(self.manifest)
        buffer = bytearray(plan_page(full, 16).page_bytes)
        self.telemetry = TelemetryWriter(buffer, full, nonce=NONCE, identity=IDENTITY, record_count=16)
        self.controls = Controls()
        self.hook = StepHook(self.manifest, self.telemetry, lambda now_ns: self.controls.page)
        self.reader = TelemetryReader(read_at(buffer))
        self.now_ns = 0
        self.renewal = 0
        self.steps = 0
        self.step()

    def write(self, *leases: tuple[str, float], scope: Scope = Scope(), nonce: int = NONCE) -> int:  # noqa: B008
        self.renewal += 1
        return self.controls.writer.write(
            [Lease(knob, scope, value, NS, self.renewal) for knob, value in leases], nonce
        )

    def step(self, seconds: float = 0.02) -> dict[str, float]:
        self.now_ns += round(seconds * NS)
        self.steps += 1
        values = dict(self.hook.begin_step(self.now_ns))
        self.hook.end_step((self.now_ns, 10_000_000, self.steps, 3))
        return values


def echo(engine: Engine) -> dict[str, float]:
    record = engine.reader.poll()[-1]
    return {name: record[name] for name in record if name in HOOK_FIELDS or name.startswith(KNOB_PREFIX)}


def test_without_leases_baselines_are_in_force() -> None:
    assert Engine().step() == BASELINES


def test_a_lease_is_in_force_from_the_next_step_and_echoed_by_its_record() -> None:
    engine = Engine()
    sequence = engine.write(("max_running", 8))
    assert engine.step() == BASELINES | {"max_running": 8}
    assert echo(engine) == {
        "controls_sequence": sequence,
        "controls_ignored_total": 0,
        "knob.max_running": 8,
        "knob.prefill_chunk_tokens": 512,
        "knob.admission_watermark": 0.95,
    }


def test_controls_are_read_every_20_ms_at_most_and_leases_run_out_at_any_step() -> None:
    engine = Engine()
    engine.write(("max_running", 8))
    assert engine.step(0.019) == BASELINES
    assert engine.step(0.001) == BASELINES | {"max_running": 8}
    assert engine.step(0.999) == BASELINES | {"max_running": 8}
    engine.hook.controls_every_ns = 60 * NS
    assert engine.step(0.001) == BASELINES


def test_when_the_pilot_dies_baseline_returns_in_one_ttl_and_one_step() -> None:
    engine = Engine()
    engine.write(("max_running", 8))
    engine.step()
    assert engine.hook.next_expiry_ns() == engine.now_ns + NS
    assert engine.step(0.98) == BASELINES | {"max_running": 8}
    assert engine.step(0.02) == BASELINES
    assert echo(engine)["knob.max_running"] == 32
    assert engine.hook.next_expiry_ns() is None


@pytest.mark.parametrize(
    ("knob", "wish", "in_force"),
    [
        ("max_running", 1000, 64),
        ("max_running", -5, 1),
        ("max_running", 0.2, 1),
        ("max_running", 8.4, 8),
        ("prefill_chunk_tokens", 100, 96),
        ("prefill_chunk_tokens", 1, 16),
        ("admission_watermark", 0.777, pytest.approx(0.78)),
        ("admission_watermark", 1e300, 1.0),
    ],
)
def test_values_are_clamped_to_the_manifest_whatever_the_page_says(
    knob: str, wish: float, in_force: float
) -> None:
    engine = Engine()
    engine.write((knob, wish))
    value = engine.step()[knob]
    assert value == in_force
    assert isinstance(value, float if knob == "admission_watermark" else int)


def test_the_running_cap_is_at_least_one_whatever_the_manifest_says() -> None:
    engine = Engine(knobs=(ManifestKnob("max_running", "requests", 0, 64, 32, 1, ""),))
    engine.write(("max_running", 0))
    assert engine.step() == {"max_running": 1}


@pytest.mark.parametrize(
    ("knob", "value", "scope"),
    [
        ("no_such_knob", 1, Scope()),
        ("max_running", float("nan"), Scope()),
        ("max_running", float("inf"), Scope()),
        ("max_running", 8, Scope("class_at_most", 0)),
        ("max_running", 8, Scope("tenant", "acme")),
    ],
)
def test_what_makes_no_sense_is_ignored_counted_and_shown(knob: str, value: float, scope: Scope) -> None:
    engine = Engine()
    engine.write((knob, value), scope=scope)
    assert engine.step() == BASELINES
    assert echo(engine)["controls_ignored_total"] == 1


@pytest.mark.parametrize(("knob", "value"), [("no_such_knob", 1.0), ("max_running", float("nan"))])
def test_an_invalid_lease_is_counted_when_it_changes_and_not_at_every_renewal(
    knob: str, value: float
) -> None:
    engine = Engine()
    for _ in range(5):
        engine.write((knob, value))
        engine.step()
    assert echo(engine)["controls_ignored_total"] == 1
    engine.write(("no_such_knob", 2.0), ("max_running", 8))
    engine.step()
    engine.write(("max_running", 8))
    engine.step()
    engine.write((knob, value))
    engine.step()
    assert echo(engine)["controls_ignored_total"] == 3


def test_a_foreign_table_is_ignored_counted_and_shown() -> None:
    engine = Engine()
    engine.write(("max_running", 8), nonce=NONCE + 1)
    assert engine.step() == BASELINES
    assert echo(engine)["controls_ignored_total"] == 1


def test_values_are_the_same_object_while_nothing_changes() -> None:
    """So that an engine may ask `is` before it applies them."""
    engine = Engine()
    first = engine.hook.begin_step(engine.now_ns)
    assert engine.hook.begin_step(engine.now_ns + 1) is first


def test_latencies_reach_the_pilot_with_the_step_they_belong_to() -> None:
    engine = Engine()
    engine.hook.itl[1].record(5_000_000)
    engine.hook.ttft[0].record(NS // 4)
    assert engine.reader.histogram("itl", 1).count == 0
    engine.step()
    assert engine.reader.histogram("itl", 1).quantile(0.5) == pytest.approx(0.005, rel=0.05)
    assert engine.reader.histogram("ttft", 0).mean() == 0.25
    assert engine.reader.histogram("step").count == engine.steps
    assert engine.reader.histogram("step").mean() == pytest.approx(0.01)


def test_a_record_without_a_duration_is_no_step() -> None:
    """An engine that falls idle tells its last gauges; the step-time distribution must not see it."""
    engine = Engine()
    engine.hook.end_step((engine.now_ns, 0, engine.steps, 0))
    assert engine.reader.histogram("step").count == engine.steps
    assert engine.reader.poll()[-1]["running"] == 0


def test_queues_and_tenants_reach_the_pilot() -> None:
    engine = Engine()
    engine.hook.set_class(0, 3, 400)
    engine.hook.set_tenant("acme", 1, 0, 12, 7, 99)
    assert engine.reader.classes() == (("batch", 3, 400),)
    assert engine.reader.tenants() == (("acme", 1, 0, 12, 7, 99),)


def test_the_engine_never_fills_the_hooks_fields() -> None:
    full = with_hook_fields(manifest())
    assert [f.name for f in with_hook_fields(full).fields] == [f.name for f in full.fields]


def test_an_engine_does_not_speak_for_the_valve() -> None:
    """What is shed is in force in the valve: no value of it in the record, and no lease on it obeyed here."""
    shed = ManifestKnob("shed_fraction", "ratio", 0.0, 1.0, 0.0, 0.01, "by the valve")
    engine = Engine(knobs=(*manifest().knobs, shed))
    engine.write(("shed_fraction", 0.5))
    assert engine.step() == BASELINES
    seen = echo(engine)
    assert "knob.shed_fraction" not in seen
    assert seen["controls_ignored_total"] == 1
    assert engine.reader.manifest.knob("shed_fraction") == shed


def test_without_the_environment_a_hook_is_silent_and_harmless(caplog: pytest.LogCaptureFixture) -> None:
    hook = StepHook.open(manifest(), {})
    assert not hook.enabled
    assert exercised(hook) == BASELINES
    assert caplog.records == []


def exercised(hook: StepHook) -> dict[str, float]:
    """Every call an engine can make; the values in force at the end."""
    hook.begin_step(1)
    hook.itl[7].record(5)
    hook.ttft[0].record(5)
    hook.queue_wait[0].record(5)
    hook.set_class(0, 1, 1)
    hook.set_tenant("acme", 1, 1, 1, 1, 1)
    hook.end_step((1, 2, 3, 4))
    hook.next_expiry_ns()
    return dict(hook.begin_step(2))


def environ(root: Path) -> dict[str, str]:
    return {"KVPILOT_TELEMETRY": f"{root}/t", "KVPILOT_CONTROLS": f"{root}/c", "KVPILOT_ENGINE": "engine"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"KVPILOT_ENGINE": ""}, "KVPILOT_ENGINE not set"),
        ({"KVPILOT_ENGINE": "a/b"}, "engine name 'a/b'"),
        ({"KVPILOT_TELEMETRY": "/nonexistent/t"}, "/nonexistent/t does not exist"),
        ({"KVPILOT_TELEMETRY": "/proc"}, "link directory /proc"),
    ],
)
def test_a_link_that_cannot_be_opened_is_one_warning(
    bad: dict[str, str], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hook = StepHook.open(manifest(), environ(tmp_path) | bad)
    assert exercised(hook) == BASELINES
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert message in caplog.text
    assert "Traceback" not in caplog.text
    assert len(caplog.text.strip().splitlines()) == 1


def test_open_leaves_a_page_and_close_gives_up_its_lock(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    hook = StepHook.open(manifest(), environ(tmp_path), VirtualClock())
    assert hook.enabled
    hook.end_step((1, 2, 3, 4))
    hook.close()
    assert exercised(hook) == BASELINES
    hook.close()
    (page,) = (tmp_path / "t/engine-0").iterdir()
    with page.open("rb") as file:
        reader = TelemetryReader(lambda offset, size: (file.seek(offset), file.read(size))[1])
        assert [record["steps_total"] for record in reader.poll()] == [3]


def test_controls_that_become_unreadable_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    engine.controls.page[8] = 2
    engine.write(("max_running", 8))
    for _ in range(5):
        assert engine.step() == BASELINES
    assert caplog.text.count("controls not obeyed: page format version 2") == 1


def test_a_hook_that_is_closed_says_so() -> None:
    engine = Engine()
    engine.hook.close()
    ending = engine.reader.ending()
    assert ending is not None
    assert (ending.kind, ending.what) == ("closed", "")


def test_last_words_name_the_exception_and_outlast_the_close() -> None:
    engine = Engine()
    assert engine.reader.ending() is None
    try:
        raise RuntimeError("a prompt")
    except RuntimeError as error:
        engine.hook.last_words(error)
    engine.hook.close()
    ending = engine.reader.ending()
    assert ending is not None
    assert ending.kind == "exception"
    assert ending.what.startswith("RuntimeError\ntest_hook.py:test_last_words")
    assert "prompt" not in ending.what


def test_last_words_know_the_time_of_both_clocks(tmp_path: Path) -> None:
    clock = VirtualClock(5 * NS)
    full = with_hook_fields(manifest())
    buffer = bytearray(plan_page(full, 16).page_bytes)
    writer = TelemetryWriter(buffer, full, nonce=NONCE, identity=IDENTITY, record_count=16)
    StepHook(manifest(), writer, clock=clock).last_words(MemoryError())
    ending = TelemetryReader(read_at(buffer)).ending()
    assert ending == ("exception", 5 * NS, clock.wall_ns(), "MemoryError")


def test_last_words_of_a_disabled_hook_are_no_error() -> None:
    StepHook(manifest()).last_words(ValueError())


def test_a_hook_that_fails_says_that_it_was_the_hook() -> None:
    """The engine serves on: nobody may read its page as that of an engine that died."""
    engine = Engine()
    engine.hook.end_step(())
    engine.hook.close()
    ending = engine.reader.ending()
    assert ending is not None
    assert ending.kind == "hook_failed"
    assert ending.what.startswith("IndexError\nhook.py:StepHook.end_step:")


def test_a_boundary_without_a_record_shows_how_far_the_engine_came() -> None:
    """A step that began and did not end: the engine died, or hangs, in the middle of it."""
    engine = Engine()
    assert engine.reader.boundary_ns() == engine.reader.poll()[-1]["time_ns"]
    engine.hook.begin_step(engine.now_ns + NS)
    assert engine.reader.poll() == []
    assert engine.reader.boundary_ns() == engine.now_ns + NS


class Machine:
    """Stands in for the files of the kernel: says what it is told."""

    def __init__(self, *answers: int | None) -> None:
        self.answers = list(answers)
        self.asked = 0

    def available_bytes(self) -> int | None:
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def close(self) -> None:
        self.answers = [None]


def test_records_say_what_memory_the_machine_has_left_ten_times_a_second() -> None:
    full = with_hook_fields(manifest(), host=True)
    buffer = bytearray(plan_page(full, 64).page_bytes)
    writer = TelemetryWriter(buffer, full, nonce=NONCE, identity=IDENTITY, record_count=64)
    controls, machine = Controls(), Machine(900, 800, None, 700)
    hook = StepHook(manifest(), writer, lambda _: controls.page, host=machine)
    reader = TelemetryReader(read_at(buffer))
    seen = []
    for step in range(40):
        controls.writer.write([Lease("max_running", Scope(), 8, NS, step)], NONCE)
        hook.begin_step(step * NS // 100)
        hook.end_step((step, 1, step, 3))
        seen += [record["host_available_bytes"] for record in reader.poll()]
    assert machine.asked == 5
    assert seen == [800] * 20 + [700] * 20, "a machine that cannot answer for a moment is no news"
    assert record_of(buffer)["knob.max_running"] == 8
    hook.close()


def record_of(buffer: bytearray) -> dict[str, float]:
    return dict(TelemetryReader(read_at(buffer)).poll()[-1])


def test_a_real_hook_has_the_machines_memory_where_it_can_be_read(tmp_path: Path) -> None:
    for name in ("t", "c"):
        (tmp_path / name).mkdir()
    environ = {
        "KVPILOT_TELEMETRY": f"{tmp_path}/t",
        "KVPILOT_CONTROLS": f"{tmp_path}/c",
        "KVPILOT_ENGINE": "e",
    }
    hook = StepHook.open(manifest(), environ)
    hook.begin_step(1)
    hook.end_step((1, 2, 3, 4))
    hook.close()
    (path,) = (tmp_path / "t/e-0").iterdir()
    assert record_of(bytearray(path.read_bytes()))["host_available_bytes"] > 0
