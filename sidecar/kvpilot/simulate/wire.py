"""The channel between clients and the engine's loop, in virtual time: messages arrive at once and in order.

The loop's own messages (see `kvengine.loop`), as values and not as bytes. Waiting lets virtual time pass.
"""

from collections.abc import Callable
from typing import Any

from kvpilot.clock import NS
from kvpilot.simulate.agenda import Agenda


class Wire:
    """The engine's end. `deliver` takes what the engine sends."""

    unsent = False

    def __init__(self, agenda: Agenda, deliver: Callable[[list[Any]], None]) -> None:
        self._agenda = agenda
        self.inbox: list[list[Any]] = []
        """For the engine, at its next step boundary."""
        self.send = deliver
        self.until_ns = 0
        """No wait is longer: whoever drives the loop looks up then."""

    def receive(self) -> list[list[Any]]:
        messages, self.inbox = self.inbox, []
        return messages

    def flush(self) -> None:
        """Nothing is ever left to send."""

    def wait(self, seconds: float) -> None:
        """Until a message is there, at most `seconds`."""
        agenda = self._agenda
        until_ns = agenda.clock.monotonic_ns() + max(1, round(seconds * NS))
        until_ns = min(until_ns, max(self.until_ns, agenda.clock.monotonic_ns() + 1))
        while not self.inbox and agenda.pass_one(until_ns):
            pass
