"""Which directories and files the link believes.

Anyone who can write a page can move an engine, so a page must be a regular file, reached through no
symbolic link, in a directory of its own, neither of them writable by others; its owner one of `uids`, its
group the directory's.
"""

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from kvpilot.link.locks import check_not_ours
from kvpilot.link.page import LinkError

ENVIRON_UIDS = "KVPILOT_UIDS"
FILE_MODE = 0o640
_DIRECTORY_MODE = 0o750


def trusted_uids(environ: Mapping[str, str]) -> frozenset[int]:
    """Owners whose pages are believed: KVPILOT_UIDS (`1000,65532`), else this process's own uid and root."""
    text = environ.get(ENVIRON_UIDS, "")
    if not text:
        return frozenset({os.geteuid(), 0})
    try:
        return frozenset(int(uid) for uid in text.split(","))
    except ValueError:
        raise LinkError(f"{ENVIRON_UIDS}={text}: user ids separated by commas, such as 1000,65532") from None


def open_directory(path: Path, uids: frozenset[int], *, create: bool = False) -> int:
    """A descriptor of the directory. Raises FileNotFoundError, or LinkError where it cannot be trusted."""
    if create:
        _make_directory(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LinkError(f"link directory {path}: {error.strerror}") from error
    status = os.fstat(fd)
    problem = _problem(status, uids)
    if problem:
        os.close(fd)
        raise LinkError(f"link directory {path}: {problem}")
    return fd


def _make_directory(path: Path) -> None:
    try:
        os.mkdir(path, _DIRECTORY_MODE)
        # The umask may have taken the group's bits away; what the parent hands down (setgid) stays.
        os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | _DIRECTORY_MODE)
    except FileExistsError:
        pass
    except FileNotFoundError:
        raise LinkError(f"link directory {path.parent} does not exist: create it or mount it") from None
    except OSError as error:
        raise LinkError(f"link directory {path}: {error.strerror}: make {path.parent} writable") from error


def open_page(directory: int, name: str, uids: frozenset[int], flags: int) -> int:
    """A descriptor of a page in `directory`. Raises FileNotFoundError, or LinkError if it is not trusted."""
    with suppress(FileNotFoundError):
        check_not_ours(os.stat(name, dir_fd=directory, follow_symlinks=False), name)
    try:
        # O_NONBLOCK: a fifo in the page's place must not hang us; it has no effect on regular files.
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, FILE_MODE, dir_fd=directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LinkError(f"link page {name}: {error.strerror}") from error
    status = os.fstat(fd)
    problem = "not a regular file" if not stat.S_ISREG(status.st_mode) else _problem(status, uids)
    if not problem and status.st_gid != os.fstat(directory).st_gid:
        problem = "its group is not that of its directory"
    if problem:
        os.close(fd)
        raise LinkError(f"link page {name}: {problem}")
    return fd


def _problem(status: os.stat_result, uids: frozenset[int]) -> str | None:
    if status.st_mode & stat.S_IWOTH:
        return "writable by others: take that right away (chmod o-w)"
    if status.st_uid not in uids:
        return f"owned by uid {status.st_uid}, which is not trusted: name it in {ENVIRON_UIDS}"
    return None
