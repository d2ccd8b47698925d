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
from kvpilot.policy.outcome import LeaseWish

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
    """Writes both controls pages. `renewal` must differ from whatever an earlier pilot wrote."""

    def __init__(self, controls: Controls, renewal: int) -> None:
        self._writers: dict[str, ControlsWriter] = {"engine": controls.engine, "valve": controls.valve}
        self._renewal = renewal
        self._written: dict[Target, float] = {}
        self._blank = False
        self._changed_at: dict[Target, int] = {}
        self._changes: dict[Target, Change] = {}
        self._numbers: dict[Target, int] = {}

    @property
    def unconfirmed(self) -> Mapping[Target, Change]:
        """Changes whose echo has not come yet."""
        return self._changes

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
        return Lease(wish.knob, wish.scope, wish.value, wish.ttl_ns, self._renewal, number)

    def values_in_force(self, sight: Sight) -> dict[Target, float]:
        """Knob values as the engine and the valves echo them; as written, where no step has read them yet."""
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
            echo = valve_fraction(sight, target[1]) if KNOBS[target[0]].where == "valve" else None
            read = sight.valve is not None and self._has_read(sight.valve.controls_sequence, target)
            values[target] = echo if echo is not None and read else written
        return values

    def _has_read(self, sequence: float | None, target: Target) -> bool:
        return (sequence or 0) >= self._changed_at.get(target, 0)

    def confirm(self, sight: Sight) -> list[Echo]:
        """Decisions whose echo has come."""
        echoes = []
        for target, change in list(self._changes.items()):
            verdict = self._verdict(target, change, sight)
            if verdict is not None:
                del self._changes[target]
                echoes.append(Echo(change.number, verdict, (sight.at_ns - change.at_ns) / NS))
        return echoes

    def _verdict(self, target: Target, change: Change, sight: Sight) -> str | None:
        """None while nobody can say."""
        knob, scope = target
        sequence, echo, wish = _engine_echo(knob, change, sight)
        if KNOBS[knob].where == "valve":
            sequence = sight.valve.controls_sequence if sight.valve else 0
            echo, wish = valve_fraction(sight, scope), change.value
        if sequence < change.sequence:
            return None
        if echo is None or wish is None or math.isclose(echo, wish, rel_tol=0.01, abs_tol=0.01):
            return "applied"
        # What a reader finds after a pause is history to it, and is obeyed from the next renewal on.
        return "rejected_by_engine" if sequence >= change.sequence + REJECTED_AFTER_TABLES else None


def _engine_echo(knob: str, change: Change, sight: Sight) -> tuple[float, float | None, float | None]:
    """(controls sequence that the engine has read, value it reports, value that it should have)."""
    if sight.record is None or sight.manifest is None:
        return 0, None, None
    limits = sight.manifest.knob(knob)
    wish = limits.snap(change.value) if limits is not None and change.value is not None else None
    return sight.record.get("controls_sequence") or 0, sight.record.get(KNOB_PREFIX + knob), wish


def valve_fraction(sight: Sight, scope: Scope) -> float | None:
    """The share that every valve sheds of all classes in scope, at least; None where no valve says."""
    if sight.valve is None or sight.manifest is None:
        return None
    shares = sight.valve.fractions
    if scope.kind == "class_at_most" and isinstance(scope.argument, int):
        named = [shares[name] for name in sight.manifest.classes[: scope.argument + 1] if name in shares]
    else:
        named = list(shares.values()) if scope.kind == "all" else []
    return min(named, default=None)
