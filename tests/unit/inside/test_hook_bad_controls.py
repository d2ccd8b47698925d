"""Controls that cannot be believed: baseline within one ttl, one warning, and the hook lives on.

The engine here steps every 10 ms on a clock of its own, through real files.
"""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from link_pages import IDENTITY, manifest

from kvpilot.clock import NS, VirtualClock
from kvpilot.inside.hook import StepHook
from kvpilot.link.controls import CONTROLS_BYTES, SLOT_BYTES, ControlsWriter, Lease, Scope
from kvpilot.link.page import HEADER_BYTES, PageHeader

STEP_NS = NS // 50
TTL_NS = 2 * NS
RECHECK_NS = NS
BASELINE, LEASED = 32, 8


class Engine:
    """One hook, and the pilot's page beside it."""

    def __init__(self, folder: Path, uids: str = "") -> None:
        for name in ("t", "c"):
            (folder / name).mkdir()
        environ = {
            "KVPILOT_TELEMETRY": f"{folder}/t",
            "KVPILOT_CONTROLS": f"{folder}/c",
            "KVPILOT_ENGINE": "engine",
            "KVPILOT_UIDS": uids,
        }
        self.directory = folder / "c/engine-0"
        self.path = self.directory / "controls.kvp"
        self.hook = StepHook.open(manifest(), environ, VirtualClock())
        assert self.hook.enabled
        self.now_ns = 0
        self.renewal = 0
        self.page = bytearray(CONTROLS_BYTES)
        self.writer = ControlsWriter(self.page, IDENTITY)

    def renew(self) -> None:
        """What a pilot does ten times a second: here into a file of its own name."""
        assert self.hook._telemetry is not None
        self.renewal += 1
        lease = Lease("max_running", Scope(), LEASED, TTL_NS, self.renewal)
        self.writer.write([lease], self.hook._telemetry.nonce)
        self.save(bytes(self.page))

    def steer(self) -> None:
        """A pilot has come: its file is noticed within a second, its first lease is history, not the next."""
        self.renew()
        self.steps(1.1)
        self.renew()
        assert self.step() == LEASED

    def save(self, data: bytes) -> None:
        """In place, as through a map."""
        self.directory.mkdir(mode=0o750, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o640)
        os.pwrite(fd, data, 0)
        os.close(fd)
        self.path.chmod(0o640)

    def replace(self, data: bytes) -> None:
        """Another file in its place."""
        self.path.unlink(missing_ok=True)
        self.save(data)

    def step(self) -> float:
        self.now_ns += STEP_NS
        value = self.hook.begin_step(self.now_ns)["max_running"]
        self.hook.end_step((self.now_ns, STEP_NS, 1, 1))
        return value

    def steps(self, seconds: float) -> list[float]:
        return [self.step() for _ in range(round(seconds * NS / STEP_NS))]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.hook.close()


def corrupt_header(engine: Engine) -> None:
    engine.page[8:HEADER_BYTES] = os.urandom(HEADER_BYTES - 8)


def no_magic(engine: Engine) -> None:
    engine.page[:8] = os.urandom(8)


def newer_format(engine: Engine) -> None:
    engine.page[8] += 1


def another_kind(engine: Engine) -> None:
    engine.page[:HEADER_BYTES] = PageHeader("valve", CONTROLS_BYTES, 7, IDENTITY).pack()


def corrupt_slots(engine: Engine) -> None:
    """Sequences that look newer, over noise."""
    noise = struct.pack("<Q", 10**6) + os.urandom(SLOT_BYTES - 8)
    engine.save(bytes(engine.page)[:HEADER_BYTES] + noise * 2)


def truncated(engine: Engine) -> None:
    """Under the descriptor that the hook holds: every later read comes back short."""
    os.truncate(engine.path, 1000)


def emptied(engine: Engine) -> None:
    os.truncate(engine.path, 0)


def replaced_by_half(engine: Engine) -> None:
    engine.replace(bytes(engine.page)[:2000])


def others_may_write(engine: Engine) -> None:
    engine.replace(bytes(engine.page))
    engine.path.chmod(0o646)


def symbolic_link(engine: Engine) -> None:
    engine.path.rename(engine.directory / "elsewhere")
    engine.path.symlink_to(engine.directory / "elsewhere")


def fifo(engine: Engine) -> None:
    engine.path.unlink()
    os.mkfifo(engine.path, 0o640)


def untrusted_directory(engine: Engine) -> None:
    """With the page made anew, or the descriptor that is open would go on being read."""
    engine.replace(bytes(engine.page))
    engine.directory.chmod(0o757)


WRITTEN_ON = [
    (corrupt_header, "page format version"),
    (no_magic, "not a kvpilot controls page"),
    (newer_format, "page format version"),
    (another_kind, "not of kind controls"),
]
"""Headers that are wrong over tables that are right, and renewed all the while."""
TROUBLES = [
    *WRITTEN_ON,
    (corrupt_slots, "no valid table in the controls page"),
    (truncated, "cut short"),
    (emptied, "cut short"),
    (replaced_by_half, "cut short"),
    (others_may_write, "writable by others: take that right away"),
    (symbolic_link, "symbolic links"),
    (fifo, "not a regular file"),
    (untrusted_directory, "writable by others: take that right away"),
]


@pytest.mark.parametrize(("trouble", "message"), TROUBLES, ids=lambda case: getattr(case, "__name__", ""))
def test_baseline_returns_within_a_ttl_and_one_warning_says_why(
    trouble: Callable[[Engine], None], message: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.steer()
    trouble(engine)
    values = []
    for _ in range(100):
        if (trouble, message) in WRITTEN_ON:
            engine.renew()
        values += engine.steps(0.1)
    # A file that was replaced is noticed at the next look; what is lost by it runs out with its lease.
    assert values.index(BASELINE) * STEP_NS <= TTL_NS
    assert set(values[round(TTL_NS / STEP_NS) :]) == {BASELINE}
    assert engine.hook.enabled
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "controls not obeyed: " in caplog.text
    assert message in caplog.text


def test_controls_that_stay_missing_are_said_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """An engine starts before its pilot: a minute is for that."""
    assert set(engine.steps(59)) == {BASELINE}
    assert caplog.records == []
    assert set(engine.steps(120)) == {BASELINE}
    assert len(caplog.records) == 1
    assert f"{engine.path}: not there for a minute: start a pilot" in caplog.text
    engine.steer()


def test_controls_that_vanish_are_baseline_within_a_ttl(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.steer()
    engine.path.unlink()
    assert set(engine.steps(10)[round(TTL_NS / STEP_NS) :]) == {BASELINE}
    engine.steps(120)
    assert len(caplog.records) == 1
    assert "not there for a minute" in caplog.text


def test_controls_of_a_foreign_owner_are_never_obeyed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(tmp_path, uids=str(os.geteuid()))
    engine.hook._controls_file._uids = frozenset({os.geteuid() + 1})  # type: ignore[union-attr]
    for _ in range(300):
        engine.renew()
        assert engine.step() == BASELINE
    assert len(caplog.records) == 1
    assert f"owned by uid {os.geteuid()}, which is not trusted: name it in KVPILOT_UIDS" in caplog.text
    engine.hook.close()


def test_trouble_that_is_over_is_over(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """And the same trouble again is no second warning: a page that flickers must not flood a log."""
    engine.steer()
    whole = bytes(engine.page)
    for _ in range(3):
        no_magic(engine)
        engine.renew()
        assert engine.steps(3)[-1] == BASELINE
        engine.page[:HEADER_BYTES] = whole[:HEADER_BYTES]
        engine.renew()
        engine.step()
        engine.renew()
        assert engine.step() == LEASED
    assert len(caplog.records) == 1


@pytest.mark.parametrize("keep", [0, 1, 255, 256, 2000, 4095])
def test_a_read_that_comes_back_short_at_any_length(keep: int, engine: Engine) -> None:
    engine.steer()
    os.truncate(engine.path, keep)
    assert engine.steps(3)[-1] == BASELINE
    assert engine.hook.enabled


UNWRITABLE = [
    pytest.param("read_only", "Permission denied", marks=pytest.mark.root),
    ("missing", "does not exist: create it or mount it"),
    ("a_file", "Not a directory"),
]


@pytest.mark.parametrize(("case", "message"), UNWRITABLE)
def test_an_unwritable_telemetry_directory_is_one_warning_and_baselines(
    case: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if case == "read_only":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere; test_read_only_mounts is for it")
        (tmp_path / "t").mkdir(mode=0o550)
    if case == "a_file":
        (tmp_path / "t").write_text("in the way")
    environ = {
        "KVPILOT_TELEMETRY": f"{tmp_path}/t",
        "KVPILOT_CONTROLS": f"{tmp_path}/c",
        "KVPILOT_ENGINE": "engine",
    }
    hook = StepHook.open(manifest(), environ, VirtualClock())
    for step in range(1000):
        assert hook.begin_step(step)["max_running"] == BASELINE
        hook.end_step((step, 1, step, 1))
    hook.close()
    assert not hook.enabled
    assert len(caplog.records) == 1
    assert "running without telemetry: " in caplog.text
    assert message in caplog.text
