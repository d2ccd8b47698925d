"""Short cuts of a tick change nothing: rules that rest are passed over, and last answers are remembered."""

import dataclasses
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from policy_worlds import Moment, fly, nervous, policies, probers, rivals, series

from kvpilot.policy.expr import Expression, compile_expression
from kvpilot.policy.rules import Policy
from kvpilot.signals import SIGNALS, Missing


@settings(max_examples=60, deadline=None)
@given(policies() | probers() | rivals(), series() | nervous())
def test_every_tick_is_as_if_every_rule_had_its_turn(made: list[Policy], flight: list[Moment]) -> None:
    """Leases, decisions, notices, effects and states alike, tick for tick."""
    short = [flown.outcome for flown in fly(made, flight)]
    with (
        patch("kvpilot.policy.evaluate.rests", lambda *about: False),
        patch.object(Expression, "evaluate", lambda self, r: self._evaluated([*map(r.get, self.names)], r)),
    ):
        whole = [flown.outcome for flown in fly(made, flight)]
    for one, other in zip(short, whole, strict=True):
        for field in dataclasses.fields(one):
            assert getattr(one, field.name) == getattr(other, field.name), field.name


_VALUES = st.sampled_from((0.0, 1.0, 2.0, float("nan"), Missing("too_old"), None))


@given(st.lists(st.tuples(_VALUES, _VALUES), max_size=12))
def test_an_answer_that_is_remembered_is_the_answer(flight: list[tuple[object, object]]) -> None:
    signal = SIGNALS["requests_waiting"]
    known = compile_expression("a / b > 0.6 || a > b", {"a": signal, "b": signal}, "bool")
    for a, b in flight:
        readings = {name: value for name, value in (("a", a), ("b", b)) if value is not None}
        fresh = compile_expression(known.text, {"a": signal, "b": signal}, "bool")
        assert known.evaluate(readings) == fresh.evaluate(readings)  # type: ignore[arg-type]
