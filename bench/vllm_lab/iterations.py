"""What vLLM itself says of each engine step: the lines of `--enable-logging-iteration-details`."""

import re
from pathlib import Path
from typing import NamedTuple

ARGUMENT = "--enable-logging-iteration-details"

_LINE = re.compile(
    r"Iteration\((\d+)\): (\d+) context requests, (\d+) context tokens, "
    r"(\d+) generation requests, (\d+) generation tokens,.* KV cache usage: ([\d.]+)%"
)


class Iteration(NamedTuple):
    """One step as scheduled. Drafts count as generation tokens; `kv_usage` is a share of the pool."""

    number: int
    context_requests: int
    context_tokens: int
    generation_requests: int
    generation_tokens: int
    kv_usage: float

    @property
    def requests(self) -> int:
        """Requests that got tokens in this step."""
        return self.context_requests + self.generation_requests

    @property
    def tokens(self) -> int:
        """Tokens of any kind in this step."""
        return self.context_tokens + self.generation_tokens


class Iterations:
    """Follows a server's log. O(new lines) a look."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._offset = 0

    def poll(self) -> list[Iteration]:
        """Those logged since the last look."""
        with self._log.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        lines = data[:whole].decode(errors="replace").splitlines()
        found = (_LINE.search(line) for line in lines)
        return [
            Iteration(*(int(group) for group in match.groups()[:5]), float(match[6]) / 100)
            for match in found
            if match
        ]
