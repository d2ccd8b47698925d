"""In place of a pilot: the decisions that one made before, put in force again at their times."""

from collections.abc import Sequence

from kvpilot.clock import NS, VirtualClock
from kvpilot.knobs import KNOBS
from kvpilot.link.controls import CONTROLS_BYTES, ENGINE_ANY, ControlsWriter, Lease
from kvpilot.recordings.recorded import Held
from kvpilot.simulate.cockpit import Flown
from kvpilot.simulate.pages import IDENTITY

MEASURED = "prompt_bytes_per_token"
"""Of the bodies that were recorded; simulated ones are as large as valves take them to be."""
TTL_NS = NS
"""Longer than a tick: a lease is renewed at each."""


class RecordedHand:
    """`held` in order of time, on the virtual clock. Ticks as a `Cockpit` does."""

    def __init__(self, clock: VirtualClock, held: Sequence[Held]) -> None:
        self.engine_controls = bytearray(CONTROLS_BYTES)
        self.valve_controls = bytearray(CONTROLS_BYTES)
        self.flown = Flown()
        self.actions = 0
        """Changes of values in force."""
        self._clock = clock
        self._held = held
        self._next = 0
        self._renewal = 0
        self._writers = {
            "engine": ControlsWriter(self.engine_controls, IDENTITY),
            "valve": ControlsWriter(self.valve_controls, IDENTITY),
        }

    def tick(self) -> None:
        """What was in force at this moment is in force from now on."""
        now_ns = self._clock.monotonic_ns()
        while self._next < len(self._held) and self._held[self._next].at_ns <= now_ns:
            before = self._held[self._next - 1].values if self._next else {}
            after = self._held[self._next].values
            self.actions += sum(before.get(t) != after.get(t) for t in before.keys() | after.keys())
            self.flown.leases.append((now_ns, after))
            self._next += 1
        if not self._next:
            return
        self._renewal += 1
        values = self._held[self._next - 1].values
        for where, writer in self._writers.items():
            leases = [
                Lease(knob, scope, value, TTL_NS, self._renewal)
                for (knob, scope), value in values.items()
                if knob in KNOBS and KNOBS[knob].where == where and knob != MEASURED
            ]
            writer.write(leases, 1 if where == "engine" else ENGINE_ANY)
