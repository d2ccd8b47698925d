"""Whatever breaks inside the hook, the engine never notices: baselines return, one warning, no exception."""

import errno
import logging
import mmap
import os
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from link_pages import IDENTITY, manifest

from kvpilot.clock import VirtualClock
from kvpilot.inside import hook as hook_module
from kvpilot.inside.hook import StepHook
from kvpilot.link import files, locks, telemetry, trust
from kvpilot.link.controls import CONTROLS_BYTES, ControlsWriter, Lease, LeaseBook, Scope
from kvpilot.link.following import ControlsFile
from kvpilot.link.held_read import HeldReader
from kvpilot.link.histogram import HistogramWriter
from kvpilot.link.manifest import ManifestKnob
from kvpilot.link.records import FrameWriter
from kvpilot.link.telemetry import TelemetryWriter

NS = 10**9
BASELINES = {"max_running": 32, "prefill_chunk_tokens": 512, "admission_watermark": 0.95}


class Fault(Exception):
    """What no code of ours expects."""


def fail(*_: object, **__: object) -> None:
    raise Fault("injected")


def nothing_fails(_: pytest.MonkeyPatch) -> None:
    """The control: the same test with nothing broken."""


WHILE_OPENING = [
    (files, "plan_page"),
    (files, "new_nonce"),
    (files, "this_process"),
    (files, "create_page"),
    (files, "_allocate"),
    (files, "_drop_old_pages"),
    (files, "_reserve"),
    (files, "TelemetryWriter"),
    (files.WritablePage, "publish"),
    (trust, "open_directory"),
    (locks, "lock"),
    (mmap, "mmap"),
    (os, "open"),
    (os, "fchmod"),
    (os, "posix_fallocate"),
    (os, "rename"),
    (hook_module, "ControlsFile"),
    (hook_module, "LeaseBook"),
    (hook_module, "with_hook_fields"),
    (hook_module, "LinkPlace"),
    (telemetry.PageHeader, "pack"),
]
WHILE_STEPPING = [
    (HeldReader, "read"),
    (ControlsFile, "_follow"),
    (LeaseBook, "observe"),
    (LeaseBook, "in_force"),
    (ManifestKnob, "snap"),
    (hook_module, "value_in_force"),
    (HistogramWriter, "flush"),
    (TelemetryWriter, "write_step"),
    (TelemetryWriter, "set_class"),
    (TelemetryWriter, "set_tenant"),
    (FrameWriter, "write_parts"),
    (zlib, "crc32"),
    (TelemetryWriter, "_bind_thread"),
]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "t").mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "c/engine-0").mkdir(mode=0o750)
    return {
        "KVPILOT_TELEMETRY": f"{tmp_path}/t",
        "KVPILOT_CONTROLS": f"{tmp_path}/c",
        "KVPILOT_ENGINE": "engine",
    }


def step(hook: StepHook, now_ns: int) -> dict[str, float]:
    """One step with every call that an engine makes."""
    values = dict(hook.begin_step(now_ns))
    hook.itl[0].record(5_000_000)
    hook.ttft[1].record(100_000_000)
    hook.set_class(0, 1, 1)
    hook.set_tenant("acme", 1, 1, 1, 1, 1)
    hook.end_step((now_ns, 10_000_000, 1, 1))
    hook.next_expiry_ns()
    return values


def steered(hook: StepHook, environ: dict[str, str]) -> Callable[[int], None]:
    """A pilot that holds max_running at 8; the returned call renews the lease."""
    assert hook._telemetry is not None
    nonce = hook._telemetry.nonce
    path = Path(environ["KVPILOT_CONTROLS"], "engine-0/controls.kvp")
    page = bytearray(CONTROLS_BYTES)
    writer = ControlsWriter(page, IDENTITY)

    def renew(renewal: int) -> None:
        writer.write([Lease("max_running", Scope(), 8, NS, renewal)], nonce)
        path.write_bytes(page)
        path.chmod(0o640)

    path.write_bytes(page)
    path.chmod(0o640)
    return renew


def opened_pages() -> list[str]:
    """Pages that this process has open and others can find."""
    paths = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            paths.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [path for path in paths if ".kvp" in path and "(deleted)" not in path]


def names(case: object) -> str:
    return case if isinstance(case, str) else getattr(case, "__name__", "")


@pytest.mark.parametrize(("owner", "name"), WHILE_OPENING, ids=names)
def test_a_failure_while_opening(
    owner: object,
    name: str,
    environ: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(owner, name, fail)
        hook = StepHook.open(manifest(), environ, VirtualClock())
    assert not hook.enabled
    assert step(hook, 1) == BASELINES
    assert len(caplog.records) == 1
    assert opened_pages() == [], "a page left locked tells of an engine that lives"


@pytest.mark.parametrize(("owner", "name"), WHILE_STEPPING, ids=names)
def test_a_failure_while_stepping(
    owner: object,
    name: str,
    environ: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a lease in force, so that there is something to lose."""
    hook = StepHook.open(manifest(), environ, VirtualClock())
    renew = steered(hook, environ)
    step(hook, 0)
    renew(1)
    assert step(hook, NS // 10) == BASELINES | {"max_running": 8}
    assert hook.enabled
    renew(2)
    with monkeypatch.context() as broken:
        broken.setattr(owner, name, fail)
        step(hook, NS)
        after = step(hook, NS + 1)
    assert after == BASELINES
    assert (hook.enabled, hook.failures) == (False, 1)
    assert step(hook, NS + 2) == BASELINES
    assert len(caplog.records) == 1
    assert "baselines are in force" in caplog.text
    hook.close()


def test_controls_that_cannot_be_read_for_a_while_let_leases_run_out_and_no_more(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An input/output error is weather, not a failure of the hook: it steps on, and obeys again after."""
    hook = StepHook.open(manifest(), environ, VirtualClock())
    renew = steered(hook, environ)
    step(hook, 0)
    renew(1)
    step(hook, NS // 10)

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(HeldReader, "read", failing)
        assert step(hook, NS // 2) == BASELINES | {"max_running": 8}
        assert step(hook, 3 * NS) == BASELINES
    assert hook.enabled
    assert caplog.text.count("Input/output error") == 1
    step(hook, 5 * NS)
    renew(2)
    assert step(hook, 5 * NS + NS // 2) == BASELINES | {"max_running": 8}
    hook.close()


@pytest.mark.parametrize(
    "mistake",
    [
        lambda hook: hook.end_step((1, 2)),
        lambda hook: hook.end_step((1, 2, 3, 4, 5)),
        lambda hook: hook.end_step((1, 2, 3, -4)),
        lambda hook: hook.end_step((1, None, 3, 4)),
        lambda hook: hook.set_class(99, 1, 1),
        lambda hook: hook.set_tenant("acme", -1, 0, 0, 0, 0),
        lambda hook: (hook.itl[0].record("soon"), hook.end_step((1, 2, 3, 4))),
    ],
)
def test_an_engines_mistake_is_no_exception(
    mistake: Callable[[StepHook], object], environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    hook = StepHook.open(manifest(), environ, VirtualClock())
    mistake(hook)
    assert not hook.enabled
    assert step(hook, 1) == BASELINES
    assert len(caplog.records) == 1


def test_a_log_that_fails_is_kept_from_the_engine_too(environ: dict[str, str]) -> None:
    class Full(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("log volume full")

    full = Full()
    logging.getLogger("kvpilot.link").addHandler(full)
    try:
        hook = StepHook.open(manifest(), environ, VirtualClock())
        hook.end_step(())
        assert step(hook, 1) == BASELINES
        assert not StepHook.open(manifest(), {"KVPILOT_ENGINE": "half"}).enabled
    finally:
        logging.getLogger("kvpilot.link").removeHandler(full)


def test_a_second_thread_disables_the_hook(environ: dict[str, str]) -> None:
    hook = StepHook.open(manifest(), environ, VirtualClock())
    step(hook, 1)
    thread = threading.Thread(target=step, args=(hook, 2))
    thread.start()
    thread.join()
    assert not hook.enabled


def test_a_disabled_hook_gives_up_page_and_lock(environ: dict[str, str]) -> None:
    """So that readers see a writer that is gone, not one that is stuck."""
    held = set(locks._held)
    hook = StepHook.open(manifest(), environ, VirtualClock())
    assert locks._held > held
    hook.end_step(())
    assert locks._held == held
    assert opened_pages() == []
