"""One telemetry page, read whole: every step it still holds, whether its engine lives, and how that ended.

A page may be torn, cut short or damaged: what is not whole is left out, and counted. Nothing here maps a
file or waits for anybody.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvpilot.clock import NS
from kvpilot.link import locks, trust
from kvpilot.link.ending import Ending
from kvpilot.link.manifest import Manifest
from kvpilot.link.page import Identity, LinkError
from kvpilot.link.records import StepRecord
from kvpilot.link.telemetry import ClassRow, TelemetryReader, TenantRow
from kvpilot.link.telemetry_page import PAGE_MAX_BYTES

_PLAUSIBLE_NS = 86_400 * NS
"""A word without a checksum that is further than this from the last record is damage."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A page as it was when it was read. Times are the engine's monotonic clock, in ns."""

    path: Path
    manifest: Manifest
    identity: Identity
    nonce: int
    alive: bool
    """Whether the engine held the page's lock. Nobody holds that of a copy."""
    copied: bool
    """Whether the page was named as a file: then nobody knows whether its engine lives."""
    steps: tuple[StepRecord, ...]
    """Oldest first, at most 16,384. Those of duration 0 tell what moved between two steps."""
    torn: int
    """Records that the ring should hold and that are not whole."""
    boundary_ns: int | None
    """The last step boundary, where it can be believed."""
    ending: Ending | None
    classes: tuple[ClassRow, ...]
    tenants: tuple[TenantRow, ...]

    def wall_ns(self, at_ns: float) -> int:
        """Wall time of a moment on the engine's clock, by the pair of times that it wrote at its start."""
        return self.identity.start_wall_ns + round(at_ns) - self.identity.start_monotonic_ns

    @property
    def last_record_ns(self) -> int | None:
        """When the newest record was written."""
        time_ns = self.steps[-1].get("time_ns") if self.steps else None
        return None if time_ns is None else int(time_ns)

    @property
    def last_sign_ns(self) -> int | None:
        """The last moment at which the engine is known to have lived; None where it never stepped."""
        said_ns = (self.ending.at_ns or None) if self.ending else None
        return max((at for at in (self.last_record_ns, self.boundary_ns, said_ns) if at), default=None)


def read_file(path: Path) -> Recording:
    """A page named by a person: a copy, perhaps. Raises LinkError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise LinkError(f"{path}: {error.strerror}") from error
    return _read(fd, path, copied=True)


def read_kept(directory: Path, name: str, uids: frozenset[int]) -> Recording:
    """A page of the link's own directory. Raises LinkError, FileNotFoundError."""
    handle = trust.open_directory(directory, uids)
    try:
        fd = trust.open_page(handle, name, uids, os.O_RDONLY)
    finally:
        os.close(handle)
    return _read(fd, directory / name, copied=False)


def _read(fd: int, path: Path, *, copied: bool) -> Recording:
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise LinkError(f"{path}: not a file")
        alive = locks.is_locked(fd)
        data = os.pread(fd, PAGE_MAX_BYTES, 0)
    except OSError as error:
        raise LinkError(f"{path}: {error.strerror}") from error
    finally:
        os.close(fd)
    try:
        return recording(data, path, alive=alive, copied=copied and not alive)
    except LinkError as error:
        raise LinkError(f"{path}: {error}") from error


def recording(data: bytes, path: Path, *, alive: bool, copied: bool) -> Recording:
    """The recording in a page's bytes. Raises LinkError where there is none."""
    reader = TelemetryReader(lambda offset, size: data[offset : offset + size])
    steps = tuple(reader.ring())
    expected = steps[-1].sequence - max(0, steps[-1].sequence - reader.record_count) if steps else 0
    return Recording(
        path=path,
        manifest=reader.manifest,
        identity=reader.identity,
        nonce=reader.nonce,
        alive=alive,
        copied=copied,
        steps=steps,
        torn=expected - len(steps),
        boundary_ns=_believed(reader.boundary_ns(), steps[-1] if steps else {}, reader.identity),
        ending=reader.ending(),
        classes=reader.classes(),
        tenants=reader.tenants(),
    )


def _believed(at_ns: int | None, last: Mapping[str, float] | StepRecord, identity: Identity) -> int | None:
    known_ns = last.get("time_ns") or identity.start_monotonic_ns
    if at_ns is None or not -_PLAUSIBLE_NS < at_ns - known_ns < _PLAUSIBLE_NS:
        return None
    return at_ns
