"""The valve's page: what is written is what is read, every reading is whole, and the table is bounded."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.link.page import Identity, LinkError
from kvpilot.link.valve_page import (
    MAX_ROWS,
    OTHER,
    VALVE_PAGE_BYTES,
    ValvePageReader,
    ValvePageWriter,
    ValveSnapshot,
)

CLASSES = ("batch", "interactive")
WHO = Identity("host", "abc", 1, 2)


def pair(classes: tuple[str, ...] = CLASSES) -> tuple[ValvePageWriter, ValvePageReader, bytearray]:
    page = bytearray(VALVE_PAGE_BYTES)
    writer = ValvePageWriter(page, classes, nonce=7, identity=WHO)
    return writer, ValvePageReader(lambda offset, size: bytes(page[offset : offset + size])), page


def read(reader: ValvePageReader) -> ValveSnapshot:
    snapshot = reader.read()
    assert snapshot is not None
    return snapshot


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["admit", "shed", "end"]),
            st.integers(0, 1),
            st.sampled_from(["", "acme", "café"]),
        ),
        max_size=60,
    )
)
def test_counts_conserve_in_every_reading(events: list[tuple[str, int, str]]) -> None:
    """offered = admitted + shed, and in flight = admitted - ended, after each single event."""
    writer, reader, _ = pair()
    open_tickets: list[int] = []
    expected: dict[tuple[int, str], list[int]] = {}
    ended = 0
    for what, level, tenant in events:
        if what == "end":
            if open_tickets:
                writer.ended(open_tickets.pop())
                ended += 1
        else:
            counts = expected.setdefault((level, tenant), [0, 0])
            counts[what == "shed"] += 1
            if what == "admit":
                open_tickets.append(writer.admitted(level, tenant, 100, 5))
            else:
                writer.shed(level, tenant, 100)
        snapshot = read(reader)
        assert {(r.level, r.tenant): [r.admitted, r.shed] for r in snapshot.rows} == expected
        assert all(r.offered == r.admitted + r.shed for r in snapshot.rows)
        assert all(r.body_bytes == 100 * r.offered for r in snapshot.rows)
        assert snapshot.in_flight == len(open_tickets) == sum(r.admitted for r in snapshot.rows) - ended
        assert all(r.class_name == CLASSES[r.level] for r in snapshot.rows)


def test_a_ticket_counts_once() -> None:
    writer, reader, _ = pair()
    first, second = (writer.admitted(0, "", 0, 1) for _ in range(2))
    for _ in range(3):
        writer.ended(first)
    assert read(reader).in_flight == writer.in_flight == 1
    writer.ended(second)
    assert read(reader).in_flight == 0


def test_the_summary_says_what_sheds_and_when_bytes_left() -> None:
    writer, reader, _ = pair()
    ticket = writer.admitted(1, "acme", 10, 1_000)
    writer.first_byte_ns, writer.last_byte_ns = 2_000, 3_000
    writer.failures, writer.controls_unreadable = 1, 2
    writer.beat(9_000, (0.5, 0.25), 42)
    snapshot = read(reader)
    assert snapshot.fractions == {"batch": 0.5, "interactive": 0.25}
    assert (snapshot.written_ns, snapshot.first_byte_ns, snapshot.last_byte_ns) == (9_000, 2_000, 3_000)
    assert (snapshot.failures, snapshot.controls_unreadable, snapshot.controls_sequence) == (1, 2, 42)
    assert snapshot.seconds_since_byte == pytest.approx(6e-6)
    writer.ended(ticket)
    writer.beat(9_500, (), 42)
    assert read(reader).seconds_since_byte is None


def test_silence_counts_from_the_oldest_request_that_still_waits() -> None:
    writer, reader, _ = pair()
    early, _late = writer.admitted(0, "", 0, 1_000), writer.admitted(0, "", 0, 8_000)
    writer.last_byte_ns = 500  # of an answer before both
    writer.beat(10_000, (), 0)
    assert read(reader).seconds_since_byte == pytest.approx(9e-6)
    writer.ended(early)
    writer.beat(10_000, (), 0)
    assert read(reader).oldest_in_flight_ns == 8_000
    assert read(reader).seconds_since_byte == pytest.approx(2e-6)


def test_tenants_beyond_the_table_are_counted_together() -> None:
    writer, reader, _ = pair()
    for number in range(1000):
        writer.shed(number % 2, f"t{number}", 0)
    rows = read(reader).rows
    assert len(rows) <= MAX_ROWS
    assert sum(r.offered for r in rows) == 1000
    others = {r.level: r.shed for r in rows if r.tenant == OTHER}
    assert others.keys() == {0, 1}
    assert sum(others.values()) == 1000 - (len(rows) - 2)


@given(st.integers(0, VALVE_PAGE_BYTES - 1), st.binary(min_size=1, max_size=64))
def test_damage_is_unknown_never_wrong(at: int, junk: bytes) -> None:
    """Whatever bytes are overwritten, a reading is the true one, or none at all, or a clear refusal."""
    writer, reader, page = pair()
    for number in range(20):
        writer.shed(number % 2, f"t{number % 5}", 10)
    truth = read(reader)
    page[at : at + len(junk)] = junk[: VALVE_PAGE_BYTES - at]
    try:
        fresh = ValvePageReader(lambda offset, size: bytes(page[offset : offset + size]))
    except LinkError:
        return
    assert fresh.read() in (truth, None)


@given(st.integers(0, VALVE_PAGE_BYTES))
def test_a_page_cut_short_is_unknown_or_refused(size: int) -> None:
    writer, reader, page = pair()
    writer.shed(0, "acme", 10)
    truth = read(reader)
    cut = bytes(page[:size])
    with contextlib.suppress(LinkError):
        assert ValvePageReader(lambda offset, n: cut[offset : offset + n]).read() in (truth, None)


@pytest.mark.parametrize(("torn_readings", "seen"), [(1, True), (3, True), (100, False)])
def test_a_row_torn_while_reading_is_read_again(torn_readings: int, seen: bool) -> None:
    """The writer is caught in the middle of a row: the next try sees it whole; never whole is unknown."""
    writer, _, page = pair()
    writer.shed(0, "acme", 10)
    row_at = page.index(b"acme") // 8 * 8 - 56
    readings = 0

    def read_at(offset: int, size: int) -> bytes:
        nonlocal readings
        data = bytearray(page[offset : offset + size])
        if offset == row_at:
            readings += 1
            if readings <= torn_readings:
                data[:8] = bytes(8)
        return bytes(data)

    snapshot = ValvePageReader(read_at).read()
    assert readings
    assert (snapshot is not None) == seen
    if snapshot is not None:
        assert [r.offered for r in snapshot.rows] == [1]


def test_another_page_is_refused_in_one_line() -> None:
    with pytest.raises(LinkError, match="not a kvpilot valve page"):
        ValvePageReader(lambda offset, size: bytes(size))


@pytest.mark.parametrize("size", [0, VALVE_PAGE_BYTES - 8, VALVE_PAGE_BYTES + 8])
def test_a_buffer_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(LinkError, match="needed"):
        ValvePageWriter(bytearray(size), CLASSES, nonce=1, identity=WHO)


def test_too_many_classes_are_refused() -> None:
    with pytest.raises(LinkError, match="9 classes"):
        pair(tuple("abcdefghi"))
