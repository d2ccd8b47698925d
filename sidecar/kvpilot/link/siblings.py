"""What the other valves of one engine say: a few short reads of each live one's page.

A process must never open its own page a second time: closing that descriptor would drop its lock (`locks`).
So our own page is left out by name, and `trust.open_page` refuses whatever this process holds.
"""

from collections.abc import Sequence
from pathlib import Path

from kvpilot.link.following import ReadablePage, open_pages
from kvpilot.link.page import LinkError
from kvpilot.link.valve_page import LeaseEcho, ValvePageReader


class Siblings:
    """Reads the pages beside `own`. One that lives and cannot be read keeps what it said last."""

    def __init__(self, own: Path, uids: frozenset[int]) -> None:
        self._own = own
        self._uids = uids
        self._said: dict[int, Sequence[LeaseEcho]] = {}
        self.error: str | None = None
        """One line about why siblings are not seen, for as long as they are not."""

    def look(self) -> list[Sequence[LeaseEcho]]:
        """The leases that every live sibling echoes, none for one that has said nothing yet."""
        try:
            pages = open_pages(self._own.parent, "valve", self._uids, locked=True, leave_out=self._own.name)
            self.error = None
        except LinkError as error:
            self.error = str(error)
            return list(self._said.values())
        self._said = {page.header.nonce: self._read(page) for page in pages}
        return list(self._said.values())

    def _read(self, page: ReadablePage) -> Sequence[LeaseEcho]:
        before = self._said.get(page.header.nonce, ())
        try:
            said = ValvePageReader(page.read_at).leases()
        except LinkError as error:
            self.error = str(error)
            said = None
        finally:
            page.close()
        return before if said is None else said
