"""Acting: lease wishes become tables in the controls pages, and the engine's echo says what became of them.

A write is not an effect. A change is *unconfirmed* until a step (or a valve) reports a controls sequence at
least as new, and only then *applied* or, where the value in force is another, *rejected_by_engine*.

Every table is written whole, every tick while there are leases: that is the renewal.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvpilot.adapters.engine import Sight
from kvpilot.adapters.pages import Controls
from kvpilot.clock import NS
from kvpilot.knobs import KNOBS
from kvpilot.link.controls import ENGINE_ANY, ControlsWriter, Lease, Scope
from kvpilot.link.fields import KNOB_PREFIX
from kvpilot.policy.lease import OVERRIDE, LeaseWish

Target = tuple[str, Scope]

REJECTED_AFTER_TABLES = 10
"""Renewals that an engine may have read, and still report another value, before that counts as a refusal."""


@dataclass(frozen=True, slots=True)
class Change:
    """A decision on its way to the engine; `value` None is a withdrawal."""

    number: int
    value: float | None
    at_ns: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Echo:
    """What the engine made of a decision, and how long that took."""

    number: int
    verdict: str
    after_s: float


class Actuator:
    """Writes the controls pages that are this pilot's. `renewal` must differ from whatever an earlier pilot
    wrote.
    """

    def __init__(self, controls: Controls, renewal: int) -> None:
        self._writers: dict[str, ControlsWriter] = {"engine": controls.engine}
        if controls.valve is not None:
            self._writers["valve"] = controls.valve
        self._renewal = renewal
        self._written: dict[Target, float] = {}
        self._blank = False
        self._changed_at: dict[Target, int] = {}
        self._changes: dict[Target, Change] = {}
        self._numbers: dict[Target, int] = {}
        self._ttl_ns: dict[Target, int] = {}
        self._written_ns = 0

    @property
    def unconfirmed(self) -> Mapping[Target, Change]:
        """Changes whose echo has not come yet."""
        return self._changes

    @property
    def flies_valves(self) -> bool:
        """Whether the valves' page is this pilot's: of several ranks' pilots, one has it."""
        return "valve" in self._writers

    def moves(self, knob: str) -> bool:
        """Whether this pilot may move `knob`."""
        return knob not in KNOBS or KNOBS[knob].where in self._writers

    def forget_engine(self) -> None:
        """Another start of the engine: what was on its way to the last one will never be confirmed."""
        for target in [target for target in self._changes if KNOBS[target[0]].where == "engine"]:
            del self._changes[target]

    def write(
        self, wishes: Sequence[LeaseWish], numbers: Mapping[Target, int], nonce: int, at_ns: int
    ) -> None:
        """Renew `wishes`, withdraw everything else. `numbers`: decisions of this tick, by what they change.

        Raises LinkError for leases that do not fit a page, which then is as it was.
        """
        wanted = {(wish.knob, wish.scope): wish.value for wish in wishes}
        changed = {
            target for target in {*wanted, *self._written} if wanted.get(target) != self._written.get(target)
        }
        if not wanted and not changed and self._blank:
            return
        self._renewal += 1
        self._numbers.update(numbers)
        for where, writer in self._writers.items():
            leases = [self._lease(wish) for wish in wishes if KNOBS[wish.knob].where == where]
            writer.write(leases, nonce if where == "engine" else ENGINE_ANY)
        self._blank = not wanted
        self._written = wanted
        self._written_ns = at_ns
        self._ttl_ns = {(wish.knob, wish.scope): wish.ttl_ns for wish in wishes}
        for target in changed | numbers.keys():
            sequence = self._writers[KNOBS[target[0]].where].sequence
            self._changed_at[target] = sequence
            if target in numbers:
                self._changes[target] = Change(numbers[target], wanted.get(target), at_ns, sequence)
            elif target in self._changes:
                # Moved on before its echo came: the decision is confirmed by where it has got to.
                value = wanted.get(target)
                self._changes[target] = replace(self._changes[target], value=value, sequence=sequence)

    def inherit(self, numbers: Mapping[Target, int]) -> None:
        """Decisions of an earlier pilot, by the leases that go on under them."""
        self._numbers.update(numbers)

    def _lease(self, wish: LeaseWish) -> Lease:
        number = self._numbers.get((wish.knob, wish.scope), 0)
        order = wish.policy == OVERRIDE
        return Lease(wish.knob, wish.scope, wish.value, wish.ttl_ns, self._renewal, number, order)

    def values_in_force(self, sight: Sight) -> dict[Target, float]:
        """Knob values as the engine and the valves echo them; as written, where nobody has read them yet."""
        values: dict[Target, float] = {}
        record, manifest = sight.record, sight.manifest
        if record is not None and manifest is not None:
            for knob in manifest.knobs:
                target = (knob.name, Scope("all"))
                value = record.get(KNOB_PREFIX + knob.name)
                if value is not None and self._has_read(record.get("controls_sequence"), target):
                    values[target] = value
        for target, written in self._written.items():
            if target in values:
                continue
            valve = sight.valve if KNOBS[target[0]].where == "valve" else None
            if valve is None or not self._has_read(valve.controls_sequence, target):
                values[target] = written
            elif target in valve.obeyed:
                values[target] = valve.obeyed[target]
        return values

    def _has_read(self, sequence: float | None, target: Target) -> bool:
        return (sequence or 0) >= self._changed_at.get(target, 0)

    def confirm(self, sight: Sight) -> list[Echo]:
        """Decisions whose echo has come, and those whose lease ran out before it was renewed."""
        echoes = self._expired(sight.at_ns)
        for target, change in list(self._changes.items()):
            verdict = self._verdict(target, change, sight)
            if verdict is not None:
                del self._changes[target]
                echoes.append(Echo(change.number, verdict, (sight.at_ns - change.at_ns) / NS))
        return echoes

    def _expired(self, now_ns: int) -> list[Echo]:
        """Leases that lapsed because this pilot came too late: the next table puts them in force again."""
        late_ns = now_ns - self._written_ns
        echoes = []
        for target in [target for target, ttl_ns in self._ttl_ns.items() if late_ns > ttl_ns]:
            del self._ttl_ns[target], self._written[target]
            number = self._numbers.get(target, 0)
            sequence = self._writers[KNOBS[target[0]].where].sequence + 1
            self._changes[target] = Change(number, None, now_ns, sequence)
            echoes.append(Echo(number, "lease_expired", late_ns / NS))
        return echoes

    def _verdict(self, target: Target, change: Change, sight: Sight) -> str | None:
        """None while nobody can say."""
        if KNOBS[target[0]].where == "valve":
            sequence: float = sight.valve.controls_sequence if sight.valve else 0
            echo, wish = sight.valve.obeyed.get(target) if sight.valve else None, change.value
            applied = wish is None or (echo is not None and _is_near(echo, wish))
        else:
            sequence, echo, wish = _engine_echo(target[0], change, sight)
            applied = echo is None or wish is None or _is_near(echo, wish)
        if sequence < change.sequence:
            return None
        if applied:
            return "applied"
        # What a reader finds after a pause is history to it, and is obeyed from the next renewal on.
        return "rejected_by_engine" if sequence >= change.sequence + REJECTED_AFTER_TABLES else None


def _is_near(echo: float, wish: float) -> bool:
    return math.isclose(echo, wish, rel_tol=0.01, abs_tol=0.01)


def _engine_echo(knob: str, change: Change, sight: Sight) -> tuple[float, float | None, float | None]:
    """(controls sequence that the engine has read, value it reports, value that it should have)."""
    if sight.record is None or sight.manifest is None:
        return 0, None, None
    limits = sight.manifest.knob(knob)
    wish = limits.snap(change.value) if limits is not None and change.value is not None else None
    return sight.record.get("controls_sequence") or 0, sight.record.get(KNOB_PREFIX + knob), wish
