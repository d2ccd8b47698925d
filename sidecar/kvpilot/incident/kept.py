"""Which pages one rank's directory keeps: the newest start and those before it."""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvpilot.link import locks, trust
from kvpilot.link.ending import Ending
from kvpilot.link.page import LinkError
from kvpilot.link.telemetry import TelemetryReader

_NAME = re.compile(r"telemetry-([0-9a-f]{16})\.kvp")


@dataclass(frozen=True, slots=True)
class KeptPage:
    """One page; of one that cannot be read only `name`, `nonce` and `problem` are known."""

    name: str
    nonce: int
    problem: str | None = None
    alive: bool = False
    engine: str = ""
    start_wall_ns: int = 0
    last_wall_ns: int | None = None
    """Wall time of the last sign of life; None before the first step."""
    steps: int | None = None
    """Steps since start, as the newest record says."""
    ending: Ending | None = None


def kept_pages(directory: Path, uids: frozenset[int]) -> list[KeptPage]:
    """Newest start first, those that cannot be read at the end. Raises LinkError for the directory itself."""
    try:
        handle = trust.open_directory(directory, uids)
    except FileNotFoundError:
        return []
    try:
        found = [_look(handle, name, uids) for name in os.listdir(handle) if _NAME.fullmatch(name)]
    finally:
        os.close(handle)
    return sorted((page for page in found if page is not None), key=lambda page: -page.start_wall_ns)


def _look(handle: int, name: str, uids: frozenset[int]) -> KeptPage | None:
    """What the page says of itself; None where it has gone meanwhile."""
    nonce = int(name.removeprefix("telemetry-").removesuffix(".kvp"), 16)
    try:
        fd = trust.open_page(handle, name, uids, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except LinkError as error:
        return KeptPage(name, nonce, str(error))
    try:
        return _describe(fd, name, nonce)
    except LinkError as error:
        return KeptPage(name, nonce, f"{name}: {error}")
    finally:
        with suppress(OSError):
            os.close(fd)


def _describe(fd: int, name: str, nonce: int) -> KeptPage:
    reader = TelemetryReader(lambda offset, size: os.pread(fd, size, offset))
    identity, manifest = reader.identity, reader.manifest
    newest = reader.poll(limit=1)
    last_ns = newest[-1].get("time_ns") if newest else None
    steps = newest[-1].get("steps_total") if newest else None
    return KeptPage(
        name=name,
        nonce=nonce,
        alive=locks.is_locked(fd),
        engine=f"{manifest.engine} {manifest.engine_version}, {manifest.model}",
        start_wall_ns=identity.start_wall_ns,
        last_wall_ns=None
        if last_ns is None
        else identity.start_wall_ns + int(last_ns) - identity.start_monotonic_ns,
        steps=None if steps is None else int(steps),
        ending=reader.ending(),
    )
