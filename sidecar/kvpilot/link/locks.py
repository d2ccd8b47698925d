"""Who is alive and who may write: POSIX record locks on the writer's own file.

The kernel releases a lock when its process dies, across containers. Readers only ask, with F_GETLK. Beware:
closing *any* descriptor of a file drops every lock that the process has on it. So a writer opens its file
exactly once, and a process never opens for reading what it writes itself (`check_not_ours` makes that one
clear error).
"""

import fcntl
import os
import struct

from kvpilot.link.page import LinkError

# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid, padding.
_FLOCK = struct.Struct("@hhqqi4x")

_held: set[tuple[int, int, int]] = set()
"""(process, device, inode) of files that this process has locked."""


def _key(status: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), status.st_dev, status.st_ino


def lock(fd: int) -> bool:
    """Become the one writer of `fd`. False where another process is, or this one already."""
    key = _key(os.fstat(fd))
    if key in _held:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    _held.add(key)
    return True


def forget(fd: int) -> None:
    """To be called just before the only descriptor of a locked file is closed."""
    _held.discard(_key(os.fstat(fd)))


def is_locked(fd: int) -> bool:
    """Whether another process holds the file: its writer is alive."""
    return _asked(fd)[0] != fcntl.F_UNLCK


def holder_pid(fd: int) -> int | None:
    """The holder's pid as seen from here; None for nobody, or a holder in another pid namespace."""
    kind, _, _, _, pid = _asked(fd)
    return pid if kind != fcntl.F_UNLCK and pid > 0 else None


def _asked(fd: int) -> tuple[int, int, int, int, int]:
    wish = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, whence, start, length, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, wish))
    return kind, whence, start, length, pid


def check_not_ours(status: os.stat_result, name: str) -> None:
    """Raises LinkError where this process writes the file itself: a second one would lose the lock."""
    if _key(status) in _held:
        raise LinkError(f"{name}: this process writes it itself and must not open it twice")
