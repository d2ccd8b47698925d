"""The pilot in virtual time: the real one, over pages in memory, with its journal in a list.

What it writes are bytes that engine and valve read; nothing else passes between them. A tick that fails ends
the run: in virtual time a defect is to be seen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kvpilot.adapters.actuator import Actuator, Target
from kvpilot.adapters.engine import EngineAdapter
from kvpilot.adapters.pages import Controls
from kvpilot.clock import VirtualClock
from kvpilot.config import Arm
from kvpilot.journal.ledger import Ledger
from kvpilot.journal.records import Record
from kvpilot.link.controls import CONTROLS_BYTES, ControlsWriter
from kvpilot.orders import Orders
from kvpilot.pilot import Pilot
from kvpilot.policy.context import Slo
from kvpilot.policy.rules import PolicySet
from kvpilot.publish.board import Board
from kvpilot.recordings.recorder import Moment
from kvpilot.simulate.faults import Fault, HarmedEngine, HarmedPages, Now
from kvpilot.simulate.pages import IDENTITY, MemoryPages

AT_ONCE = Arm(after=0.0, finished=0)


@dataclass(slots=True)
class Flown:
    """What a pilot did, in order."""

    journal: list[Record] = field(default_factory=list)
    leases: list[tuple[int, Mapping[Target, float]]] = field(default_factory=list)
    """(virtual time, every lease from then on), at each change."""


def _forget(row: Record) -> None:
    """Keep nothing."""


class Cockpit:
    """One pilot, its controls pages, and what it did."""

    def __init__(
        self,
        clock: VirtualClock,
        pages: MemoryPages,
        policies: PolicySet,
        slo: Slo,
        classes: tuple[str, ...],
        arm: Arm = AT_ONCE,
        faults: Sequence[Fault] = (),
        now_s: Now = lambda: 0.0,
        journalled: bool = True,
        record: Callable[[Moment], object] | None = None,
    ) -> None:
        """Without `journalled` decisions are made and not kept: of hundreds of replicas nobody reads them."""
        self.engine_controls = bytearray(CONTROLS_BYTES)
        self.valve_controls = bytearray(CONTROLS_BYTES)
        self.flown = Flown()
        self._clock = clock
        self._held: Mapping[Target, float] = {}
        keep = self.flown.journal.append if journalled else _forget
        controls = Controls(
            ControlsWriter(self.engine_controls, IDENTITY), ControlsWriter(self.valve_controls, IDENTITY)
        )
        self.pilot = Pilot(
            clock=clock,
            engine=HarmedEngine(HarmedPages(pages, faults, now_s), "memory", faults, now_s)
            if faults
            else EngineAdapter(pages, "memory"),
            actuator=Actuator(controls, renewal=1),
            orders=Orders(clock, keep),
            ledger=Ledger(keep),
            board=Board(classes, shown=False),
            slo=slo,
            arm=arm,
            notify=lambda notice, wall_ns: None,
            take_over=lambda sight: [],
            alarm=lambda change, wall_ns: None,
            record=record,
        )
        self.pilot.use(policies)

    def tick(self) -> None:
        """One tick of the pilot, now."""
        tick = self.pilot.tick()
        held = {(lease.knob, lease.scope): lease.value for lease in tick.leases}
        if held != self._held:
            self._held = held
            self.flown.leases.append((self._clock.monotonic_ns(), held))

    @property
    def actions(self) -> int:
        """Changes of values in force."""
        return self.pilot.ledger.actions
