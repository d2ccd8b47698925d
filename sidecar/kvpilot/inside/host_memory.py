"""How much memory the machine, or the container's limit, still has to give: what the out-of-memory killer
acts on, which no engine looks at.

Files are opened once and read again in some ten microseconds: fit for a step loop, now and then.
"""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kvpilot.link.held_read import HeldReader

_READ_BYTES = 8_192
_UNLIMITED = 1 << 60
"""Where a version 1 control group says no limit, it says a number near 2^63."""


class _Names(NamedTuple):
    """Files of one version of control groups."""

    limit: str
    used: str
    reclaimable: bytes


_V2 = _Names("memory.max", "memory.current", b"inactive_file ")
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file ")


class HostMemory:
    """Reads the files of `root` (a whole file system, for tests)."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._machine = _open(root / "proc/meminfo")
        self._groups: list[tuple[int, int, int, bytes]] = []
        for folder, names in _groups(root):
            files = [_open(folder / name) for name in (names.limit, names.used, "memory.stat")]
            limit, used, stat = files
            if limit is not None and used is not None and stat is not None:
                self._groups.append((limit, used, stat, names.reclaimable))
            else:
                _close(files)

    @classmethod
    def open(cls, root: Path = Path("/")) -> "HostMemory | None":
        """None where neither the machine nor a limit can be read."""
        host = cls(root)
        if host.available_bytes() is None:
            host.close()
            return None
        return host

    def available_bytes(self) -> int | None:
        """The least of what the machine and each enclosing limit can still give; None where neither says.

        File cache that the kernel would give up first counts as available.
        """
        found = []
        if self._machine is not None:
            kib = _number(_read(self._machine), b"MemAvailable:")
            if kib is not None:
                found.append(kib * 1024)
        for limit_file, used_file, stat_file, reclaimable in self._groups:
            limit, used = _read(limit_file).strip(), _read(used_file).strip()
            if limit.isdigit() and used.isdigit() and int(limit) < _UNLIMITED:
                spare = _number(_read(stat_file), reclaimable) or 0
                found.append(max(0, int(limit) - int(used) + spare))
        return min(found, default=None)

    def close(self) -> None:
        """Close the files."""
        _close([self._machine, *(fd for group in self._groups for fd in group[:3])])
        self._machine, self._groups = None, []


def _groups(root: Path) -> list[tuple[Path, _Names]]:
    """This process's control groups and those around it, as far as they are visible."""
    text = ""
    with suppress(OSError):
        text = (root / "proc/self/cgroup").read_text()
    folders = []
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            folders += [(folder, _V2) for folder in _upwards(root / "sys/fs/cgroup", path)]
        elif "memory" in controllers.split(","):
            folders += [(folder, _V1) for folder in _upwards(root / "sys/fs/cgroup/memory", path)]
    return folders


def _upwards(mount: Path, path: str) -> list[Path]:
    """The group's folder and its parents up to the mount: in a container often the mount alone is there."""
    parts = [part for part in path.split("/") if part and part != ".."]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


_reader = HeldReader(_READ_BYTES)


def _read(fd: int) -> bytes:
    try:
        return bytes(_reader.view[: _reader.read(fd)])
    except OSError:
        return b""


def _number(text: bytes, name: bytes) -> int | None:
    found = re.search(rb"^" + re.escape(name) + rb"\s*(\d+)", text, re.MULTILINE)
    return None if found is None else int(found.group(1))


def _close(files: "list[int | None]") -> None:
    for fd in files:
        if fd is not None:
            with suppress(OSError):
                os.close(fd)
