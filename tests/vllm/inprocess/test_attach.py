"""How a hook gets onto a scheduler, whatever its class, and off again."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flown import Flown
from plane import AsyncScheduler, Make, Plane, Scheduler, SchedulerConfig, build_scheduler

import kvpilot.inside.vllm as plugin
from kvpilot.clock import VirtualClock
from kvpilot.inside.vllm.attach import adopt, attach
from kvpilot.inside.vllm.attachment import MARK

Fly = Callable[..., Flown]
Said = Callable[[], list[str]]

WRAPPED = {
    "schedule",
    "update_from_output",
    "add_request",
    "finish_requests",
    "_free_request",
    "_preempt_request",
    "shutdown",
}


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link's environment, and afterwards vLLM's classes as they were."""
    for name in ("TELEMETRY", "CONTROLS"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"KVPILOT_{name}", str(tmp_path / name))
    monkeypatch.setenv("KVPILOT_ENGINE", "e")
    monkeypatch.setattr(SchedulerConfig, "get_scheduler_cls", SchedulerConfig.get_scheduler_cls)
    for kind in (Scheduler, AsyncScheduler, Own):
        monkeypatch.setattr(kind, "__init__", kind.__init__)


class Own(AsyncScheduler):
    """Somebody else's scheduler: its own constructor, its own schedule()."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.own_steps = 0

    def schedule(self, *arguments: Any, **named: Any) -> Any:
        self.own_steps += 1
        return super().schedule(*arguments, **named)


@pytest.mark.parametrize("kind", [None, Own], ids=["vllm's own", "a subclass"])
@pytest.mark.usefixtures("link")
def test_register_puts_a_hook_on_the_next_scheduler(tmp_path: Path, kind: Any) -> None:
    plugin.register()
    plugin.register()
    scheduler = build_scheduler(Make(asynchronous=True, scheduler_cls=kind), tmp_path)
    attachment = getattr(scheduler, MARK)
    assert attachment.hook.enabled
    assert set(vars(scheduler)) >= WRAPPED
    # Once: what is wrapped is the class's own method.
    wrapped = scheduler.schedule.__wrapped__
    assert wrapped.__func__ is type(scheduler).schedule
    bound = type(scheduler).update_from_output.__get__(scheduler)
    assert inspect.signature(scheduler.update_from_output) == inspect.signature(bound)
    scheduler.shutdown()


@pytest.mark.usefixtures("link")
def test_a_subclass_goes_on_doing_its_own_thing(tmp_path: Path) -> None:
    plugin.register()
    flight = Plane(Make(asynchronous=True, scheduler_cls=Own), tmp_path)
    flight.ask("r", 20, 8)
    flight.drain()
    assert flight.scheduler.own_steps > 8
    assert getattr(flight.scheduler, MARK).recorder.steps == 8
    flight.scheduler.shutdown()


@pytest.mark.usefixtures("link")
def test_the_parent_of_an_adopted_class_is_left_alone(tmp_path: Path) -> None:
    class Child(AsyncScheduler):
        pass

    adopt(AsyncScheduler)
    adopt(AsyncScheduler)
    assert MARK not in vars(build_scheduler(Make(asynchronous=True, scheduler_cls=Child), tmp_path))
    assert MARK in vars(build_scheduler(Make(asynchronous=True), tmp_path))


def test_register_without_the_link_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TELEMETRY", "CONTROLS", "ENGINE"):
        monkeypatch.delenv(f"KVPILOT_{name}", raising=False)
    before = SchedulerConfig.get_scheduler_cls
    plugin.register()
    assert SchedulerConfig.get_scheduler_cls is before
    assert MARK not in vars(build_scheduler(Make(), tmp_path))


def test_register_survives_a_vllm_without_such_a_configuration(
    link: None, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    monkeypatch.delattr(SchedulerConfig, "get_scheduler_cls")
    plugin.register()
    assert said() == ["vLLM flies without kvpilot"]


def test_half_an_environment_is_said_once_and_the_scheduler_is_left_alone(tmp_path: Path, said: Said) -> None:
    scheduler = build_scheduler(Make(), tmp_path)
    assert attach(scheduler, {"KVPILOT_ENGINE": "e"}, VirtualClock()) is None
    assert len(said()) == 1
    assert not WRAPPED & set(vars(scheduler))


def test_a_directory_that_cannot_be_written_is_said_once(tmp_path: Path, said: Said) -> None:
    scheduler = build_scheduler(Make(), tmp_path)
    (tmp_path / "file").write_text("")
    environ = {
        "KVPILOT_TELEMETRY": str(tmp_path / "file/below"),
        "KVPILOT_CONTROLS": str(tmp_path),
        "KVPILOT_ENGINE": "e",
    }
    assert attach(scheduler, environ, VirtualClock()) is None
    assert len(said()) == 1
    assert not WRAPPED & set(vars(scheduler))


def test_attach_twice_is_once(fly: Fly) -> None:
    flight = fly(Make())
    schedule = flight.scheduler.schedule
    assert attach(flight.scheduler, flight.environ, flight.clock) is flight.attachment
    assert flight.scheduler.schedule is schedule


def test_wraps_of_others_compose(fly: Fly) -> None:
    """Ours lies inside; when it goes, theirs stays and still reaches vLLM's own."""
    flight = fly(Make())
    ours = flight.scheduler.schedule
    calls = []

    def theirs(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return ours(*arguments, **named)

    flight.scheduler.schedule = theirs
    flight.ask("r", 20, 8)
    flight.step()
    flight.attachment.detach()
    flight.drain()
    assert flight.scheduler.schedule is theirs
    assert len(calls) == len(flight.history)
    assert flight.finished == {"r": "length"}


@pytest.mark.parametrize("lost", ["get_request_counts", "_free_request", "running"])
def test_a_scheduler_that_is_strange_to_us_flies_alone_and_is_said_once(said: Said, lost: str) -> None:
    class Strange:
        def __getattr__(self, name: str) -> Any:
            if name in (lost, MARK):
                raise AttributeError(name)
            return lambda *arguments, **named: None

    strange = Strange()
    assert attach(strange, {"KVPILOT_ENGINE": "e"}, VirtualClock()) is None
    assert said() == [f"this vLLM is not known to kvpilot and flies without it: its scheduler has no {lost}"]
    assert vars(strange) == {}


def test_attach_never_raises(said: Said) -> None:
    class Hostile:
        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError(name)

    assert attach(Hostile(), {}, VirtualClock()) is None
    assert len(said()) == 1


def test_the_entry_point_names_the_plugin() -> None:
    """As vLLM finds it, from the metadata that comes with the wheel."""
    script = (
        "from importlib.metadata import entry_points\n"
        "found = [p for p in entry_points(group='vllm.general_plugins') if p.name == 'kvpilot']\n"
        "assert [p.value for p in found] == ['kvpilot.inside.vllm:register'], found\n"
        "found[0].load()()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    if "AssertionError: []" in done.stderr:
        pytest.skip("run from the source tree, which has no metadata")
    assert done.returncode == 0, done.stderr


def test_the_plugin_imports_without_vllm() -> None:
    """In any process that loads it, before it is known what that process is for."""
    script = (
        "import sys; sys.modules['vllm'] = None; sys.modules['torch'] = None\n"
        "import kvpilot.inside.vllm as p, kvpilot.inside.vllm.attach\n"
        "import os; os.environ.clear(); p.register()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
