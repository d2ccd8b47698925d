"""Charts and the page: well-formed, escaped, in range, and of colours that a theme names."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.link.controls import Scope
from kvpilot.simulate.report.figures import file_name
from kvpilot.simulate.report.markup import row, table
from kvpilot.simulate.report.style import CHARTS, PAGE
from kvpilot.simulate.report.svg import (
    Axis,
    Dot,
    Drawing,
    Line,
    Mark,
    Tick,
    nice,
    plot,
    rows,
    seconds,
    standalone,
)
from kvpilot.simulate.watch import moved

HOSTILE = "</title><script>alert('x')</script>&\"'"
SHARE = Axis(0, 1, (Tick(0, "0"), Tick(1, HOSTILE)))


def parsed(body: str, title: str = HOSTILE) -> ElementTree.Element:
    return ElementTree.fromstring(standalone(Drawing("x", title, 400, 200, body)))


def test_names_from_outside_are_text_and_nothing_else() -> None:
    lines = [Line(HOSTILE, "pilot", [(0, 0), (5, 1)]), Line("b", "best", [(0, 1), (9, 1)], filled=True)]
    body = plot((400, 200), seconds(10), SHARE, lines, [Mark(2, 4, HOSTILE), Mark(5, 5, HOSTILE)])
    _, dots = rows(
        400, nice(0, 1), [(HOSTILE, [Dot(0.5, "pilot", HOSTILE, (0.4, 0.6))])], [Mark(0.9, 0.9, HOSTILE)]
    )
    for drawn in (body, dots):
        tree = parsed(drawn)
        assert not [each for each in tree.iter() if each.tag.endswith("script")]
        assert HOSTILE in "".join(tree.itertext())
    assert "<script" not in table([], [row(HOSTILE, [HOSTILE])])


def test_a_drawing_is_inside_its_frame_whatever_its_values() -> None:
    wild = [(-5.0, -1e9), (3.0, 1e9), (99.0, float("inf")), (float("nan"), 0.5)]
    tree = parsed(plot((400, 200), seconds(10), nice(0, 1), [Line("a", "pilot", wild, stepped=True)]))
    paths = [each.get("d", "") for each in tree.iter() if each.get("class") == "line pilot"]
    numbers = [float(each) for path in paths for each in re.findall(r"-?\d+\.?\d*", path)]
    assert numbers
    assert all(0 <= each <= 400 for each in numbers)
    assert not re.search("nan|inf", "".join(paths))


@given(st.floats(0, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_hold_the_range(low: float, span: float) -> None:
    axis = nice(low, low + span)
    assert axis.low <= low + 1e-6 * span
    assert axis.high >= (low + span) * (1 - 1e-9)
    assert 2 <= len(axis.ticks) <= 7
    assert axis.share(axis.low - 1) == 0
    assert axis.share(axis.high + 1) == 1


@pytest.mark.parametrize("until_s", [0.5, 10, 150, 240, 1200])
def test_time_has_few_ticks_and_ends_with_the_run(until_s: float) -> None:
    axis = seconds(until_s)
    assert axis.high == until_s
    assert 2 <= len(axis.ticks) <= 13
    assert all(tick.at <= until_s for tick in axis.ticks)


def test_both_themes_name_the_same_colours_and_no_rule_names_another() -> None:
    light, dark = (set(re.findall(r"(--\w+):", part)) for part in CHARTS.split("prefers-color-scheme")[:2])
    assert light == dark
    assert set(re.findall(r"var\((--\w+)\)", PAGE)) <= light


def test_a_chart_of_any_tenant_is_a_file_of_its_own() -> None:
    assert file_name("knob", "max_running", "") == "knob-max_running"
    assert file_name("knob", "shed_fraction", "batch and below") == "knob-shed_fraction-batch-and-below"
    names = {
        file_name("knob", "shed_fraction", f"tenant {name}") for name in ("../a", "a", "..?a", "/" * 300)
    }
    assert len(names) == 4
    assert all(re.fullmatch(r"[\w.-]{1,100}", name) for name in names)


def test_knobs_over_time_begin_at_their_baseline() -> None:
    from kvpilot.simulate.replica import START_NS

    low = ("admission_credits", Scope("class_at_most", 0))
    held = {("max_running", Scope()): 50.0, low: 10.0}
    leases = [(START_NS + 10**9, held), (START_NS + 2 * 10**9, {low: 20.0})]
    found = moved(leases, {"max_running": (1, 100, 100)}, ("batch", "interactive"))
    assert [(each.knob, each.scope) for each in found] == [
        ("admission_credits", "batch"),
        ("max_running", ""),
    ]
    assert found[1].values == ((0.0, 100), (1.0, 50.0), (2.0, 100))
