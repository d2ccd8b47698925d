"""What people ordered: overrides of knobs, and off. Outranks every policy and survives a restart.

Orders end by wall time, because that is what a person means by ten minutes and what a restarted pilot still
knows; within one pilot they run on the monotonic clock.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kvpilot.clock import NS, Clock
from kvpilot.journal.records import OverrideRecord, Record, SwitchRecord, format_scope, parse_scope
from kvpilot.knobs import KNOBS
from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.context import Override

LONGEST_S = 24 * 3600.0
MOST_ORDERS = 8
"""At a time: they share one page with the leases of policies, and a page that overflows is not written."""
MOST_CLASSES = 8
MOST_TENANT_BYTES = 32


class OrderError(ValueError):
    """An order that cannot be followed; one line for the person who gave it."""


@dataclass(frozen=True, slots=True)
class Off:
    """Why nothing is actuated."""

    why: str
    who: str


class Orders:
    """All orders in force. `add` journals them and must not wait; `off_file` and `shadow` are other ways to
    say off.
    """

    def __init__(
        self,
        clock: Clock,
        add: Callable[[Record], None],
        off_file: Path | None = None,
        overrides: Iterable[OverrideRecord] = (),
        switch: SwitchRecord | None = None,
        shadow: bool = False,
    ) -> None:
        self._clock = clock
        self._add = add
        self._off_file = off_file
        self._switch = switch
        self._shadow = shadow
        self._overrides: dict[tuple[str, Scope], Override] = {}
        for record in overrides:
            self._restore(record)

    def _restore(self, record: OverrideRecord) -> None:
        left_ns = record.until_wall_ns - self._clock.wall_ns()
        if record.value is not None and left_ns > 0:
            scope = parse_scope(record.scope)
            until_ns = self._clock.monotonic_ns() + left_ns
            self._overrides[record.knob, scope] = Override(
                record.knob, scope, record.value, until_ns, record.why, record.who
            )

    def in_force(self, now_ns: int) -> tuple[Override, ...]:
        """Overrides that have not ended."""
        if any(order.until_ns <= now_ns for order in self._overrides.values()):
            self._overrides = {
                target: order for target, order in self._overrides.items() if order.until_ns > now_ns
            }
        return tuple(self._overrides.values())

    @property
    def off(self) -> Off | None:
        """Who turned the pilot off and why; None while it may act."""
        if self._shadow:
            return Off("`shadow: true` in the configuration", "whoever wrote it")
        if self._off_file is not None and self._off_file.exists():
            return Off(f"the file {self._off_file}", "whoever made it")
        return Off(self._switch.why, self._switch.who) if self._switch and self._switch.off else None

    def override(
        self,
        knob: str,
        scope: Scope,
        value: float | None,
        for_s: float,
        why: str,
        who: str,
        limits: ManifestKnob | None,
    ) -> None:
        """Hold `knob` at `value` for `for_s`; None ends the order in force. Raises OrderError."""
        _check(knob, scope, value, for_s, why, limits)
        if value is None and (knob, scope) not in self._overrides:
            raise OrderError(f"no override of {knob} ({format_scope(scope)}) is in force")
        if value is not None and (knob, scope) not in self._overrides and self._are_full():
            raise OrderError(f"{MOST_ORDERS} overrides are in force: end one with KNOB=none first")
        for_ns = round(for_s * NS)
        wall_ns = self._clock.wall_ns()
        self._add(OverrideRecord(wall_ns, knob, format_scope(scope), value, wall_ns + for_ns, why, who))
        if value is None:
            del self._overrides[knob, scope]
        else:
            until_ns = self._clock.monotonic_ns() + for_ns
            self._overrides[knob, scope] = Override(knob, scope, value, until_ns, why, who)

    def _are_full(self) -> bool:
        return len(self.in_force(self._clock.monotonic_ns())) >= MOST_ORDERS

    def turn(self, off: bool, why: str, who: str) -> None:
        """Off or on. Raises OrderError where another switch would still hold it off."""
        if off and not why.strip():
            raise OrderError("off needs a reason: --why TEXT")
        self._switch = SwitchRecord(self._clock.wall_ns(), off, why, who)
        self._add(self._switch)
        if not off and self._shadow:
            raise OrderError("still off: remove `shadow: true` from the configuration and start again")
        if not off and self._off_file is not None and self._off_file.exists():
            raise OrderError(f"still off: remove the file {self._off_file}")


def unknown_knob(knob: str, known: Iterable[str], says: str) -> str:
    """`says` and the name; then the nearest one that is known, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(knob, names, n=1, cutoff=0.6)
    hint = f" (did you mean {near[0]!r}?)" if near else f"; there are {', '.join(names)}"
    return f"{says} {knob!r}{hint}"


def _check(
    knob: str, scope: Scope, value: float | None, for_s: float, why: str, limits: ManifestKnob | None
) -> None:
    row = KNOBS.get(knob)
    if row is None:
        raise OrderError(unknown_knob(knob, KNOBS, "no knob is called"))
    if not row.scoped and scope.kind != "all":
        raise OrderError(f"{knob} is one value for all requests: it takes no scope")
    if value is None:
        return
    # A lease that no page can hold would end every tick in an error, and with it every other lease.
    if scope.kind == "class_at_most" and not 0 <= int(scope.argument or 0) < MOST_CLASSES:
        raise OrderError(f"{format_scope(scope)}: class levels are 0 to {MOST_CLASSES - 1}")
    if scope.kind == "tenant" and len(str(scope.argument).encode()) > MOST_TENANT_BYTES:
        raise OrderError(f"a tenant's name has at most {MOST_TENANT_BYTES} bytes")
    low, high = (limits.minimum, limits.maximum) if limits else row.plausible
    if not math.isfinite(value) or not low <= value <= high:
        raise OrderError(
            f"{knob}={value:g}: {'this engine' if limits else 'kvpilot'} takes {low:g} to {high:g}"
        )
    if not 0 < for_s <= LONGEST_S:
        raise OrderError(f"--for {for_s:g}s: more than 0 and at most {LONGEST_S / 3600:g}h")
    if not why.strip():
        raise OrderError("an override needs a reason: --why TEXT")
