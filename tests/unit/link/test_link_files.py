"""Pages as files, within one process: names, modes, trust, space, what is kept."""

import errno
import os
import stat
from pathlib import Path

import pytest
from link_pages import IDENTITY, manifest

from kvpilot.clock import VirtualClock
from kvpilot.link import locks
from kvpilot.link.controls import CONTROLS_BYTES, ControlsWriter, Lease, LeaseBook, Scope
from kvpilot.link.files import KEPT_PAGES, create_page, open_controls, open_telemetry
from kvpilot.link.following import ControlsFile, newest_telemetry, open_pages
from kvpilot.link.held_read import HeldReader
from kvpilot.link.page import LinkError
from kvpilot.link.place import LinkPlace
from kvpilot.link.trust import open_directory, open_page, trusted_uids

NS = 10**9
UIDS = frozenset({os.geteuid()})


@pytest.fixture
def place(tmp_path: Path) -> LinkPlace:
    (tmp_path / "telemetry").mkdir()
    (tmp_path / "controls").mkdir()
    return LinkPlace(tmp_path / "telemetry", tmp_path / "controls", "engine", UIDS)


def place_from(**environ: str) -> LinkPlace | None:
    return LinkPlace.from_environ(environ)


def test_the_environment_names_the_place() -> None:
    place = place_from(
        KVPILOT_TELEMETRY="/t", KVPILOT_CONTROLS="/c", KVPILOT_ENGINE="llama", KVPILOT_UIDS="7,8"
    )
    assert place is not None
    assert place.telemetry_directory(3) == Path("/t/llama-3")
    assert place.controls_directory(None) == Path("/c/llama")
    assert place.uids == {7, 8}
    assert place_from() is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"KVPILOT_TELEMETRY": "/t"}, "KVPILOT_CONTROLS and KVPILOT_ENGINE not set"),
        (
            {"KVPILOT_TELEMETRY": "/t", "KVPILOT_CONTROLS": "/c", "KVPILOT_ENGINE": "../x"},
            "engine name '../x'",
        ),
        (
            {
                "KVPILOT_TELEMETRY": "/t",
                "KVPILOT_CONTROLS": "/c",
                "KVPILOT_ENGINE": "e",
                "KVPILOT_UIDS": "me",
            },
            "KVPILOT_UIDS=me: user ids separated by commas",
        ),
    ],
)
def test_half_a_place_is_one_clear_line(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LinkError, match=message):
        place_from(**environ)


def test_unless_told_otherwise_only_our_own_pages_and_roots_are_believed() -> None:
    assert trusted_uids({}) == {os.geteuid(), 0}


def test_modes_are_those_promised_whatever_the_umask(place: LinkPlace) -> None:
    before = os.umask(0o077)
    try:
        writer, page = open_telemetry(place, 0, manifest(), VirtualClock())
    finally:
        os.umask(before)
    assert stat.S_IMODE(page.path.stat().st_mode) == 0o640
    assert stat.S_IMODE(page.path.parent.stat().st_mode) & 0o777 == 0o750
    assert page.path.stat().st_gid == page.path.parent.stat().st_gid
    assert page.path.name == f"telemetry-{writer.nonce:016x}.kvp"
    writer.close()
    page.close()


def test_a_page_has_no_name_before_its_header_is_written(place: LinkPlace) -> None:
    page = create_page(place.telemetry_directory(0), "telemetry", 1, 4096, UIDS)
    assert not page.path.exists()
    page.publish()
    assert [path.name for path in page.path.parent.iterdir()] == [page.path.name]
    page.close()


def test_pages_of_earlier_starts_are_kept_but_only_the_newest(place: LinkPlace) -> None:
    clock = VirtualClock()
    nonces = []
    for _ in range(5):
        writer, page = open_telemetry(place, 0, manifest(), clock)
        nonces.append(writer.nonce)
        writer.close()
        page.close()
        clock.advance(60)
    kept = {path.name for path in place.telemetry_directory(0).iterdir()}
    assert kept == {f"telemetry-{nonce:016x}.kvp" for nonce in nonces[-KEPT_PAGES - 1 :]}


def test_what_a_writer_left_half_made_is_removed_by_the_next(place: LinkPlace) -> None:
    page = create_page(place.telemetry_directory(0), "telemetry", 1, 4096, UIDS)
    page.close()
    writer, page = open_telemetry(place, 0, manifest(), VirtualClock())
    assert [path.name for path in page.path.parent.iterdir()] == [page.path.name]
    writer.close()
    page.close()


def test_no_space_is_one_clear_line_and_leaves_nothing_behind(
    place: LinkPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(LinkError, match="No space left on device: raise the volume's size limit"):
        open_telemetry(place, 0, manifest(), VirtualClock())
    assert list(place.telemetry_directory(0).iterdir()) == []
    assert not locks._held


def test_a_missing_volume_is_one_clear_line(tmp_path: Path) -> None:
    place = LinkPlace(tmp_path / "nowhere", tmp_path, "engine", UIDS)
    with pytest.raises(LinkError, match="nowhere does not exist: create it or mount it"):
        open_telemetry(place, 0, manifest(), VirtualClock())


def test_a_process_may_not_open_what_it_writes(place: LinkPlace) -> None:
    """Closing the second descriptor would silently drop the writer's lock."""
    writer, page = open_telemetry(place, 0, manifest(), VirtualClock())
    with pytest.raises(LinkError, match="this process writes it itself"):
        open_pages(place.telemetry_directory(0), "telemetry", UIDS, locked=True)
    controls = open_controls(place, 0, VirtualClock())
    with pytest.raises(LinkError, match="this process writes it itself"):
        open_controls(place, 0, VirtualClock())
    for opened in (controls, (writer, page)):
        opened[0].close()
        opened[1].close()


def test_readers_of_live_pages_pass_over_the_dead(place: LinkPlace) -> None:
    writer, page = open_telemetry(place, 0, manifest(), VirtualClock())
    writer.close()
    page.close()
    assert newest_telemetry(place.telemetry_directory(0), UIDS) is None
    dead = open_pages(place.telemetry_directory(0), "telemetry", UIDS, locked=False)
    assert [p.path for p in dead] == [page.path]
    assert dead[0].read_at(0, 8) == b"kvpilot\0"
    dead[0].close()


def test_an_absent_engine_is_no_error(place: LinkPlace) -> None:
    assert newest_telemetry(place.telemetry_directory(7), UIDS) is None


class Planted:
    """A page of someone else's making in a rank's directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.path = directory / "controls.kvp"

    def regular(self, mode: int = 0o640) -> None:
        page = bytearray(CONTROLS_BYTES)
        ControlsWriter(page, IDENTITY).write([Lease("max_running", Scope(), 1, NS, 1)], 5)
        self.path.write_bytes(page)
        self.path.chmod(mode)

    def others_may_write(self) -> None:
        self.regular(0o646)

    def directory_others_may_write(self) -> None:
        self.regular()
        self.directory.chmod(0o757)

    def symbolic_link(self) -> None:
        self.regular()
        self.path.rename(self.directory / "elsewhere")
        self.path.symlink_to(self.directory / "elsewhere")

    def fifo(self) -> None:
        os.mkfifo(self.path, 0o640)

    def folder(self) -> None:
        self.path.mkdir()


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        ("others_may_write", "controls.kvp: writable by others"),
        ("directory_others_may_write", "engine-0: writable by others"),
        ("symbolic_link", "controls.kvp: Too many levels of symbolic links"),
        ("fifo", "controls.kvp: not a regular file"),
        ("folder", "controls.kvp: not a regular file"),
    ],
)
def test_what_cannot_be_trusted_is_not_read(place: LinkPlace, plant: str, message: str) -> None:
    planted = Planted(place.controls_directory(0))
    getattr(planted, plant)()
    file = ControlsFile(planted.path, UIDS)
    assert file.read(0) is None
    assert file.error is not None
    assert message in file.error


def test_a_page_of_an_unknown_owner_is_not_read(place: LinkPlace) -> None:
    planted = Planted(place.controls_directory(0))
    planted.regular()
    stranger = frozenset({os.geteuid() + 1})
    file = ControlsFile(planted.path, stranger)
    assert file.read(0) is None
    assert f"owned by uid {os.geteuid()}, which is not trusted: name it in KVPILOT_UIDS" in (file.error or "")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs to change a file's group")
def test_a_page_of_another_group_is_not_read(place: LinkPlace) -> None:
    planted = Planted(place.controls_directory(0))
    planted.regular()
    os.chown(planted.path, -1, 4242)
    directory = open_directory(planted.directory, UIDS)
    with pytest.raises(LinkError, match="its group is not that of its directory"):
        open_page(directory, planted.path.name, UIDS, os.O_RDONLY)
    os.close(directory)


def test_a_controls_file_is_followed_through_replacement_once_a_second(place: LinkPlace) -> None:
    planted = Planted(place.controls_directory(0))
    file = ControlsFile(planted.path, UIDS)
    assert file.read(0) is None
    assert file.error is None, "no pilot yet is no error"
    planted.regular()
    assert file.read(NS - 1) is None
    first = file.read(NS)
    assert first is not None
    sequence = LeaseBook(5)
    sequence.observe(first, 0)
    planted.path.unlink()
    planted.path.write_bytes(b"short")
    planted.path.chmod(0o640)
    assert file.read(NS + 1) is not None
    assert bytes(file.read(2 * NS) or b"") == b"short"
    planted.path.unlink()
    assert file.read(3 * NS) is None
    file.close()


def test_a_controls_page_cut_short_under_its_reader_reads_short(place: LinkPlace) -> None:
    """A mapped page would kill the engine here."""
    planted = Planted(place.controls_directory(0))
    planted.regular()
    file = ControlsFile(planted.path, UIDS)
    assert len(file.read(0) or b"") == CONTROLS_BYTES
    os.truncate(planted.path, 10)
    assert bytes(file.read(1) or b"") == planted.path.read_bytes()
    file.close()


def test_a_read_that_fails_once_is_an_error_until_the_file_is_opened_anew(
    place: LinkPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = Planted(place.controls_directory(0))
    planted.regular()
    file = ControlsFile(planted.path, UIDS)
    assert file.read(0) is not None

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(HeldReader, "read", failing)
        assert file.read(1) is None
    assert file.error == f"{planted.path}: Input/output error"
    assert len(file.read(NS) or b"") == CONTROLS_BYTES
    assert file.error is None
    file.close()


def test_controls_of_another_size_are_made_anew(place: LinkPlace) -> None:
    Planted(place.controls_directory(0)).path.write_bytes(b"an older format")
    writer, page = open_controls(place, 0, VirtualClock())
    assert writer.write([], 1) == 1
    assert page.path.stat().st_size == CONTROLS_BYTES
    writer.close()
    page.close()


def test_controls_are_taken_over_with_their_count(place: LinkPlace) -> None:
    for expected in (1, 2, 3):
        writer, page = open_controls(place, None, VirtualClock())
        assert page.path.name == "valve.kvp"
        assert writer.write([]) == expected
        writer.close()
        page.close()
