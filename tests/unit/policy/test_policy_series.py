"""promtool's series notation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.policy.series import MAX_SAMPLES, NOTHING, STALE, SeriesError, parse_series


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        ("0.02x3", [0.02] * 4),
        ("1+2x3", [1, 3, 5, 7]),
        ("1-2x3", [1, -1, -3, -5]),
        ("-2+4x3", [-2, 2, 6, 10]),
        ("5", [5]),
        ("_ 1 _x3 stale 2x0", [NOTHING, 1, NOTHING, NOTHING, NOTHING, STALE, 2]),
        ("1e-3 .5 inf", [0.001, 0.5, float("inf")]),
    ],
)
def test_notation(text: str, samples: list[object]) -> None:
    assert list(parse_series(text)) == pytest.approx(samples) if text[0] != "_" else samples


@pytest.mark.parametrize(
    ("text", "offset"), [("", 0), ("1 2y3 4", 2), ("1 x3", 2), ("stalex3", 0), (f"1 1x{MAX_SAMPLES}", 2)]
)
def test_mistakes(text: str, offset: int) -> None:
    with pytest.raises(SeriesError) as caught:
        parse_series(text)
    assert caught.value.offset == offset


@given(st.text("0123456789.+-xe_ stalinf", max_size=30))
def test_any_text(text: str) -> None:
    try:
        assert parse_series(text)
    except SeriesError as error:
        assert 0 <= error.offset <= len(text)  # noqa: PT017


@given(st.lists(st.sampled_from(["1+2x3", "_", "_x3", "stale", "5", "_x0", "2-1x2"]), min_size=1, max_size=8))
def test_a_sample_by_its_place_is_the_one_that_was_written(items: list[str]) -> None:
    written = {
        "1+2x3": [1, 3, 5, 7], "_": [NOTHING], "_x3": [NOTHING] * 3, "stale": [STALE], "5": [5], "_x0": [],
        "2-1x2": [2, 1, 0],
    }  # fmt: skip
    expected = [sample for item in items for sample in written[item]]
    if not expected:
        return
    series = parse_series(" ".join(items))
    assert len(series) == len(expected)
    assert [series[i] for i in range(len(series))] == list(series) == series[:] == expected
    assert series[-1] == expected[-1]
    with pytest.raises(IndexError):
        series[len(series)]


def test_many_samples_cost_what_was_written() -> None:
    many = [parse_series(f"{i}x{MAX_SAMPLES - 1}") for i in range(10_000)]
    assert many[7][MAX_SAMPLES - 1] == 7
