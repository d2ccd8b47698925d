"""What a tick wants held: one value for one knob and scope, in the name of a rule or of a person."""

from dataclasses import dataclass

from kvpilot.link.controls import Scope

Target = tuple[str, Scope]
"""What a claim or a lease is about: (knob, scope)."""

OVERRIDE = "override"
"""The policy name under which a person's order appears in leases and decisions; no file may use it."""


@dataclass(frozen=True, slots=True)
class LeaseWish:
    """A winner of this tick: the pilot writes it, and renews it as long as it stays in the outcome."""

    knob: str
    scope: Scope
    value: float
    ttl_ns: int
    policy: str
    rule: str
