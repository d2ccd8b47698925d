"""What a tick is evaluated against: the engine's limits, its present values, the SLOs, people's orders.

Plain values, made by the pilot each tick. `values` are values in force as the engine echoes them, by (knob,
scope); what is absent is at baseline. `slo` holds `itl` and `ttft` in seconds (tightest over classes) and, by
class name, mappings with the same two keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob

Slo = Mapping[str, float | Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Override:
    """A person's order: outranks every policy until `until_ns`, on the same clock as `Context.now_ns`."""

    knob: str
    scope: Scope
    value: float
    until_ns: int
    why: str
    who: str


@dataclass(frozen=True, slots=True)
class Context:
    """See the module docstring. `off` outranks everything: all rules shadowed, no lease written."""

    now_ns: int
    knobs: Mapping[str, ManifestKnob]
    values: Mapping[tuple[str, Scope], float] = field(default_factory=dict)
    slo: Slo = field(default_factory=dict)
    armed: bool = True
    off: bool = False
    overrides: tuple[Override, ...] = ()

    def value_in_force(self, knob: ManifestKnob, scope: Scope) -> float:
        """What `knob` is at for `scope` now: as echoed for that scope, else for all, else baseline."""
        value = self.values.get((knob.name, scope))
        if value is None:
            value = self.values.get((knob.name, Scope("all")))
        return knob.baseline if value is None else value
