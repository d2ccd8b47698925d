"""The valve in virtual time: the law and the page of `kvpilot.inside`, without the ASGI shell around them.

It reads the controls and writes its summary when that shell would: at a request, and while bytes leave, at
most every POLL_NS; that a look falls a few milliseconds later than there changes no decision.
"""

import random

from kvpilot.clock import VirtualClock
from kvpilot.inside.callers import NO_TENANT
from kvpilot.inside.valve import POLL_NS
from kvpilot.inside.valve_law import Decision, ValveLaw
from kvpilot.link.controls import CONTROLS_BYTES
from kvpilot.link.valve_layout import VALVE_PAGE_BYTES
from kvpilot.link.valve_writer import ValvePageWriter
from kvpilot.simulate.pages import IDENTITY, MemoryPage


class _OwnDice(random.Random):
    """Whoever is judged brings the dice: so that one client's jitter is the same in every leg."""

    drawn = 0.5

    def uniform(self, a: float, b: float) -> float:
        return a + (b - a) * self.drawn


class VirtualValve:
    """One API-server process's."""

    def __init__(self, clock: VirtualClock, classes: tuple[str, ...], controls: bytearray) -> None:
        self._clock = clock
        self._controls = memoryview(controls)
        self._levels = range(len(classes))
        self._dice = _OwnDice()
        self.law = ValveLaw(self._dice, clock.monotonic_ns())
        self.page = MemoryPage(bytearray(VALVE_PAGE_BYTES), "valve")
        self.counts = ValvePageWriter(self.page.buffer, classes, nonce=1, identity=IDENTITY)
        self._polled_ns = 0
        assert len(controls) == CONTROLS_BYTES
        self.poll()

    def admit(self, level: int, tenant: str, body_bytes: int, drawn: float) -> tuple[Decision, int]:
        """The decision and, if it lets the request in, its ticket. `drawn`, in [0, 1), is its jitter."""
        now_ns = self._clock.monotonic_ns()
        if now_ns - self._polled_ns >= POLL_NS:
            self.poll()
        self._dice.drawn = drawn
        decision = self.law.admit(level, tenant, body_bytes, now_ns)
        size, tokens = decision.body_bytes, decision.tokens
        if decision.admitted:
            return decision, self.counts.admitted(level, tenant, size, now_ns, tokens)
        self.counts.shed(level, tenant, size, decision.why, tokens)
        return decision, 0

    def turned_away(self, level: int, tenant: str, body_bytes: int) -> None:
        """Something in front of the law sent one away: a fixed cap on the queue."""
        self.counts.shed(level, tenant, body_bytes, "fraction")

    def poll(self) -> None:
        """Read the controls; write the summary."""
        now_ns = self._polled_ns = self._clock.monotonic_ns()
        law, levels = self.law, self._levels
        law.observe(self._controls, now_ns)
        self.counts.beat(
            now_ns,
            [law.fraction(level, NO_TENANT, now_ns) for level in levels],
            law.controls_sequence,
            [law.credits_left(level, NO_TENANT, now_ns) for level in levels],
            law.echoes(now_ns),
            law.bytes_per_token(now_ns),
        )
