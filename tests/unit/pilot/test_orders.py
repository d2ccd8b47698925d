"""Orders: what a person may order, and that it outlives the pilot that took it."""

from pathlib import Path

import pytest

from kvpilot.clock import NS, VirtualClock
from kvpilot.journal.records import OverrideRecord, Record, SwitchRecord
from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.orders import OrderError, Orders

ALL = Scope("all")
LIMITS = ManifestKnob("max_running", "requests", 1, 64, 64, 1, "per step")


def orders(clock: VirtualClock, rows: list[Record], off_file: Path | None = None) -> Orders:
    return Orders(clock, rows.append, off_file)


def hold(given: Orders, value: float | None = 8, for_s: float = 60, why: str = "test") -> None:
    given.override("max_running", ALL, value, for_s, why, "kim", LIMITS)


def test_an_override_ends_by_itself() -> None:
    clock = VirtualClock()
    given = orders(clock, [])
    hold(given)
    clock.advance(59.9)
    assert [order.value for order in given.in_force(clock.monotonic_ns())] == [8]
    clock.advance(0.2)
    assert given.in_force(clock.monotonic_ns()) == ()


def test_another_order_for_the_same_knob_replaces_it_and_none_ends_it() -> None:
    clock = VirtualClock()
    given = orders(clock, [])
    hold(given, 8)
    hold(given, 16)
    assert [order.value for order in given.in_force(0)] == [16]
    hold(given, None)
    assert given.in_force(0) == ()


def test_orders_are_journalled_and_restored_from_there_for_what_is_left_of_them() -> None:
    clock, rows = VirtualClock(), []
    given = orders(clock, rows)
    hold(given, 8, for_s=60)
    given.turn(True, "maintenance", "kim")
    # Another pilot: another monotonic clock, the same wall.
    later = VirtualClock(start_ns=5 * NS, wall_offset_ns=clock.wall_ns() + 20 * NS - 5 * NS)
    overrides = [row for row in rows if isinstance(row, OverrideRecord)]
    switch = next(row for row in rows if isinstance(row, SwitchRecord))
    restored = Orders(later, rows.append, None, overrides, switch)
    (order,) = restored.in_force(later.monotonic_ns())
    assert (order.value, order.why, order.who) == (8, "test", "kim")
    assert order.until_ns - later.monotonic_ns() == 40 * NS
    assert restored.off is not None
    later.advance(41)
    assert restored.in_force(later.monotonic_ns()) == ()


def test_a_file_named_off_in_the_policy_directory_is_off(tmp_path: Path) -> None:
    given = orders(VirtualClock(), [], tmp_path / "off")
    assert given.off is None
    (tmp_path / "off").touch()
    assert given.off is not None
    assert str(tmp_path / "off") in given.off.why
    with pytest.raises(OrderError, match="still off: remove the file"):
        given.turn(False, "", "kim")


def test_a_shadowing_configuration_is_off_until_it_is_changed() -> None:
    given = Orders(VirtualClock(), [].append, shadow=True)
    assert given.off is not None
    assert "shadow: true" in given.off.why
    with pytest.raises(OrderError, match="still off: remove `shadow: true`"):
        given.turn(False, "", "kim")
    assert given.off is not None


@pytest.mark.parametrize(
    ("knob", "scope", "value", "for_s", "why", "message"),
    [
        ("max_runing", ALL, 8, 60, "x", "no knob is called 'max_runing' (did you mean 'max_running'?)"),
        ("nonsense", ALL, 8, 60, "x", "no knob is called 'nonsense'; there are admission_credits, "),
        ("max_running", ALL, 65, 60, "x", "max_running=65: this engine takes 1 to 64"),
        ("max_running", ALL, float("nan"), 60, "x", "max_running=nan"),
        ("max_running", ALL, 8, 0, "x", "more than 0"),
        ("max_running", ALL, 8, 1e9, "x", "at most 24h"),
        ("max_running", ALL, 8, 60, " ", "needs a reason"),
        ("max_running", Scope("class_at_most", 0), 8, 60, "x", "takes no scope"),
        ("max_running", ALL, None, 0, "", "no override of max_running (all) is in force"),
    ],
)
def test_an_order_that_makes_no_sense_changes_nothing(
    knob: str, scope: Scope, value: float | None, for_s: float, why: str, message: str
) -> None:
    rows: list[Record] = []
    given = orders(VirtualClock(), rows)
    with pytest.raises(OrderError) as caught:
        given.override(knob, scope, value, for_s, why, "kim", LIMITS)
    assert message in str(caught.value)
    assert rows == []
    assert given.in_force(0) == ()


def test_off_needs_a_reason() -> None:
    with pytest.raises(OrderError, match="off needs a reason"):
        orders(VirtualClock(), []).turn(True, "", "kim")
