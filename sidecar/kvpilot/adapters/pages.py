"""Where an adapter finds pages: in the link's directories, or, in virtual time, in memory."""

import os
import re
from typing import Protocol

from kvpilot.clock import Clock
from kvpilot.link import files
from kvpilot.link.controls import ControlsWriter, Slot, newest_slot
from kvpilot.link.files import WritablePage
from kvpilot.link.following import newest_telemetry, open_pages
from kvpilot.link.page import PageHeader
from kvpilot.link.place import LinkPlace


class Page(Protocol):
    """Another process's page."""

    @property
    def header(self) -> PageHeader: ...
    def read_at(self, offset: int, size: int) -> bytes: ...
    def is_locked(self) -> bool: ...
    def close(self) -> None: ...


class Pages(Protocol):
    """What is there to be read now. Raises LinkError where it cannot be used."""

    def telemetry(self) -> Page | None: ...
    def valves(self) -> list[Page]: ...
    def other_ranks(self) -> list[Page]: ...


class LinkFiles:
    """The pages of one engine rank in the link's directories."""

    def __init__(self, place: LinkPlace, rank: int = 0) -> None:
        self.place = place
        self.rank = rank

    def telemetry(self) -> Page | None:
        """The newest page whose engine lives."""
        return newest_telemetry(self.place.telemetry_directory(self.rank), self.place.uids)

    def valves(self) -> list[Page]:
        """Pages of all valves that live."""
        return list(open_pages(self.place.telemetry_directory(None), "valve", self.place.uids, locked=True))

    def other_ranks(self) -> list[Page]:
        """The newest page of each other rank that lives."""
        name = re.compile(rf"{re.escape(self.place.engine)}-([0-9]{{1,4}})")
        try:
            entries = os.listdir(self.place.telemetry)
        except OSError:
            return []
        ranks = {int(match[1]) for entry in entries if (match := name.fullmatch(entry))} - {self.rank}
        found = [newest_telemetry(self.place.telemetry_directory(n), self.place.uids) for n in sorted(ranks)]
        return [page for page in found if page is not None]


class Controls:
    """The controls pages that one pilot writes, locked for as long as it lives: its rank's, and the valves'
    unless another rank's pilot has that (`valve` None).

    `engine_left` and `valve_left` are the tables that an earlier pilot left, if any.
    """

    def __init__(
        self,
        engine: ControlsWriter,
        valve: ControlsWriter | None,
        engine_left: Slot | None = None,
        valve_left: Slot | None = None,
        pages: tuple[WritablePage, ...] = (),
    ) -> None:
        self.engine = engine
        self.valve = valve
        self.engine_left = engine_left
        self.valve_left = valve_left
        self._pages = pages

    @classmethod
    def open(cls, place: LinkPlace, clock: Clock, rank: int = 0, valve: bool = True) -> "Controls":
        """Take the controls of one rank, and with `valve` those of the valves. Raises LinkError where another
        pilot has them, and names it.
        """
        engine, engine_page = files.open_controls(place, rank, clock)
        engine_left = newest_slot(bytes(engine_page.buffer))
        if not valve:
            return cls(engine, None, engine_left, None, (engine_page,))
        try:
            valves, valve_page = files.open_controls(place, None, clock)
        except BaseException:
            engine.close()
            engine_page.close()
            raise
        valve_left = newest_slot(bytes(valve_page.buffer))
        return cls(engine, valves, engine_left, valve_left, (engine_page, valve_page))

    def close(self) -> None:
        """Give the controls up; what was last written stays readable."""
        self.engine.close()
        if self.valve is not None:
            self.valve.close()
        for page in self._pages:
            page.close()
