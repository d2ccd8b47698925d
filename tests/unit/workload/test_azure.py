"""Azure traces: read exactly, refused clearly, scaled without losing their shape."""

import contextlib
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpilot.workload.arrival import Speed
from kvpilot.workload.azure import TraceError, TraceRow, parse_azure, read_azure, scale
from kvpilot.workload.generator import CLASSES

SPEED = Speed(6000, 1500)
TEXT = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8

2023-11-16 18:18:04.0319600,110,27
"""


def _at_gaps(gaps: list[tuple[float, int, int]]) -> list[TraceRow]:
    times = accumulate(gap for gap, _, _ in gaps)
    return [TraceRow(at_s, prompt, output) for at_s, (_, prompt, output) in zip(times, gaps, strict=True)]


rows = st.lists(
    st.tuples(st.floats(0, 30), st.integers(0, 9000), st.integers(0, 2000)), min_size=1, max_size=40
).map(_at_gaps)


def test_rows_are_read_as_they_are() -> None:
    first, second, third = parse_azure(TEXT.splitlines())
    assert first == TraceRow(0.0, 4808, 10)
    assert second == TraceRow(pytest.approx(0.052), 3180, 8)
    assert third.at_s == pytest.approx(60.052)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no rows"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no rows"),
        ("a,b\n1,2\n", "t:1: the header"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1\n", "t:2: not a time"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "t:2: not a time"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,-1,2\n", "t:2: not a time"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1,2\n2023-11-16 18:17:02,1,2\n",
            "t:3: earlier",
        ),
    ],
)
def test_a_bad_trace_is_one_clear_line(text: str, says: str) -> None:
    with pytest.raises(TraceError) as caught:
        parse_azure(text.splitlines(), "t")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text())
def test_any_text_is_rows_or_a_trace_error(text: str) -> None:
    with contextlib.suppress(TraceError):
        assert parse_azure(text.splitlines())


def test_a_missing_or_binary_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_azure(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(TraceError, match="not text"):
        read_azure(tmp_path / "binary.csv")


@settings(deadline=None, max_examples=60)
@given(rows, st.integers(0, 99), st.floats(0.3, 2.0), st.integers(64, 4096))
def test_a_scaled_run_holds_its_load_and_fits_the_model(
    trace: list[TraceRow], seed: int, load: float, max_tokens: int
) -> None:
    arrivals = scale(trace, seed, 5.0, load, SPEED, max_tokens)
    work_s = sum(SPEED.seconds(a.prompt_tokens, a.output_tokens) for a in arrivals)
    largest = max(SPEED.seconds(a.prompt_tokens, a.output_tokens) for a in arrivals)
    assert load * 5.0 <= work_s + 1e-9
    assert work_s - largest < load * 5.0
    assert all(a.prompt_tokens >= 1 and a.output_tokens >= 1 for a in arrivals)
    assert all(a.prompt_tokens + a.output_tokens <= max_tokens for a in arrivals)
    times = [a.at_s for a in arrivals]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= 5.0
    assert {a.klass for a in arrivals} <= {mix.name for mix in CLASSES}


def test_gaps_next_to_nothing_are_still_pressed_into_the_seconds() -> None:
    arrivals = scale([TraceRow(5e-324, 0, 0)], 0, 5.0, 1.0, SPEED, 64)
    assert all(0 <= a.at_s <= 5.0 for a in arrivals)


def test_the_shape_of_a_burst_survives() -> None:
    """Ten requests in a second, then nothing for nine, again and again: so it stays, whatever the speed."""
    trace = [TraceRow(10.0 * (i // 10) + 0.1 * (i % 10), 1000, 100) for i in range(1000)]
    arrivals = scale(trace, 1, 10.0, 1.0, SPEED, 2048)
    gaps = sorted(b.at_s - a.at_s for a, b in pairwise(arrivals))
    assert gaps[-1] / gaps[0] == pytest.approx(91, rel=0.05)


def test_ratios_of_lengths_survive() -> None:
    trace = [TraceRow(float(i), 4000, 1000) for i in range(100)]
    one = scale(trace, 1, 5.0, 1.0, SPEED, 1000)[0]
    assert (one.prompt_tokens, one.output_tokens) == (800, 200)


def test_same_seed_same_run() -> None:
    trace = parse_azure(TEXT.splitlines())
    assert scale(trace, 1, 5.0, 1.0, SPEED, 2048) == scale(trace, 1, 5.0, 1.0, SPEED, 2048)


@pytest.mark.parametrize("bad", [{"seconds": 0.0}, {"load": 0.0}, {"max_tokens": 1}])
def test_an_empty_run_is_refused(bad: dict[str, float]) -> None:
    kwargs = {"seconds": 5.0, "load": 1.0, "max_tokens": 2048} | bad
    with pytest.raises(ValueError, match="too small"):
        scale([TraceRow(0, 1, 1)], 1, speed=SPEED, **kwargs)
