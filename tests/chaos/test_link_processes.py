"""The link between real processes: two writers, dead writers, readers, two users, volumes that fail."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from link_pages import manifest

from kvpilot.clock import SystemClock, VirtualClock
from kvpilot.inside.hook import StepHook
from kvpilot.link.files import open_controls
from kvpilot.link.following import ControlsFile, newest_telemetry, open_pages
from kvpilot.link.page import LinkError
from kvpilot.link.place import LinkPlace
from kvpilot.link.telemetry import TelemetryReader

NS = 10**9
TESTS = Path(__file__).parents[1]

PRELUDE = """
import os, sys
from kvpilot.clock import SystemClock
from kvpilot.inside.hook import StepHook
from kvpilot.link.controls import Lease, Scope
from kvpilot.link.files import open_controls, open_telemetry
from kvpilot.link.following import newest_telemetry
from kvpilot.link.place import LinkPlace
from link_pages import manifest
place = LinkPlace.from_environ(os.environ)
def say(*words): print(*words, flush=True)
def hear(): return sys.stdin.readline()
"""


class Process:
    """Another process that runs `script`, answers a line at a time, and dies when told."""

    def __init__(self, script: str, environ: dict[str, str], wrap: tuple[str, ...] = ()) -> None:
        self._child = subprocess.Popen(
            [*wrap, sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
            env=os.environ | environ | {"PYTHONPATH": str(TESTS)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._child.pid

    def hear(self) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline().strip()
        assert line, self._child.communicate()[1]
        return line

    def say(self, line: str = "") -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()

    def kill(self) -> None:
        self._child.send_signal(signal.SIGKILL)
        self._child.wait()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    tmp_path.chmod(0o755)
    for name in ("t", "c"):
        (tmp_path / name).mkdir()
    return {
        "KVPILOT_TELEMETRY": f"{tmp_path}/t",
        "KVPILOT_CONTROLS": f"{tmp_path}/c",
        "KVPILOT_ENGINE": "engine",
    }


@pytest.fixture
def place(environ: dict[str, str]) -> LinkPlace:
    place = LinkPlace.from_environ(environ)
    assert place is not None
    return place


@pytest.fixture
def start(environ: dict[str, str]) -> Iterator[Callable[..., Process]]:
    with ExitStack() as stack:
        yield lambda script, **more: stack.enter_context(Process(script, environ | more))


PILOT = """
    writer, page = open_controls(place, 0, SystemClock())
    renewal = 0
    say("steering")
    while line := hear().split():
        renewal += 1
        writer.write([Lease("max_running", Scope(), float(line[0]), 10**9, renewal)], int(line[1]))
        say("written")
"""
ENGINE = """
    hook = StepHook.open(manifest(), os.environ)
    step = 0
    say("serving")
    while hear():
        step += 1
        hook.begin_step(step)
        hook.end_step((step, 1000000, step, 1))
        say("stepped")
"""


def test_a_second_pilot_is_refused_and_told_who_holds_the_engine(
    start: Callable[..., Process], place: LinkPlace
) -> None:
    first = start(PILOT)
    first.hear()
    with pytest.raises(LinkError) as refused:
        open_controls(place, 0, SystemClock())
    message = str(refused.value)
    assert "held by another pilot" in message
    assert f"host {os.uname().nodename}" in message
    assert f"pid {first.pid}" in message
    assert "stop that one first" in message
    assert "\n" not in message
    assert "controls.kvp" in message
    first.kill()
    writer, page = open_controls(place, 0, SystemClock())
    writer.close()
    page.close()


def test_a_refused_pilot_does_not_disturb_the_first(start: Callable[..., Process], place: LinkPlace) -> None:
    """Its descriptor on the same file is closed; the first one's lock must survive that."""
    first = start(PILOT)
    first.hear()
    for _ in range(2):
        with pytest.raises(LinkError, match="held by another pilot"):
            open_controls(place, 0, SystemClock())
    first.say("8 1")
    assert first.hear() == "written"


def test_when_the_pilot_is_killed_baseline_returns_in_one_ttl_and_one_step(
    start: Callable[..., Process], environ: dict[str, str], place: LinkPlace
) -> None:
    """The engine here runs on a clock of its own, in steps of 10 ms: no clock is shared, nothing waits."""
    hook = StepHook.open(manifest(), environ, VirtualClock())
    assert hook._telemetry is not None
    nonce = hook._telemetry.nonce
    pilot = start(PILOT)
    pilot.hear()
    now_ns = 0
    assert hook.begin_step(now_ns)["max_running"] == 32
    for _ in range(20):
        pilot.say(f"8 {nonce}")
        pilot.hear()
        now_ns += 100_000_000
        assert hook.begin_step(now_ns)["max_running"] == 8
    pilot.kill()
    died_ns = now_ns
    while hook.begin_step(now_ns)["max_running"] == 8:
        now_ns += 10_000_000
    assert now_ns - died_ns == NS
    hook.close()


def test_the_kernel_tells_readers_that_an_engine_died_and_its_last_steps_remain(
    start: Callable[..., Process], place: LinkPlace
) -> None:
    engine = start(ENGINE)
    engine.hear()
    page = newest_telemetry(place.telemetry_directory(0), place.uids)
    assert page is not None
    reader = TelemetryReader(page.read_at)
    for _ in range(3):
        engine.say()
        engine.hear()
    assert page.is_locked()
    assert len(reader.poll()) == 3
    engine.say()
    engine.hear()
    engine.kill()
    assert not page.is_locked()
    assert [record["steps_total"] for record in reader.poll()] == [4]
    assert newest_telemetry(place.telemetry_directory(0), place.uids) is None
    page.close()


def test_readers_come_and_go_without_touching_the_lock(
    start: Callable[..., Process], place: LinkPlace
) -> None:
    """They ask with F_GETLK and hold nothing: two may look, and a writer could still lock."""
    engine = start(ENGINE)
    engine.hear()
    for _ in range(3):
        pages = [newest_telemetry(place.telemetry_directory(0), place.uids) for _ in range(2)]
        assert all(page is not None and page.is_locked() for page in pages)
        for page in pages:
            assert page is not None
            page.close()
    (path,) = place.telemetry_directory(0).iterdir()
    holders = [
        line for line in Path("/proc/locks").read_text().splitlines() if f":{path.stat().st_ino} " in line
    ]
    assert len(holders) == 1
    assert f" WRITE {engine.pid} " in holders[0]
    engine.say()
    assert engine.hear() == "stepped"


def test_readers_follow_the_newest_engine_that_lives(start: Callable[..., Process], place: LinkPlace) -> None:
    directory = place.telemetry_directory(0)
    first = start(ENGINE)
    first.hear()
    second = start(ENGINE)
    second.hear()
    pages = open_pages(directory, "telemetry", place.uids, locked=True)
    assert len(pages) == 2
    newest = newest_telemetry(directory, place.uids)
    assert newest is not None
    assert newest.path == pages[0].path
    second.kill()
    follower = newest_telemetry(directory, place.uids)
    assert follower is not None
    assert follower.path == pages[1].path
    for page in (*pages, newest, follower):
        page.close()


def test_an_engine_that_starts_removes_no_page_of_one_that_lives(
    start: Callable[..., Process], place: LinkPlace
) -> None:
    for _ in range(5):
        start(ENGINE).hear()
    assert len(list(place.telemetry_directory(0).iterdir())) == 5


def test_a_page_truncated_under_a_living_engine_kills_no_reader(
    start: Callable[..., Process], place: LinkPlace
) -> None:
    engine = start(ENGINE)
    engine.hear()
    page = newest_telemetry(place.telemetry_directory(0), place.uids)
    assert page is not None
    reader = TelemetryReader(page.read_at)
    engine.say()
    engine.hear()
    os.truncate(page.path, 300)
    assert reader.poll() == []
    assert reader.histogram("step") is None
    assert reader.classes() == reader.tenants() == ()
    page.close()


OTHER_USER = """
    os.setgid(4343); os.setgroups([4343]); os.setuid(4242)
    newest = newest_telemetry(place.telemetry_directory(0), place.uids)
    say("none" if newest is None else newest.is_locked())
    writer, page = open_controls(place, 0, SystemClock())
    writer.write([Lease("max_running", Scope(), 8.0, 10**9, 1)], newest.header.nonce)
    say("written")
    hear()
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs to change uid")
@pytest.mark.parametrize("uids", ["0,4242", ""])
def test_engine_and_pilot_as_two_users_of_one_group(
    start: Callable[..., Process], environ: dict[str, str], tmp_path: Path, uids: str
) -> None:
    """As in a pod with fsGroup: directories of a common group, setgid, one writable by each side.

    Without KVPILOT_UIDS neither side believes the other.
    """
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(folder.stat().st_mode | 0o055)
    for name in ("t", "c"):
        os.chown(tmp_path / name, 0, 4343)
        (tmp_path / name).chmod(0o2770)
    environ = environ | {"KVPILOT_UIDS": uids}
    hook = StepHook.open(manifest(), environ, VirtualClock())
    assert hook.enabled
    place = LinkPlace.from_environ(environ)
    assert place is not None
    hook.begin_step(0)
    pilot = start(OTHER_USER, KVPILOT_UIDS=uids or "4242")
    if not uids:
        with pytest.raises(AssertionError, match="owned by uid 0, which is not trusted"):
            pilot.hear()
        hook.close()
        return
    assert pilot.hear() == "True"
    assert pilot.hear() == "written"
    file = ControlsFile(place.controls_directory(0) / "controls.kvp", frozenset({0}))
    assert file.read(0) is None
    assert "owned by uid 4242, which is not trusted" in (file.error or "")
    hook.begin_step(NS)
    pilot.say()
    assert hook._controls_file is not None
    assert hook._controls_file.error is None
    hook.close()


def may_mount() -> bool:
    """Root in a container may still not be allowed to."""
    done = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return done.returncode == 0


READ_ONLY_ENGINE = """
    import subprocess
    path = os.environ["READ_ONLY"]
    subprocess.run(["mount", "--bind", path, path], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
    hook = StepHook.open(manifest(), os.environ)
    say(hook.enabled)
    hook.begin_step(1)
    say(hook._book.ignored["foreign"] if hook._book else "baseline")
"""


@pytest.mark.root
@pytest.mark.skipif(not may_mount(), reason="needs to mount")
def test_read_only_mounts(environ: dict[str, str], place: LinkPlace) -> None:
    """The engine reads controls through a read-only mount; telemetry on one means no telemetry, no harm."""
    writer, page = open_controls(place, 0, SystemClock())
    writer.write([], 1)
    wrap = ("unshare", "--mount")
    try:
        read_only = environ | {"READ_ONLY": environ["KVPILOT_CONTROLS"]}
        with Process(READ_ONLY_ENGINE, read_only, wrap) as engine:
            assert engine.hear() == "True"
            assert engine.hear() == "1", "it has read the table, which is for another engine start"
        read_only = environ | {"READ_ONLY": environ["KVPILOT_TELEMETRY"]}
        with Process(READ_ONLY_ENGINE, read_only, wrap) as engine:
            assert engine.hear() == "False"
            assert engine.hear() == "baseline"
            assert "Read-only file system: make" in engine._child.communicate()[1]
    finally:
        writer.close()
        page.close()


FULL_VOLUME = """
    import subprocess
    path = os.environ["KVPILOT_TELEMETRY"]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], check=True)
    hook = StepHook.open(manifest(), os.environ)
    say(hook.enabled)
    hook.begin_step(1)
    hook.end_step((1, 2, 3, 4))
    say(dict(hook.begin_step(2)))
"""


@pytest.mark.root
@pytest.mark.skipif(not may_mount(), reason="needs to mount")
def test_a_volume_that_is_too_small_means_no_telemetry_and_one_warning(environ: dict[str, str]) -> None:
    with Process(FULL_VOLUME, environ, ("unshare", "--mount")) as engine:
        assert engine.hear() == "False"
        assert "'max_running': 32" in engine.hear()
        lines = engine._child.communicate()[1].strip().splitlines()
    assert len(lines) == 1
    assert "No space left on device: raise the volume's size limit" in lines[0]
