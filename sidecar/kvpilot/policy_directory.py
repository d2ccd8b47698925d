"""The policy directory: loaded whole or not at all, and looked at again whenever its content has changed.

Content, not names or times: a ConfigMap is swapped by a symbolic link whose files keep their dates. What is
loaded was read twice alike, so that no set is half of one version and half of the next.
"""

from collections.abc import Sequence
from pathlib import Path

from kvpilot.clock import Clock
from kvpilot.policy.files import Gathered, gather
from kvpilot.policy.load import load_gathered, policy_set
from kvpilot.policy.rules import PolicySet

MOST_READS = 5
OFF_FILE = "off"
"""A file of this name in the directory turns the pilot off."""


def shipped() -> Path:
    """The policies that come with kvpilot: inside the installed package, or in the source tree."""
    packaged = Path(__file__).parent / "policies"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "policies"


class PolicyDirectory:
    """One directory of policy files. `classes`: class names that policies may name, lowest first."""

    def __init__(self, path: Path, classes: Sequence[str], clock: Clock) -> None:
        self.path = path
        self._clock = clock
        self._classes = tuple(classes)
        self._tried: Gathered | None = None
        self.good = False
        """Whether the last try was taken."""
        self.taken_wall_ns = 0
        """When a set was last taken."""

    @property
    def off_file(self) -> Path:
        return self.path / OFF_FILE

    def load(self) -> PolicySet:
        """All of it. Raises PolicyErrors."""
        return self._load(self._read())

    def load_if_changed(self) -> PolicySet | None:
        """As `load`, or None where nothing has changed since the last try, whatever came of that."""
        gathered = self._read()
        return None if gathered == self._tried else self._load(gathered)

    def _load(self, gathered: Gathered) -> PolicySet:
        self._tried = gathered
        self.good = False
        loaded = policy_set(load_gathered(gathered, self._classes))
        self.good, self.taken_wall_ns = True, self._clock.wall_ns()
        return loaded

    def _read(self) -> Gathered:
        """The directory as it was at one moment; one that never holds still is taken as it comes."""
        before = gather([self.path])
        for _ in range(MOST_READS):
            after = gather([self.path])
            if after == before:
                break
            before = after
        return before
