"""What the engine whose pages lie in a directory has, for checking policies against it."""

import re
from pathlib import Path

from kvpilot.adapters.capabilities import RankSeen, missing_signals, ranks_seen, valves_seen
from kvpilot.link.page import LinkError
from kvpilot.link.place import LinkPlace
from kvpilot.policy.against import EngineHas

_OF_A_RANK = re.compile(r"(.+)-([0-9]{1,4})")


def engine_at(directory: Path, uids: frozenset[int]) -> EngineHas:
    """The engine rank that writes its telemetry to `directory`, or to the one directory of a rank in it.

    The start that lives, else the newest of those that are gone. Raises LinkError, one line.
    """
    directory = directory.absolute()
    found = _of_rank(directory, uids) or _inside(directory, uids)
    seen, valves = found
    manifest = seen.manifest
    return EngineHas(
        name=f"{manifest.engine} {manifest.engine_version}",
        knobs={knob.name: knob for knob in manifest.knobs},
        lacking_knobs=manifest.unsupported_knobs,
        lacking_signals={name: why for name, why in missing_signals(manifest).items() if why is not None},
        classes=manifest.classes,
        valves=valves > 0,
    )


def _of_rank(directory: Path, uids: frozenset[int]) -> tuple[RankSeen, int] | None:
    """The rank whose directory this is; None where it is none's."""
    named = _OF_A_RANK.fullmatch(directory.name)
    if named is None:
        return None
    place = LinkPlace(directory.parent, directory.parent, named[1], uids)
    ranks, problems = ranks_seen(place)
    seen = next((each for each in ranks if each.rank == int(named[2])), None)
    if seen is None and problems:
        raise LinkError(problems[0])
    return None if seen is None else (seen, valves_seen(place))


def _inside(directory: Path, uids: frozenset[int]) -> tuple[RankSeen, int]:
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise LinkError(f"{directory}: {error.strerror}") from None
    ranks = [name for name in names if _OF_A_RANK.fullmatch(name)]
    engines = {name.rpartition("-")[0] for name in ranks}
    if len(engines) > 1:
        raise LinkError(f"{directory}: {len(engines)} engines write here: name one of {', '.join(ranks)}")
    for name in ranks:
        seen = _of_rank(directory / name, uids)
        if seen is not None:
            return seen
    raise LinkError(f"{directory}: no engine has written here")
