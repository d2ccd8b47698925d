"""What takes longer than a tick may be late: read by a child process at low priority, one at a time.

A recording is up to 16 MiB to read and count through, and a policy's tests fly minutes of virtual time: in a
thread they would hold the interpreter that ticks. The child prints JSON, which is passed on unread. A start
that is over stays what it was, so its answer is kept.
"""

import asyncio
import re
import sys
from collections import OrderedDict
from http import HTTPStatus

from kvpilot.flight import Flight

MOST_WAITING = 4
MOST_KEPT = 8
PATIENCE_S = 30.0
_START = re.compile(r"[0-9a-f]{16}")


class ArchiveError(Exception):
    """Nothing to show; one line."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Archive:
    """See the module docstring."""

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self._one = asyncio.Lock()
        self._asked: dict[tuple[str, ...], asyncio.Task[bytes]] = {}
        """By order: who asks for what somebody waits for already waits for the same answer."""
        self._kept: OrderedDict[tuple[str, ...], bytes] = OrderedDict()

    async def ask(self, what: str, start: str | None = None) -> bytes:
        """JSON. Raises ArchiveError."""
        order = (what, *self._arguments(what, start))
        if (kept := self._kept.get(order)) is not None:
            return kept
        if order not in self._asked:
            if len(self._asked) >= MOST_WAITING:
                raise ArchiveError(HTTPStatus.SERVICE_UNAVAILABLE, "too many ask at once: try again soon")
            self._asked[order] = asyncio.create_task(self._answer(order))
        # Whoever goes away takes nobody else's answer along.
        return await asyncio.shield(self._asked[order])

    async def _answer(self, order: tuple[str, ...]) -> bytes:
        try:
            async with self._one:
                answer = await self._child(order)
        finally:
            del self._asked[order]
        self._keep(order, answer)
        return answer

    def _arguments(self, what: str, start: str | None) -> list[str]:
        flight = self._flight
        if what == "tests":
            # When the set was taken names the answer: another set is another question.
            return [str(flight.directory.path), str(flight.directory.taken_wall_ns)]
        if flight.place is None:
            raise ArchiveError(HTTPStatus.NOT_FOUND, "this pilot flies without files: nothing is recorded")
        where = [str(flight.place.telemetry), flight.place.engine, str(flight.rank)]
        if start is None:
            return where
        if not _START.fullmatch(start):
            raise ArchiveError(HTTPStatus.NOT_FOUND, "a start is named by 16 hexadecimal digits")
        return [*where, str(flight.journal.path), start]

    def _keep(self, order: tuple[str, ...], answer: bytes) -> None:
        if order[0] == "incidents" or (order[0] == "incident" and b'"alive":true' in answer[:200]):
            return
        self._kept[order] = answer
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)

    async def _child(self, order: tuple[str, ...]) -> bytes:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kvpilot.api.console.past", *order),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await asyncio.wait_for(child.communicate(), PATIENCE_S)
        except TimeoutError:
            raise ArchiveError(HTTPStatus.SERVICE_UNAVAILABLE, f"no answer in {PATIENCE_S:.0f} s") from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode != 0:
            lines = err.decode(errors="replace").strip().splitlines() or ["it ended without a word"]
            raise ArchiveError(HTTPStatus.NOT_FOUND, lines[-1])
        return out
