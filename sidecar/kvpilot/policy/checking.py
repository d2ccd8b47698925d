"""`kvpilot check`: all mistakes of all files. Nothing here evaluates: an editor wants its answer at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvpilot.policy.against import EngineHas
from kvpilot.policy.files import gather
from kvpilot.policy.load import PolicyErrors, load_gathered


@dataclass(frozen=True, slots=True)
class Checked:
    """How many policy files were looked at, and every error in them as `path:line:col: message`."""

    files: int
    problems: tuple[str, ...]


def check(paths: Iterable[str | Path], engine: EngineHas | None = None) -> Checked:
    """Look at every file; with `engine`, also at what that lacks."""
    gathered = gather(paths)
    try:
        load_gathered(gathered, engine=engine)
    except PolicyErrors as errors:
        return Checked(len(gathered.files), tuple(str(problem) for problem in errors.problems))
    return Checked(len(gathered.files), ())
