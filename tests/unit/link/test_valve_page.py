"""The valve's page: what is written is what is read, every reading is whole, and the table is bounded."""

import contextlib
from dataclasses import replace
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.link.controls import MAX_LEASES, Scope
from kvpilot.link.page import HEADER_BYTES, Identity, LinkError, PageHeader
from kvpilot.link.records import FrameWriter
from kvpilot.link.valve_layout import MAX_ROWS, VALVE_PAGE_BYTES, Layout, Table
from kvpilot.link.valve_page import OTHER, LeaseEcho, ValvePageReader, ValveSnapshot
from kvpilot.link.valve_writer import ValvePageWriter

CLASSES = ("batch", "interactive")
TABLES = ("summary", "leases", "rows")
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
        assert all(r.offered_bytes == 100 * r.offered for r in snapshot.rows)
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


def test_what_a_request_was_taken_for_and_why_it_was_turned_away() -> None:
    writer, reader, _ = pair()
    writer.admitted(0, "", 1000, 1, 250)
    for why in ("fraction", "credits", "credits", "draining"):
        writer.shed(0, "", 100, why, 25)
    (row,) = read(reader).rows
    assert row.shed_by == {"fraction": 1, "credits": 2, "draining": 1}
    assert (row.offered, row.admitted, row.shed) == (5, 1, 4)
    assert (row.offered_bytes, row.admitted_bytes) == (1400, 1000)
    assert (row.offered_tokens, row.admitted_tokens) == (350, 250)


def test_classes_without_a_limit_have_no_credits_left_not_zero() -> None:
    writer, reader, _ = pair()
    writer.beat(1, (), 0, (-12.5,), bytes_per_token=3.5)
    assert read(reader).credits_left == {"batch": -12.5}
    assert read(reader).bytes_per_token == 3.5
    writer.beat(2, (), 0)
    assert read(reader).credits_left == {}
    assert read(reader).bytes_per_token is None


LEASES = st.lists(
    st.builds(
        LeaseEcho,
        st.sampled_from(["shed_fraction", "admission_credits"]),
        st.sampled_from([Scope(), Scope("class_at_most", 3), Scope("tenant", "café")]),
        *(st.floats(allow_nan=False, allow_infinity=False) for _ in range(5)),
        st.booleans(),
        st.integers(0, 2**60),
    ),
    max_size=MAX_LEASES,
)


@given(st.lists(LEASES, min_size=1, max_size=4))
def test_leases_are_read_as_written_and_with_them_the_table_they_belong_to(
    tables: list[list[LeaseEcho]],
) -> None:
    writer, reader, _ = pair()
    for number, leases in enumerate(tables):
        writer.beat(number, (), number, leases=leases)
        writer.shed(0, f"t{number}", 0)  # a new row writes the summary too
        assert read(reader).leases == reader.leases() == tuple(leases)


def test_leases_of_two_tables_are_never_mixed() -> None:
    """Half of a newer table is there: the older one is over, the newer one is not whole."""
    writer, _, page = pair()
    old, new = (LeaseEcho("shed_fraction", Scope("tenant", name), 0.5) for name in ("old", "new"))
    writer.beat(1, (), 0, leases=[old, old])
    before = bytes(page)
    writer.beat(2, (), 0, leases=[new, new])
    size = Layout.ours(CLASSES).leases.frame.size
    second = Layout.ours(CLASSES).leases_offset + size
    torn = page[:second] + before[second : second + size] + page[second + size :]
    reader = ValvePageReader(lambda offset, length: bytes(torn[offset : offset + length]))
    assert reader.leases() is None
    assert reader.read() is None


class TestLayout:
    """Readers find columns by name: a later release may have more of them, in any order."""

    def page_of(self, layout: Layout, values: dict[str, dict[str, object]]) -> bytes:
        """A page in `layout` with one row and one lease."""
        page = bytearray(layout.page_bytes)
        words = memoryview(page).cast("Q")
        tables = {
            "summary": (layout.summary, layout.summary_offset),
            "leases": (layout.leases, layout.leases_offset),
            "rows": (layout.rows, layout.rows_offset),
        }
        for name, (table, offset) in tables.items():
            blank = {column: b"" if kind == "text" else 0 for column, kind in table.columns}
            FrameWriter(table.frame, words).write(offset // 8, 1, *(blank | values[name]).values())
        body = layout.body()
        sections = (layout.summary_offset, layout.leases_offset, layout.rows_offset)
        header = PageHeader(
            "valve",
            len(page),
            7,
            WHO,
            len(body),
            crc32(body),
            layout.rows.frame.size,
            layout.max_rows,
            sections,
        )
        page[:HEADER_BYTES] = header.pack()
        page[HEADER_BYTES : HEADER_BYTES + len(body)] = body
        return bytes(page)

    def other(self, **columns: list[tuple[str, str]]) -> Layout:
        ours = Layout.ours(CLASSES)
        tables = {name: Table(columns.get(name, getattr(ours, name).columns)) for name in TABLES}
        second = ours.summary_offset + tables["summary"].frame.size
        third = second + 4 * tables["leases"].frame.size
        return Layout(CLASSES, *tables.values(), ours.summary_offset, second, third, 4, 3)

    def test_more_columns_in_another_order(self) -> None:
        ours = Layout.ours(CLASSES)
        more = {
            name: [("more", "text"), *reversed(getattr(ours, name).columns), ("mood", "f64")]
            for name in TABLES
        }
        values = {
            "summary": {"rows": 1, "leases": 1, "lease_table": 1, "taking": 3},
            "leases": {"knob": b"shed_fraction", "scope": 2, "level": 1, "value": 0.5},
            "rows": {"level": 1, "tenant": b"acme", "offered": 9, "admitted": 7, "shed_credits": 2},
        }
        data = self.page_of(self.other(**more), values)
        snapshot = read(ValvePageReader(lambda offset, size: data[offset : offset + size]))
        (row,), (lease,) = snapshot.rows, snapshot.leases
        assert (row.class_name, row.tenant, row.offered, row.shed) == ("interactive", "acme", 9, 2)
        assert (lease.knob, lease.scope, lease.value) == ("shed_fraction", Scope("class_at_most", 1), 0.5)
        assert snapshot.taking == 3

    @pytest.mark.parametrize(
        ("table", "columns", "message"),
        [
            ("rows", [("level", "u64")], "without rows"),
            ("summary", [("rows", "f64")], "without summary"),
            ("leases", [("knob", "text")], "without leases"),
        ],
    )
    def test_a_page_that_lacks_what_is_read_is_refused(
        self, table: str, columns: list[tuple[str, str]], message: str
    ) -> None:
        data = self.page_of(self.other(**{table: columns}), {name: {} for name in TABLES})
        with pytest.raises(LinkError, match=message):
            ValvePageReader(lambda offset, size: data[offset : offset + size])

    @pytest.mark.parametrize(
        "body",
        [
            b"[]",
            b"{}",
            b'{"classes":["a"],"max_leases":1,"summary":["rows:u16"],"leases":[],"rows":[]}',
            b'{"classes":["a"],"max_leases":1,"summary":[5],"leases":[],"rows":[]}',
            b"[" * 3000,
        ],
    )
    def test_a_body_that_makes_no_sense_is_one_clear_line(self, body: bytes) -> None:
        _, _, page = pair()
        header = PageHeader.unpack(page, "valve")
        page[:HEADER_BYTES] = replace(header, body_bytes=len(body), body_crc=crc32(body)).pack()
        page[HEADER_BYTES : HEADER_BYTES + len(body)] = body
        with pytest.raises(LinkError, match="kvpilot valve page"):
            ValvePageReader(lambda offset, size: bytes(page[offset : offset + size]))

    @pytest.mark.parametrize(
        "change",
        [
            {"sections": (0, 0, 0)},
            {"sections": (4352, 4352, 4352)},
            {"record_count": 2**40},
            {"page_bytes": 2**40, "record_count": 2**32},
        ],
    )
    def test_tables_that_do_not_fit_the_page_are_refused(self, change: dict[str, object]) -> None:
        _, _, page = pair()
        page[:HEADER_BYTES] = replace(PageHeader.unpack(page, "valve"), **change).pack()  # type: ignore[arg-type]
        with pytest.raises(LinkError, match="size"):
            ValvePageReader(lambda offset, size: bytes(page[offset : offset + size]))


def test_names_too_long_for_a_column_end_with_a_whole_character() -> None:
    writer, reader, _ = pair()
    writer.shed(0, "é" * 20, 0)
    writer.shed(0, "x" + "é" * 20, 0)
    assert [row.tenant for row in read(reader).rows] == ["é" * 16, "x" + "é" * 15]


def test_the_longest_class_names_fit() -> None:
    names = tuple(f"{number}" + "é" * 15 + "x" for number in range(8))
    assert pair(names)[1].classes == names


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
    row_at = page.index(b"acme") - 16
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
