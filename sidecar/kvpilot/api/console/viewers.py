"""Everybody who watches: one frame made for all of them, twice a second, and nobody waited for.

A viewer holds the newest frame and no queue: who is slow skips frames, and who takes none for
`MOST_BEHIND` of them is dropped. So a tick and the other viewers never pay for one.
"""

import asyncio
from dataclasses import dataclass, field

MOST_VIEWERS = 64
MOST_BEHIND = 10
"""Frames: five seconds."""


@dataclass(slots=True, eq=False)
class Viewer:
    """One open stream."""

    _newest: bytes | None = None
    _behind: int = 0
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it is dropped, or the pilot lands."""

    def offer(self, frame: bytes) -> None:
        """Replace what waits for this viewer; never waits."""
        self._newest = frame
        self._behind += 1
        self._news.set()
        if self._behind > MOST_BEHIND:
            self.over.set()

    async def take(self) -> bytes:
        """The newest frame, once there is one that was not taken."""
        await self._news.wait()
        self._news.clear()
        frame, self._newest, self._behind = self._newest, None, 0
        assert frame is not None
        return frame


class Viewers:
    """See the module docstring. One thread: the event loop's."""

    def __init__(self) -> None:
        self._all: set[Viewer] = set()
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._all)

    def join(self) -> Viewer | None:
        """A new viewer; None where there are as many as there may be."""
        if len(self._all) >= MOST_VIEWERS:
            return None
        viewer = Viewer()
        self._all.add(viewer)
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """Forget one."""
        self._all.discard(viewer)

    def show(self, frame: bytes) -> None:
        """Hand one frame to everybody; who has taken none for too long is dropped."""
        for viewer in list(self._all):
            viewer.offer(frame)
            if viewer.over.is_set():
                self.dropped += 1
                self._all.discard(viewer)

    def close(self) -> None:
        """End every stream."""
        for viewer in self._all:
            viewer.over.set()
        self._all.clear()
