"""Where claims may lie: every engine's grid, every rule's bounds."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.grid import place, recover_step, stride
from kvpilot.policy.rules import Action, Recover

ALL = Scope("all")


@st.composite
def knobs(draw: st.DrawFn) -> ManifestKnob:
    name = draw(st.sampled_from(["prefill_chunk_tokens", "shed_fraction"]))
    low, baseline, high = sorted(draw(st.tuples(*[st.integers(0, 200)] * 3)))
    scale = 0.005 if name == "shed_fraction" else 1
    grain = draw(st.sampled_from([1, 3, 16, 64]))
    return ManifestKnob(name, "", low * scale, high * scale, baseline * scale, grain * scale, "")


def action(knob: ManifestKnob, low: float, high: float, step: float | None = None) -> Action:
    return Action(knob.name, ALL, "set", 0.0, low, high, step)


@given(knobs(), st.floats(-500, 500))
def test_snapping_is_idempotent_and_keeps_to_the_limits(knob: ManifestKnob, value: float) -> None:
    """Otherwise the engine would put in force something else than what was decided."""
    snapped = knob.snap(value)
    assert knob.snap(snapped) == snapped
    assert knob.minimum <= snapped <= knob.maximum
    assert knob.snap(knob.baseline) == knob.baseline


@given(
    knobs(), st.floats(-500, 500), st.integers(0, 200), st.integers(0, 200), st.sampled_from([None, 1.0, 7.0])
)
def test_what_is_placed_is_what_the_engine_holds(
    knob: ManifestKnob, wish: float, low: int, high: int, step: float | None
) -> None:
    assume(low <= high)
    placed = place(wish, action(knob, low, high, step), knob)
    assert knob.snap(placed.value) == placed.value
    assert knob.minimum <= placed.value <= knob.maximum


@given(knobs(), st.floats(-200, 400), st.floats(0.001, 100) | st.floats(-100, -0.001))
def test_recovery_always_ends_and_never_leaves_the_way_home(
    knob: ManifestKnob, start: float, add: float
) -> None:
    free = action(knob, -1e9, 1e9)
    value: float | None = knob.snap(start)
    assume(value != knob.baseline)
    for _ in range(100_000):
        assert value is not None
        nearer = recover_step(value, Recover(knob.name, ALL, add, 1), free, knob)
        if nearer is None:
            return
        assert abs(knob.baseline - nearer) < abs(knob.baseline - value)
        assert (knob.baseline - nearer) * (knob.baseline - value) > 0, "never past baseline"
        value = nearer
    raise AssertionError("recovery does not end")


@pytest.mark.parametrize(
    ("wish", "step", "value"), [(716.8, 64, 704), (700, 64, 640), (1000.0, 100, 1000), (3 * 0.1 * 10, 1, 3)]
)
def test_steps_round_to_the_protective_side_down(wish: float, step: float, value: float) -> None:
    knob = ManifestKnob("prefill_chunk_tokens", "tokens", 1, 4096, 2048, 1, "")
    assert place(wish, action(knob, 1, 4096, step), knob).value == value


@pytest.mark.parametrize(("wish", "value"), [(0.1 + 0.05, 0.15), (0.3, 0.3), (0.31, 0.35)])
def test_steps_round_to_the_protective_side_up(wish: float, value: float) -> None:
    """A few ulps above a multiple is that multiple."""
    knob = ManifestKnob("shed_fraction", "ratio", 0, 1, 0, 0.01, "")
    assert place(wish, action(knob, 0, 1, 0.05), knob).value == pytest.approx(value)


def test_a_few_ulps_below_a_multiple_is_that_multiple() -> None:
    """0.3 / 0.1 is 2.9999999999999996: not 2."""
    knob = ManifestKnob("admission_watermark", "ratio", 0.1, 1, 1, 0.01, "")
    assert place(0.3, action(knob, 0.1, 1, 0.1), knob).value == pytest.approx(0.3)


def test_the_engines_limits_win_where_they_do_not_meet_the_rules() -> None:
    knob = ManifestKnob("prefill_chunk_tokens", "tokens", 512, 4096, 2048, 16, "")
    assert place(100, action(knob, 32, 256), knob) == (512, True)


DRAFTS = ManifestKnob("speculative_tokens", "tokens", 0, 8, 4, 1, "")


def test_a_small_step_on_whole_numbers_is_a_step_of_one() -> None:
    """1 times 0.6 rounds to 1 again: the rule would say that it acts and change nothing."""
    bounds = action(DRAFTS, 0, 8)
    values, value = [], 8.0
    for _ in range(8):
        value = stride(value, value * 0.6, bounds, DRAFTS).value
        values.append(value)
    assert values == [5, 3, 2, 1, 0, 0, 0, 0]
    assert stride(3, 3.2, bounds, DRAFTS).value == 4
    assert stride(0, 0 * 0.6, bounds, DRAFTS).value == 0, "nothing times anything stays nothing"


def test_a_step_never_leaves_the_bounds() -> None:
    assert stride(2, 1.9, action(DRAFTS, 2, 8), DRAFTS).value == 2
    assert stride(8, 8.1, action(DRAFTS, 2, 8), DRAFTS).value == 8


@given(knobs(), st.floats(-200, 400), st.floats(-200, 400), st.sampled_from([None, 1.0, 7.0]))
def test_a_step_moves_the_way_it_was_meant_or_not_at_all(
    knob: ManifestKnob, start: float, wish: float, step: float | None
) -> None:
    bounds = action(knob, -1000, 1000, step)
    value = place(start, bounds, knob).value
    moved = stride(value, wish, bounds, knob).value
    assert knob.snap(moved) == moved
    # Rounding to the protective side may go against a wish that is less than one place away.
    assert (moved - value) * (wish - value) >= 0 or abs(wish - value) < max(knob.granularity, step or 0)


@pytest.mark.parametrize(("wish", "value"), [(float("inf"), 8), (float("-inf"), 2)])
def test_an_infinite_wish_ends_at_the_bound(wish: float, value: float) -> None:
    assert place(wish, action(DRAFTS, 2, 8, 2.0), DRAFTS).value == value
