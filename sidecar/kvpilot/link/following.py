"""Pages as files, the reader's side: `pread` only, no lock taken, nothing mapped.

Telemetry readers follow the newest page whose writer lives. A controls reader follows one name through
replacement of the file, looking at most once a second.
"""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvpilot.clock import NS
from kvpilot.link import locks, trust
from kvpilot.link.controls import CONTROLS_BYTES
from kvpilot.link.held_read import HeldReader
from kvpilot.link.page import HEADER_BYTES, LinkError, PageHeader, PageKind

RECHECK_NS = 1 * NS


@dataclass(slots=True)
class ReadablePage:
    """Another process's page, open for reading."""

    path: Path
    header: PageHeader
    _fd: int

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset`; fewer where the page is shorter."""
        return os.pread(self._fd, size, offset)

    def is_locked(self) -> bool:
        """Whether its writer is alive."""
        return locks.is_locked(self._fd)

    def close(self) -> None:
        """Done reading."""
        os.close(self._fd)


def open_pages(
    directory: Path, kind: PageKind, uids: frozenset[int], *, locked: bool, leave_out: str | None = None
) -> list[ReadablePage]:
    """Pages of `kind` (telemetry, valve) in `directory`, newest start first; `locked`: of live writers.

    `leave_out` names a file that is not opened. A directory that is not there yet holds none. Raises
    LinkError where there are pages, none of them usable.
    """
    try:
        handle = trust.open_directory(directory, uids)
    except FileNotFoundError:
        return []
    pages: list[ReadablePage] = []
    problem: LinkError | None = None
    try:
        for name in os.listdir(handle):
            if name == leave_out or not re.fullmatch(rf"{kind}-[0-9a-f]{{16}}\.kvp", name):
                continue
            try:
                page = _open(handle, directory / name, kind, uids, locked=locked)
            except FileNotFoundError:
                continue
            except LinkError as error:
                problem = error
                continue
            if page is not None:
                pages.append(page)
    finally:
        os.close(handle)
    if problem is not None and not pages:
        raise problem
    return sorted(pages, key=lambda page: page.header.identity.start_wall_ns, reverse=True)


def _open(
    handle: int, path: Path, kind: PageKind, uids: frozenset[int], *, locked: bool
) -> ReadablePage | None:
    fd = trust.open_page(handle, path.name, uids, os.O_RDONLY)
    try:
        if locked and not locks.is_locked(fd):
            os.close(fd)
            return None
        header = PageHeader.unpack(os.pread(fd, HEADER_BYTES, 0), kind)
    except LinkError as error:
        os.close(fd)
        raise LinkError(f"{path}: {error}") from error
    return ReadablePage(path, header, fd)


def newest_telemetry(directory: Path, uids: frozenset[int]) -> ReadablePage | None:
    """The newest page whose engine lives; None where there is none yet. Raises as `open_pages` does."""
    pages = open_pages(directory, "telemetry", uids, locked=True)
    for page in pages[1:]:
        page.close()
    return pages[0] if pages else None


class ControlsFile:
    """Reads one controls page by name, into the same buffer each time."""

    def __init__(self, path: Path, uids: frozenset[int]) -> None:
        self.path = path
        self.error: str | None = None
        """One line about why the file is not used; None while it is, or while there is none."""
        self.absent_since_ns: int | None = None
        """When a look first found no file; None while there is one."""
        self._uids = uids
        self._fd: int | None = None
        self._identity: tuple[int, int] | None = None
        self._check_ns: int | None = None
        self._reader = HeldReader(CONTROLS_BYTES)
        self._page = self._reader.view

    def read(self, now_ns: int) -> memoryview | None:
        """The page as it is now: one bounded read. None where there is no file that can be used."""
        if self._check_ns is None or now_ns >= self._check_ns:
            self._check_ns = now_ns + RECHECK_NS
            self._follow(now_ns)
        if self._fd is None:
            return None
        try:
            size = self._reader.read(self._fd)
        except OSError as error:
            # Weather, not a bug of ours: leases run out meanwhile, and the next look opens the file anew.
            self._give_up(error)
            return None
        return self._page if size == CONTROLS_BYTES else self._page[:size]

    def _follow(self, now_ns: int) -> None:
        """Open the file that now has the name, if it is another one than before."""
        absent_since_ns, self.absent_since_ns = self.absent_since_ns, None
        try:
            status = os.stat(self.path, follow_symlinks=False)
            if (status.st_dev, status.st_ino) == self._identity:
                return
            self.close()
            self._fd = self._open()
            status = os.fstat(self._fd)
            self._identity = (status.st_dev, status.st_ino)
            self.error = None
        except FileNotFoundError:
            self.close()
            self.error = None
            self.absent_since_ns = now_ns if absent_since_ns is None else absent_since_ns
        except (LinkError, OSError) as error:
            self._give_up(error)

    def _give_up(self, error: LinkError | OSError) -> None:
        self.close()
        self.error = f"{self.path}: {error.strerror}" if isinstance(error, OSError) else str(error)

    def _open(self) -> int:
        handle = trust.open_directory(self.path.parent, self._uids)
        try:
            return trust.open_page(handle, self.path.name, self._uids, os.O_RDONLY)
        finally:
            os.close(handle)

    def close(self) -> None:
        """Close the file; a later `read` finds it again."""
        if self._fd is not None:
            with suppress(OSError):
                os.close(self._fd)
        self._fd = None
        self._identity = None
