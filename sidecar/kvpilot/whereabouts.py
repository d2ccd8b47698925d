"""Where an engine's pages and its pilot's journal are, for commands that look at them without a pilot."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvpilot.config import ConfigError, default_journal, load
from kvpilot.link.page import LinkError
from kvpilot.link.place import ENVIRON_ENGINE, ENVIRON_TELEMETRY, LinkPlace
from kvpilot.link.trust import trusted_uids


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """One rank of one engine."""

    place: LinkPlace
    rank: int
    journal: Path
    """May not exist."""


def whereabouts(
    config: Path | None,
    telemetry: Path | None,
    engine: str | None,
    environ: Mapping[str, str],
    rank: int | None = None,
    default: Path = Path("kvpilot.yaml"),
) -> Whereabouts:
    """By the first of: the two options, the configuration named, the default one if it is there, the
    environment. `rank` None: the configuration's, else 0. Raises ConfigError.
    """
    if telemetry is not None or engine is not None:
        if telemetry is None or engine is None:
            raise ConfigError("--telemetry and --engine: give both, or a configuration with -c")
        return _directly(telemetry, engine, rank or 0, environ)
    named = (environ.get(ENVIRON_TELEMETRY), environ.get(ENVIRON_ENGINE))
    if config is None and not default.exists():
        if named[0] and named[1]:
            return _directly(Path(named[0]), named[1], rank or 0, environ)
        raise ConfigError(
            f"which engine? There is no {default} here: give -c FILE, or --telemetry DIR and --engine NAME,"
            f" or set {ENVIRON_TELEMETRY} and {ENVIRON_ENGINE}"
        )
    loaded = load(config or default, environ)
    assert loaded.engine.telemetry is not None, "load() has filled these in"
    assert loaded.engine.controls is not None
    assert loaded.journal is not None
    place = LinkPlace(loaded.engine.telemetry, loaded.engine.controls, loaded.engine_name, _uids(environ))
    if rank is None or rank == loaded.rank:
        return Whereabouts(place, loaded.rank, loaded.journal)
    return Whereabouts(place, rank, default_journal(loaded.engine_name, rank, environ))


def _directly(telemetry: Path, engine: str, rank: int, environ: Mapping[str, str]) -> Whereabouts:
    try:
        # Nobody who only looks goes near the controls.
        place = LinkPlace(telemetry, telemetry, engine, _uids(environ))
    except LinkError as error:
        raise ConfigError(str(error)) from error
    return Whereabouts(place, rank, default_journal(engine, rank, environ))


def _uids(environ: Mapping[str, str]) -> frozenset[int]:
    try:
        return trusted_uids(environ)
    except LinkError as error:
        raise ConfigError(str(error)) from error
