"""Where one engine's pages lie, whose pages are believed there, and who we are.

<telemetry>/<engine>-<rank>/telemetry-<nonce>.kvp     <controls>/<engine>-<rank>/controls.kvp
<telemetry>/<engine>/valve-<nonce>.kvp                <controls>/<engine>/valve.kvp
"""

import re
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvpilot.clock import Clock
from kvpilot.link.page import Identity, LinkError
from kvpilot.link.trust import trusted_uids

ENVIRON_TELEMETRY = "KVPILOT_TELEMETRY"
ENVIRON_CONTROLS = "KVPILOT_CONTROLS"
ENVIRON_ENGINE = "KVPILOT_ENGINE"
ENGINE_CONTROLS = "controls.kvp"
VALVE_CONTROLS = "valve.kvp"

_ENGINE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class LinkPlace:
    """The two directories, the engine's name, and the owners whose pages are believed."""

    telemetry: Path
    controls: Path
    engine: str
    uids: frozenset[int]

    def __post_init__(self) -> None:
        if not _ENGINE_NAME.fullmatch(self.engine):
            raise LinkError(f"engine name {self.engine!r}: at most 63 letters, digits, '.', '_' and '-'")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "LinkPlace | None":
        """The place that the environment names; None where it names none. Raises LinkError for half."""
        names = (ENVIRON_TELEMETRY, ENVIRON_CONTROLS, ENVIRON_ENGINE)
        missing = [name for name in names if not environ.get(name)]
        if len(missing) == len(names):
            return None
        if missing:
            raise LinkError(f"{' and '.join(missing)} not set: set all of {', '.join(names)}, or none")
        telemetry, controls, engine = (environ[name] for name in names)
        return cls(Path(telemetry), Path(controls), engine, trusted_uids(environ))

    def telemetry_directory(self, rank: int | None) -> Path:
        """Directory of one rank's telemetry; for None, of the valves' pages."""
        return self.telemetry / self._name(rank)

    def controls_directory(self, rank: int | None) -> Path:
        """Directory of one rank's controls; for None, of the valves'."""
        return self.controls / self._name(rank)

    def _name(self, rank: int | None) -> str:
        return self.engine if rank is None else f"{self.engine}-{rank}"


def this_process(clock: Clock) -> Identity:
    """Who we are, for messages to people."""
    return Identity(socket.gethostname(), _container_id(), clock.wall_ns(), clock.monotonic_ns())


def _container_id() -> str:
    """First twelve digits of the container's id; empty outside containers."""
    for source in ("/proc/self/cgroup", "/proc/self/mountinfo"):
        with suppress(OSError):
            found = re.search(r"\b[0-9a-f]{64}\b", Path(source).read_text(errors="replace"))
            if found:
                return found.group()[:12]
    return ""


def new_nonce() -> int:
    """Random 64 bits, never 0."""
    return secrets.randbits(64) or 1
