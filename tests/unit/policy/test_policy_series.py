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
