"""What the recorder remembers of each request, from its arrival at the scheduler to its end."""

from collections.abc import Callable
from typing import Any

ReadTag = Callable[[Any], "tuple[int, str] | None"]


class Life:
    """One request. Times are the engine's monotonic nanoseconds; 0 where it has not come to that."""

    __slots__ = ("added_ns", "last_ns", "level", "placed", "tenant", "tokens_counted")

    def __init__(self, added_ns: int, level: int, tenant: str) -> None:
        self.added_ns = added_ns
        self.last_ns = 0
        """Its last emission."""
        self.level = level
        self.tenant = tenant
        self.placed = False
        """Whether it ever left the queue."""
        self.tokens_counted = 0
        """Of its output, already in its tenant's total."""


class Lives(dict[str, Life]):
    """By request id: those that the scheduler holds."""

    def __init__(self, levels: int, read_tag: ReadTag | None) -> None:
        super().__init__()
        self.tagged = False
        """Whether any request ever came with a tenant."""
        self._levels = levels
        self._read_tag = read_tag

    def begin(self, request: Any, now_ns: int) -> Life:
        """The life of `request`, begun now unless it is known (a streaming session comes in parts)."""
        life = self.get(request.request_id)
        if life is None:
            tag = self._read_tag(request) if self._read_tag else None
            level, tenant = tag or (0, "")
            life = Life(now_ns, min(max(level, 0), self._levels - 1), tenant)
            self[request.request_id] = life
            self.tagged = self.tagged or bool(tenant)
        return life


def tag_reader() -> tuple[ReadTag | None, str | None]:
    """How the valve's tag is taken off a request; or None, and why this version cannot carry one."""
    try:
        from kvpilot.inside.vllm import tagging
    except ImportError as error:
        return None, f"tags cannot be read ({type(error).__name__})"
    reason = tagging.supported()
    return (None, reason) if reason else (tagging.take, None)
