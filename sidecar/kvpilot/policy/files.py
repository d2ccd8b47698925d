"""Policy files as bytes: which files a path means, read at one go, bounded, before anything looks at them.

A directory that Kubernetes mounts from a ConfigMap is read through its `..data` link, followed once: what is
read is one version of it, also while it is being swapped.
"""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvpilot.policy.source import MAX_BYTES, Problem

SUFFIXES = (".yaml", ".yml")
_TEST_SUFFIXES = tuple(f".test{suffix}" for suffix in SUFFIXES)
_CONFIG_MAP = "..data"


@dataclass(frozen=True, slots=True)
class File:
    """One file: `path` is what people call it, whatever link it was read through."""

    path: Path
    raw: bytes


@dataclass(frozen=True, slots=True)
class PolicyText:
    """A policy file, and the file of its tests if there is one beside it."""

    policy: File
    tests: File | None = None


@dataclass(frozen=True, slots=True)
class Gathered:
    """All that some paths mean; equal where nothing has changed. `problems`: what could not be read."""

    files: tuple[PolicyText, ...]
    problems: tuple[Problem, ...]


def gather(paths: Iterable[str | Path]) -> Gathered:
    """Read the policy files that these files and directories are. Never raises."""
    files: dict[Path, PolicyText] = {}
    problems: list[Problem] = []
    for given in map(Path, paths):
        for path, place in _list(given, problems):
            raw = None if path in files else _read(path, place, problems)
            if raw is not None:
                files[path] = PolicyText(File(path, raw), _beside(path, place, problems))
    return Gathered(tuple(files.values()), tuple(problems))


def _list(given: Path, problems: list[Problem]) -> list[tuple[Path, Path]]:
    """(what people call it, where it is read) for each policy file."""
    if not _is(stat.S_ISDIR, given):
        policy = _tested_by(given)
        if policy != given and _is(stat.S_ISREG, given) and not policy.exists():
            problems.append(Problem(str(given), 1, 1, f"tests of {policy.name}, which is not there"))
            return []
        return [(policy, policy)]
    link = given / _CONFIG_MAP
    root = Path(os.path.realpath(link)) if _is(stat.S_ISDIR, link) else given
    try:
        names = sorted(path.name for path in root.iterdir())
    except OSError as error:
        problems.append(Problem(str(given), 1, 1, f"cannot be read: {error.strerror or error}"))
        return []
    inside = [name for name in names if name.endswith(SUFFIXES) and not name.startswith(".")]
    inside = [name for name in inside if _is(stat.S_ISREG, root / name)]
    found = [(given / name, root / name) for name in inside if not name.endswith(_TEST_SUFFIXES)]
    for name in inside:
        tested = _tested_by(Path(name)).name
        if tested not in inside:
            problems.append(Problem(str(given / name), 1, 1, f"tests of {tested}, which is not there"))
    if not found:
        problems.append(Problem(str(given), 1, 1, "no policy file (*.yaml) in this directory"))
    return found


def _tested_by(path: Path) -> Path:
    """The policy file whose tests these are; any other file is its own."""
    for suffix in _TEST_SUFFIXES:
        if path.name.endswith(suffix) and path.name != suffix:
            return path.with_name(path.name.removesuffix(suffix) + Path(suffix).suffix)
    return path


def _beside(path: Path, place: Path, problems: list[Problem]) -> File | None:
    name = f"{path.stem}.test{path.suffix}"
    if not _is(stat.S_ISREG, place.with_name(name)):
        return None
    raw = _read(path.with_name(name), place.with_name(name), problems)
    return None if raw is None else File(path.with_name(name), raw)


def _read(path: Path, place: Path, problems: list[Problem]) -> bytes | None:
    """At most one byte more than a policy may have: whatever is there, reading it ends."""
    try:
        # A pipe without a writer must not hold us up.
        with open(os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                problems.append(Problem(str(path), 1, 1, "not a regular file"))
                return None
            raw = file.read(MAX_BYTES + 1)
            if len(raw) <= MAX_BYTES:
                return raw
            size = max(status.st_size, len(raw))
            problems.append(Problem(str(path), 1, 1, f"file of {size} bytes: at most {MAX_BYTES}"))
    except FileNotFoundError:
        problems.append(Problem(str(path), 1, 1, "no such file"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        problems.append(Problem(str(path), 1, 1, f"cannot be read: {reason}"))
    return None


def _is(kind: object, path: Path) -> bool:
    try:
        return callable(kind) and bool(kind(path.stat().st_mode))
    except (OSError, ValueError):
        return False
