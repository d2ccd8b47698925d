"""The link's pages in memory: the same bytes as the files, read and written by the same code."""

from dataclasses import dataclass, field

from kvpilot.adapters.pages import Page
from kvpilot.link.page import HEADER_BYTES, Identity, PageHeader, PageKind

IDENTITY = Identity("virtual", "", 0, 0)


@dataclass(slots=True)
class MemoryPage:
    """One page; `alive` is its writer's lock."""

    buffer: bytearray
    kind: PageKind
    alive: bool = True
    _view: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self._view = memoryview(self.buffer)

    @property
    def header(self) -> PageHeader:
        return PageHeader.unpack(self._view[:HEADER_BYTES], self.kind)

    def read_at(self, offset: int, size: int) -> bytes:
        return bytes(self._view[offset : offset + size])

    def is_locked(self) -> bool:
        return self.alive

    def close(self) -> None:
        """A reader lets go; the page stays."""


@dataclass(slots=True)
class MemoryPages:
    """One engine rank and its valves, in place of `adapters.pages.LinkFiles`."""

    engines: list[MemoryPage] = field(default_factory=list)
    valve_pages: list[MemoryPage] = field(default_factory=list)

    def telemetry(self) -> Page | None:
        return next((page for page in reversed(self.engines) if page.alive), None)

    def valves(self) -> list[Page]:
        return [page for page in self.valve_pages if page.alive]

    def other_ranks(self) -> list[Page]:
        return []
