"""The policy directory: loaded whole or not at all, and looked at again whenever its content has changed.

Content, not names or times: a ConfigMap is swapped by a symbolic link whose files keep their dates.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kvpilot.clock import Clock
from kvpilot.policy.load import SUFFIXES, load_policies
from kvpilot.policy.rules import PolicySet

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
        self._tried: bytes | None = None
        self.good = False
        """Whether the last try was taken."""
        self.taken_wall_ns = 0
        """When a set was last taken."""

    @property
    def off_file(self) -> Path:
        return self.path / OFF_FILE

    def load(self) -> PolicySet:
        """All of it. Raises PolicyErrors."""
        self._tried = self._content()
        self.good = False
        loaded = load_policies([self.path], self._classes)
        self.good, self.taken_wall_ns = True, self._clock.wall_ns()
        return loaded

    def load_if_changed(self) -> PolicySet | None:
        """As `load`, or None where nothing has changed since the last try, whatever came of that."""
        return None if self._content() == self._tried else self.load()

    def _content(self) -> bytes:
        digest = hashlib.sha256()
        try:
            for path in sorted(self.path.iterdir()):
                if path.name.endswith(SUFFIXES) and not path.name.startswith("."):
                    data = path.read_bytes()
                    digest.update(f"{path.name}\0{len(data)}\0".encode() + data)
        except OSError as error:
            # A directory being swapped: another content than before, so it is looked at again.
            digest.update(str(error).encode())
        return digest.digest()
