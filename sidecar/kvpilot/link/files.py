"""Pages as files, the writer's side.

A page is created under a temporary name, locked, allocated whole and given its header before it gets its
own name, and it is never resized: nobody ever finds half a page. It is opened exactly once (see `locks`).
"""

import mmap
import os
import re
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from kvpilot.clock import NS, Clock
from kvpilot.link import locks, trust
from kvpilot.link.controls import CONTROLS_BYTES, ControlsWriter
from kvpilot.link.manifest import Manifest
from kvpilot.link.page import HEADER_BYTES, LinkError, PageHeader
from kvpilot.link.place import ENGINE_CONTROLS, VALVE_CONTROLS, LinkPlace, new_nonce, this_process
from kvpilot.link.telemetry import TelemetryWriter, plan_page

KEPT_PAGES = 2
"""Pages of earlier starts that stay for the flight recorder."""


class WritablePage:
    """A page that this process writes: locked and mapped for as long as it is open."""

    def __init__(self, directory: int, fd: int, path: Path, page_bytes: int) -> None:
        self.path = path
        self._directory = directory
        self._fd = fd
        # The map holds a descriptor of its own: closing it early would drop the lock, closing it late
        # would drop the lock of whoever opens the file next. So both are closed together.
        self.buffer = mmap.mmap(fd, page_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def publish(self) -> None:
        """Give the page its name, once its header is written."""
        name = self.path.name
        os.rename(_unnamed(name), name, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def close(self) -> None:
        """Give up the lock; the file stays. The writer over `buffer` must have been closed."""
        self.buffer.close()
        locks.forget(self._fd)
        os.close(self._fd)
        os.close(self._directory)

    def discard(self) -> None:
        """Give up a page that got no name, whatever still looks at it."""
        with suppress(BufferError):
            self.buffer.close()
        locks.forget(self._fd)
        os.close(self._fd)
        with suppress(OSError):
            os.unlink(_unnamed(self.path.name), dir_fd=self._directory)
        os.close(self._directory)


def open_telemetry(
    place: LinkPlace, rank: int, manifest: Manifest, clock: Clock
) -> tuple[TelemetryWriter, WritablePage]:
    """This engine start's page, named, locked and ready. Raises LinkError: no space, no right to write."""
    nonce = new_nonce()
    page_bytes = plan_page(manifest).page_bytes
    page = create_page(place.telemetry_directory(rank), "telemetry", nonce, page_bytes, place.uids)
    try:
        writer = TelemetryWriter(page.buffer, manifest, nonce=nonce, identity=this_process(clock))
        page.publish()
    except BaseException:
        page.discard()
        raise
    return writer, page


def open_controls(place: LinkPlace, rank: int | None, clock: Clock) -> tuple[ControlsWriter, WritablePage]:
    """Controls of one rank, or for None of the valves. Raises LinkError where another pilot holds them."""
    directory = place.controls_directory(rank)
    name = VALVE_CONTROLS if rank is None else ENGINE_CONTROLS
    handle = trust.open_directory(directory, place.uids, create=True)
    try:
        page = _lock_controls(handle, directory / name, place.uids)
    except BaseException:
        os.close(handle)
        raise
    return ControlsWriter(page.buffer, this_process(clock)), page


def _lock_controls(handle: int, path: Path, uids: frozenset[int]) -> WritablePage:
    with suppress(FileExistsError):
        fd = _create(handle, path.name, path.parent)
        _adopt(fd, handle)
        os.close(fd)
    fd = trust.open_page(handle, path.name, uids, os.O_RDWR)
    try:
        if not locks.lock(fd):
            raise LinkError(f"{path}: held by another pilot ({_holder(fd)}): stop that one first")
        if os.fstat(fd).st_size != CONTROLS_BYTES:
            # Another format, or a crash at birth. Nobody maps this file but its writer, which we are now.
            os.ftruncate(fd, 0)
            _reserve(fd, CONTROLS_BYTES, path.parent)
        return WritablePage(handle, fd, path, CONTROLS_BYTES)
    except BaseException:
        locks.forget(fd)
        os.close(fd)
        raise


def _holder(fd: int) -> str:
    """What is known of the pilot that holds a controls page."""
    pid = locks.holder_pid(fd)
    known = [] if pid is None else [f"pid {pid}"]
    with suppress(LinkError):
        identity = PageHeader.unpack(os.pread(fd, HEADER_BYTES, 0), "controls").identity
        container = f" in container {identity.container}" if identity.container else ""
        since = datetime.fromtimestamp(identity.start_wall_ns / NS, UTC).isoformat(" ", "seconds")
        known = [f"host {identity.host}{container}", *known, f"since {since}"]
    return ", ".join(known) or "unknown"


def create_page(
    directory: Path, prefix: str, nonce: int, page_bytes: int, uids: frozenset[int]
) -> WritablePage:
    """A new locked page `<prefix>-<nonce>.kvp`, all zero and still unnamed: write it, then `publish`.

    Pages of dead writers go, save the newest KEPT_PAGES. Raises LinkError.
    """
    handle = trust.open_directory(directory, uids, create=True)
    try:
        _drop_old_pages(handle, prefix, uids)
        return _allocate(handle, directory / f"{prefix}-{nonce:016x}.kvp", page_bytes)
    except BaseException:
        os.close(handle)
        raise


def _allocate(handle: int, path: Path, page_bytes: int) -> WritablePage:
    name = _unnamed(path.name)
    fd = _create(handle, name, path.parent)
    try:
        _adopt(fd, handle)
        if not locks.lock(fd):
            raise LinkError(f"link page {path}: cannot be locked")
        _reserve(fd, page_bytes, path.parent)
        return WritablePage(handle, fd, path, page_bytes)
    except BaseException:
        locks.forget(fd)
        os.close(fd)
        with suppress(OSError):
            os.unlink(name, dir_fd=handle)
        raise


def _unnamed(name: str) -> str:
    return f".{name}.new"


def _create(handle: int, name: str, directory: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, trust.FILE_MODE, dir_fd=handle)
    except FileExistsError:
        raise
    except OSError as error:
        raise LinkError(
            f"link directory {directory}: {error.strerror}: make it writable for this user"
        ) from error


def _adopt(fd: int, handle: int) -> None:
    """Mode and group as readers expect them, whatever umask and primary group say."""
    os.fchmod(fd, trust.FILE_MODE)
    with suppress(PermissionError):
        os.fchown(fd, -1, os.fstat(handle).st_gid)


def _reserve(fd: int, page_bytes: int, directory: Path) -> None:
    """All of the page's memory now: a store into a hole of a full volume would kill the process later."""
    try:
        os.posix_fallocate(fd, 0, page_bytes)
    except OSError as error:
        raise LinkError(
            f"link directory {directory}: {page_bytes} bytes: {error.strerror}: raise the volume's size limit"
        ) from error


def _drop_old_pages(handle: int, prefix: str, uids: frozenset[int]) -> None:
    """Remove what dead writers left: unfinished pages, and finished ones save the newest KEPT_PAGES."""
    finished = re.compile(rf"{prefix}-[0-9a-f]{{16}}\.kvp")
    unfinished = re.compile(rf"\.{prefix}-[0-9a-f]{{16}}\.kvp\.new")
    dead: list[tuple[int, str]] = []
    for name in os.listdir(handle):
        if not (finished.fullmatch(name) or unfinished.fullmatch(name)):
            continue
        with suppress(OSError, LinkError):
            fd = trust.open_page(handle, name, uids, os.O_RDONLY)
            try:
                if locks.is_locked(fd):
                    continue
                started_ns = _started_wall_ns(fd, prefix) if finished.fullmatch(name) else 0
                dead.append((started_ns, name))
            finally:
                os.close(fd)
    for position, (started_ns, name) in enumerate(sorted(dead, reverse=True)):
        if position >= KEPT_PAGES or not started_ns:
            with suppress(OSError):
                os.unlink(name, dir_fd=handle)


def _started_wall_ns(fd: int, prefix: str) -> int:
    """When the page's writer started; 0 where the page cannot be read, so that it goes first."""
    kind = "valve" if prefix == "valve" else "telemetry"
    try:
        return PageHeader.unpack(os.pread(fd, HEADER_BYTES, 0), kind).identity.start_wall_ns  # type: ignore[arg-type]
    except LinkError:
        return 0
