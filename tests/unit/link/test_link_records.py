"""Records that say by themselves whether they are whole."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.link.fields import STEP_FIELDS, Field
from kvpilot.link.records import Frame, FrameWriter, StepLayout

U64 = st.integers(0, 2**64 - 1)
LAYOUT = StepLayout([STEP_FIELDS["time_ns"], STEP_FIELDS["running"], STEP_FIELDS["demand_16_p50_blocks"]])


def packed(body: str, sequence: int, *values: float) -> bytes:
    """A record as the module's first lines describe it."""
    covered = struct.pack(f"<Q{body}", sequence, *values)
    return covered + struct.pack("<Q", zlib.crc32(covered))


@given(U64.filter(bool), U64, U64, st.floats(allow_nan=False))
def test_round_trip(sequence: int, a: int, b: int, c: float) -> None:
    record = LAYOUT.unpack(packed("QQd", sequence, a, b, c))
    assert record is not None
    assert record.sequence == sequence
    assert dict(record) == {"time_ns": a, "running": b, "demand_16_p50_blocks": c}


def test_an_absent_field_is_absent_not_zero() -> None:
    record = LAYOUT.unpack(packed("QQd", 1, 1, 2, 3.0))
    assert record is not None
    assert record.get("oom_total") is None
    assert "oom_total" not in record
    with pytest.raises(KeyError):
        record["oom_total"]


@given(st.data())
def test_a_mixture_of_two_records_is_never_believed(data: st.DataObject) -> None:
    """Torn anywhere between two writes: the reader sees neither, unless all bytes of one are there."""
    old = packed("QQd", 5, 1, 2, 3.0)
    new = packed("QQd", 21, *data.draw(st.tuples(U64, U64, st.floats(allow_nan=False))))
    mask = data.draw(st.lists(st.booleans(), min_size=len(old) // 8, max_size=len(old) // 8))
    words = [(new if m else old)[8 * i : 8 * i + 8] for i, m in enumerate(mask)]
    torn = b"".join(words)
    record = LAYOUT.unpack(torn)
    if torn == old:
        assert record is not None
        assert record.sequence == 5
    elif torn == new:
        assert record is not None
        assert record.sequence == 21
    else:
        assert record is None


@given(st.integers(0, LAYOUT.size - 1))
def test_a_truncated_record_is_never_believed(size: int) -> None:
    assert LAYOUT.unpack(packed("QQd", 1, 1, 2, 3.0)[:size]) is None


def test_zeros_are_no_record() -> None:
    """The CRC-32 of a blank page must not happen to hold."""
    assert LAYOUT.unpack(bytes(LAYOUT.size)) is None


@given(U64.filter(bool), U64, st.floats(allow_nan=False), st.integers(0, 3))
def test_the_writer_writes_the_record_as_described(sequence: int, a: int, b: float, slot: int) -> None:
    frame = Frame("Qd")
    page = bytearray(4 * frame.size)
    FrameWriter(frame, memoryview(page).cast("Q")).write(slot * frame.words, sequence, a, b)
    assert page[slot * frame.size : (slot + 1) * frame.size] == packed("Qd", sequence, a, b)
    assert sum(page) == sum(packed("Qd", sequence, a, b)), "nothing beside its own slot"


def test_a_field_listed_twice_is_an_error() -> None:
    field = Field("x", "u64", "", "")
    with pytest.raises(ValueError, match="x: each field at most once"):
        StepLayout([field, field])
