"""What a tick is evaluated against: the engine's limits, its present values, the SLOs, people's orders.

Plain values, made by the pilot each tick. `values` are values in force as the engine echoes them, by (knob,
scope); what is absent is at baseline. `slo` holds `itl` and `ttft` in seconds (tightest over classes) and, by
class name, mappings with the same two keys.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.signals import Missing

Slo = Mapping[str, float | Mapping[str, float]]


_NOT_PROVIDED = Missing("not_provided")


def _no_chunk(step_seconds: float) -> float | Missing:
    return _NOT_PROVIDED


def _no_credits(class_name: str, ttft_seconds: float) -> float | Missing:
    return _NOT_PROVIDED


@dataclass(frozen=True, slots=True)
class Forecasts:
    """What the models say this tick, for `solve` and `choose`.

    The functions are pure, over a model that does not change while a tick is evaluated.
    """

    chunk_for: Callable[[float], float | Missing] = _no_chunk
    """Step-time target in seconds -> the largest prefill chunk, in tokens, whose predicted step time,
    inflated by the model's residual quantile, meets it.
    """
    credits: Callable[[str, float], float | Missing] = _no_credits
    """(class, TTFT target in seconds) -> prompt tokens of that class and below that the service rate,
    measured while backlogged, can still serve within the target.
    """
    seconds_per_token: Mapping[int, float | Missing] = field(default_factory=dict)
    """Speculation length -> predicted seconds for each token that is emitted."""


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
    forecasts: Forecasts = field(default_factory=Forecasts)
    classes: tuple[str, ...] = ()
    """Names, lowest first: what `lowest` and `highest` mean to a model."""
    top_tenant: str | Missing | None = _NOT_PROVIDED
    """Who holds most KV memory; None while nobody does."""
    offered: float | Missing = _NOT_PROVIDED
    """Requests a second that arrive, over the last seconds, whatever becomes of them."""
    unconfirmed: Collection[tuple[str, Scope]] = ()
    """(knob, scope) whose last change the engine has not echoed yet."""

    def value_in_force(self, knob: ManifestKnob, scope: Scope) -> float:
        """What `knob` is at for `scope` now: as echoed for that scope, else for all, else baseline."""
        value = self.values.get((knob.name, scope))
        if value is None:
            value = self.values.get((knob.name, Scope("all")))
        return knob.baseline if value is None else value
