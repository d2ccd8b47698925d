"""A pilot's hand and several valve processes in one virtual world: real pages in memory, no files."""

import random
from collections.abc import Sequence

from kvpilot.clock import NS
from kvpilot.inside.valve_law import SHED_FRACTION, Decision, ValveLaw
from kvpilot.inside.valve_leases import ADMISSION_CREDITS
from kvpilot.link.controls import CONTROLS_BYTES, ControlsWriter, Lease, Scope
from kvpilot.link.page import Identity
from kvpilot.link.valve_layout import VALVE_PAGE_BYTES
from kvpilot.link.valve_page import LeaseEcho, ValvePageReader
from kvpilot.link.valve_writer import ValvePageWriter

ALL = Scope("all")
TTL_NS = 2 * NS
BYTES_PER_TOKEN = 4
"""As without a lease that says otherwise."""


class Pilot:
    """Writes a real controls page, renewing every lease at each `write`."""

    def __init__(self) -> None:
        self.page = bytearray(CONTROLS_BYTES)
        self._writer = ControlsWriter(self.page, Identity("pilot", "", 0, 0))
        self.renewal = 0

    def write(self, *wishes: tuple[Scope, float], ttl_ns: int = TTL_NS, knob: str = SHED_FRACTION) -> bytes:
        self.renewal += 1
        return self.write_leases(
            *(Lease(knob, scope, value, ttl_ns, self.renewal, 17) for scope, value in wishes)
        )

    def grant(self, *grants: tuple[Scope, float], ttl_ns: int = TTL_NS) -> bytes:
        """Renew credits."""
        return self.write(*grants, ttl_ns=ttl_ns, knob=ADMISSION_CREDITS)

    def write_leases(self, *leases: Lease) -> bytes:
        self._writer.write(leases)
        return bytes(self.page)


def obeying(pilot: Pilot, *leases: tuple[str, Scope, float], now_ns: int = NS) -> ValveLaw:
    """A law that has just seen these leases renewed at `now_ns`."""
    law = ValveLaw(random.Random(1))
    for at_ns in (now_ns - 1, now_ns):
        law.observe(renewed(pilot, *leases), at_ns)
    return law


def renewed(pilot: Pilot, *leases: tuple[str, Scope, float], orders: Sequence[Scope] = ()) -> bytes:
    """One more renewal of leases on several knobs; those on `orders` are a person's."""
    pilot.renewal += 1
    return pilot.write_leases(
        *(
            Lease(knob, scope, value, TTL_NS, pilot.renewal, 17, scope in orders)
            for knob, scope, value in leases
        )
    )


class ValveProcess:
    """One API-server process: a law, its page, and its siblings' pages."""

    def __init__(self, now_ns: int, nonce: int) -> None:
        buffer = bytearray(VALVE_PAGE_BYTES)
        self._writer = ValvePageWriter(buffer, ("a", "b"), nonce=nonce, identity=Identity("h", "", 0, 0))
        self.reader = ValvePageReader(lambda offset, size: bytes(buffer[offset : offset + size]))
        self.law = ValveLaw(random.Random(nonce), now_ns)
        self.alive = True
        self.looked_ns = self.polled_ns = now_ns

    def poll(self, page: bytes, now_ns: int) -> None:
        """Read the controls, write the own page."""
        self.polled_ns = now_ns
        self.law.observe(page, now_ns)
        self._writer.beat(now_ns, (), self.law.controls_sequence, (), self.law.echoes(now_ns))

    def look(self, siblings: Sequence["ValveProcess"], now_ns: int) -> None:
        """Read the siblings' pages."""
        self.looked_ns = now_ns
        said: list[Sequence[LeaseEcho]] = []
        for each in siblings:
            if each is not self and each.alive:
                leases = each.reader.leases()
                assert leases is not None
                said.append(leases)
        self.law.look(said, now_ns)

    def share(self, scope: Scope = ALL) -> float:
        """What this process may use of a grant."""
        own = self.law._shares._own.get(scope)
        return own.usable if own is not None else 0.0

    def admit(self, tokens: int, now_ns: int, level: int = 0, tenant: str = "") -> Decision:
        """A request of so many prompt tokens."""
        return self.law.admit(level, tenant, tokens * BYTES_PER_TOKEN, now_ns)
