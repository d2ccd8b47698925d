"""The telemetry page: ring, histograms, tables; readers that are late, pages that are torn."""

import struct
import threading
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from link_pages import IDENTITY, NONCE, Telemetry, manifest, read_at

from kvpilot.link.ending import Ending
from kvpilot.link.fields import STEP_FIELDS, Field, knob_field
from kvpilot.link.page import HEADER_BYTES, LinkError, PageHeader
from kvpilot.link.telemetry import TelemetryReader, TelemetryWriter, TenantRow, plan_page
from kvpilot.link.telemetry_page import MAX_CLASSES, MAX_TENANTS, PAGE_MAX_BYTES, RING_RECORDS


def sequences(records: list) -> list[int]:
    return [record.sequence for record in records]


def test_the_full_catalogue_fits_a_page() -> None:
    """Every field, eight echoes, at least 16,384 records: at most 16 MiB."""
    full = replace(manifest(), fields=(*STEP_FIELDS.values(), *(knob_field(f"knob_{i}") for i in range(8))))
    assert RING_RECORDS >= 16_384
    assert plan_page(full).page_bytes <= PAGE_MAX_BYTES


def test_too_many_fields_are_one_clear_error() -> None:
    huge = replace(manifest(), fields=tuple(Field(f"f{i}", "u64", "", "") for i in range(200)))
    with pytest.raises(LinkError, match=r"200 fields need .* a page holds at most"):
        plan_page(huge)


def test_records_come_once_in_order() -> None:
    page = Telemetry()
    page.write(3)
    records = page.reader.poll()
    assert sequences(records) == [1, 2, 3]
    assert records[2]["running"] == 3
    assert page.reader.poll() == []
    page.write(1)
    assert sequences(page.reader.poll()) == [4]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.sampled_from([1, 2, 5, 16]))
def test_a_reader_however_late_gets_the_newest_and_never_a_wrong_one(bursts: list[int], count: int) -> None:
    """Wrap-around: what was overwritten is skipped and counted; every record that comes is true."""
    page = Telemetry(record_count=count)
    total = got = 0
    for burst in bursts:
        page.write(burst)
        total += burst
        records = page.reader.poll()
        got += len(records)
        assert sequences(records) == list(range(total - min(burst, count) + 1, total + 1))
        assert all(record["steps_total"] == record.sequence for record in records)
    assert got + page.reader.skipped == total


def test_a_poll_is_bounded_and_keeps_the_newest() -> None:
    page = Telemetry(record_count=64)
    page.write(50)
    assert sequences(page.reader.poll(limit=10)) == list(range(41, 51))
    assert page.reader.skipped == 40


@given(st.integers(1, 8), st.integers(0, 63), st.integers(1, 255))
def test_a_damaged_record_is_skipped(sequence: int, position: int, flip: int) -> None:
    page = Telemetry()
    page.write(8)
    offset = page.record_offset(sequence)
    page.buffer[offset + position % page.plan.layout.size] ^= flip
    assert sequences(page.reader.poll()) == [n for n in range(1, 9) if n != sequence]


def test_a_record_being_written_comes_with_the_next_poll() -> None:
    page = Telemetry()
    page.write(3)
    offset = page.record_offset(3)
    whole = page.buffer[offset : offset + page.plan.layout.size]
    page.buffer[offset : offset + 8] = bytes(8)
    assert sequences(page.reader.poll()) == [1, 2]
    page.buffer[offset : offset + 8] = whole[:8]
    assert sequences(page.reader.poll()) == [3]
    assert page.reader.skipped == 0


def test_a_head_seen_before_its_records_brings_no_records_of_the_lap_before() -> None:
    """Machines may reorder stores: what lies there is whole, and old."""
    page = Telemetry(record_count=8)
    page.write(10)
    page.reader.poll()
    struct.pack_into("<Q", page.buffer, page.plan.ring, 13)
    assert page.reader.poll() == []
    page.write(3)
    assert sequences(page.reader.poll()) == [11, 12, 13]


def test_a_record_torn_at_the_first_look_is_whole_at_the_second() -> None:
    page = Telemetry()
    page.write(2)
    looks = []

    def tear_once(offset: int, size: int) -> bytes:
        looks.append(offset)
        data = bytearray(page.buffer[offset : offset + size])
        if len(looks) == 2:
            data[-8] ^= 1
        return bytes(data)

    reader = page.new_reader()
    reader._read_at = tear_once
    assert sequences(reader.poll()) == [1, 2]


def test_the_page_of_a_writer_that_died_half_way_reads_to_its_last_whole_record() -> None:
    """The flight recorder: a new reader, after a crash in the middle of a record."""
    page = Telemetry()
    page.write(9)
    page.buffer[page.record_offset(9) + 16 :][:4] = b"\xff" * 4
    page.buffer[page.record_offset(9) + 16] ^= 0xFF
    assert sequences(page.new_reader().poll()) == list(range(1, 9))


@settings(max_examples=60)
@given(st.floats(0, 1), st.integers(0, 2))
def test_a_page_truncated_under_its_reader_loses_records_and_nothing_else(kept: float, before: int) -> None:
    """Someone cuts the file at any byte: no exception, no wrong record."""
    page = Telemetry()
    page.write(before)
    page.reader.poll()
    page.write(5)
    whole = bytes(page.buffer)
    short = whole[: round(kept * len(whole))]
    page.reader._read_at = lambda offset, size: short[offset : offset + size]
    assert all(record["steps_total"] == record.sequence for record in page.reader.poll())
    page.reader.histogram("itl")
    assert page.reader.classes() == page.reader.tenants() == ()


def test_a_page_truncated_to_nothing_is_not_a_page() -> None:
    with pytest.raises(LinkError, match="not a kvpilot telemetry page"):
        TelemetryReader(read_at(bytearray()))


def test_a_damaged_manifest_is_refused() -> None:
    page = Telemetry()
    page.buffer[HEADER_BYTES + 3] ^= 1
    with pytest.raises(LinkError, match="damaged manifest"):
        page.new_reader()


def test_unknown_fields_and_keys_are_read_past() -> None:
    """A newer engine's field is one more column, its manifest key is ignored; the rest stays in place."""
    newer = replace(manifest(), fields=(Field("warp_factor", "f64", "-", "New."), STEP_FIELDS["running"]))
    plan = plan_page(newer, 16)
    buffer = bytearray(plan.page_bytes)
    writer = TelemetryWriter(buffer, newer, nonce=NONCE, identity=IDENTITY, record_count=16)
    body = plan.manifest_json[:-1] + b',"shields":"up"}'
    buffer[HEADER_BYTES : HEADER_BYTES + len(body)] = body
    header = PageHeader.unpack(buffer, "telemetry")
    buffer[:HEADER_BYTES] = replace(header, body_bytes=len(body), body_crc=zlib.crc32(body)).pack()
    writer.write_step((9.5,), (4,))
    record = TelemetryReader(read_at(buffer)).poll()[0]
    assert (record["running"], record["warp_factor"], record.get("waiting")) == (4, 9.5, None)


def test_values_that_do_not_fit_are_an_error_of_the_writer() -> None:
    page = Telemetry()
    for values in [(1, 2, 3), (1, 2, 3, -1), (1, 2, 3, 0.5)]:
        with pytest.raises(struct.error):
            page.writer.write_step(values)
    assert page.reader.poll() == []


def test_a_second_writing_thread_is_refused() -> None:
    page = Telemetry()
    page.write(1)
    caught: list[Exception] = []

    def write() -> None:
        try:
            page.write(1)
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert len(caught) == 1
    assert sequences(page.reader.poll()) == [1]


def test_histograms_are_per_class_and_together() -> None:
    page = Telemetry()
    for level, count in ((0, 2), (1, 3)):
        histogram = page.writer.histogram("ttft", level)
        for _ in range(count):
            histogram.record(10**8)
        histogram.flush()
    page.writer.histogram("step").record(10**7)
    page.writer.histogram("step").flush()
    asked = [("ttft", 0), ("ttft", 1), ("ttft", None), ("step", None)]
    counts = [page.reader.histogram(name, level).count for name, level in asked]
    assert counts == [2, 3, 5, 1]
    assert page.reader.histogram("itl").count == 0
    assert page.reader.histogram("no_such") is None
    assert page.reader.histogram("ttft", MAX_CLASSES) is None


def test_histograms_do_not_overlap() -> None:
    page = Telemetry()
    names = [(name, level) for name in ("itl", "ttft", "queue_wait") for level in range(MAX_CLASSES)]
    for n, (name, level) in enumerate([*names, ("step", 0)], start=1):
        histogram = page.writer.histogram(name, level)
        for _ in range(n):
            histogram.record(2**60 if n % 2 else 0)
        histogram.flush()
    page.write(20)
    page.writer.set_class(0, 1, 1)
    for n, (name, level) in enumerate([*names, ("step", 0)], start=1):
        assert page.reader.histogram(name, level).count == n


def test_classes_that_were_never_told_are_absent() -> None:
    page = Telemetry()
    page.writer.set_class(1, 4, 900)
    assert page.reader.classes() == (("interactive", 4, 900),)
    page.writer.set_class(1, 0, 0)
    page.writer.set_class(0, 7, 70)
    assert page.reader.classes() == (("batch", 7, 70), ("interactive", 0, 0))


def test_too_many_classes_are_one_clear_error() -> None:
    with pytest.raises(LinkError, match="9 classes: the link holds at most 8"):
        plan_page(manifest(classes=tuple("abcdefghi")))


def test_the_tenant_table_is_bounded_and_gives_up_who_holds_nothing() -> None:
    page = Telemetry()
    for i in range(MAX_TENANTS):
        assert page.writer.set_tenant(TenantRow(f"t{i}", 1, 0, 8, 0, i))
    assert not page.writer.set_tenant(TenantRow("late", 1, 0, 1, 0, 0))
    assert page.writer.set_tenant(TenantRow("t5", 0, 0, 0, 99, 5))
    assert page.writer.set_tenant(TenantRow("late", 1, 0, 1, 0, 0))
    names = [row.name for row in page.reader.tenants()]
    assert len(names) == MAX_TENANTS
    assert "late" in names
    assert "t5" not in names


def test_counts_by_tenant_are_read_by_name() -> None:
    """Only where the manifest has columns for them, and only of tenants that have a row."""
    page = Telemetry(tenant_columns=("queried", "hit"))
    assert not page.writer.set_tenant_counts("acme", (1, 0))
    page.writer.set_tenant(TenantRow("acme", 1, 0, 8, 0, 0))
    page.writer.set_tenant(TenantRow("zürich", 1, 0, 8, 0, 0))
    assert page.writer.set_tenant_counts("acme", (2**60, 7))
    assert page.new_reader().tenant_counts() == {"acme": {"queried": 2**60, "hit": 7}}
    assert page.writer.set_tenant_counts("zürich", (5, 0))
    assert page.reader.tenant_counts()["zürich"] == {"queried": 5, "hit": 0}
    page.writer.write_ending(Ending("closed", 0, 0, ""))
    assert page.reader.ending() is not None
    assert [row.name for row in page.reader.tenants()] == ["acme", "zürich"]
    without = Telemetry()
    without.writer.set_tenant(TenantRow("acme", 1, 0, 8, 0, 0))
    assert not without.writer.set_tenant_counts("acme", ())
    assert without.reader.tenant_counts() == {}


def test_counts_of_a_tenant_that_lost_its_row_go_with_it() -> None:
    page = Telemetry(tenant_columns=("hit",))
    for i in range(MAX_TENANTS):
        page.writer.set_tenant(TenantRow(f"t{i}", 0, 0, 0, 0, 0))
        page.writer.set_tenant_counts(f"t{i}", (i,))
    page.writer.set_tenant(TenantRow("late", 1, 0, 1, 0, 0))
    assert page.writer.set_tenant_counts("late", (99,))
    counts = page.reader.tenant_counts()
    assert counts["late"] == {"hit": 99}
    assert len(counts) == MAX_TENANTS


def test_too_many_columns_are_one_clear_error() -> None:
    with pytest.raises(LinkError, match="33 columns of tenants: at most 32"):
        Telemetry(tenant_columns=tuple(map(str, range(33))))


def test_a_torn_row_is_missing_not_wrong() -> None:
    page = Telemetry()
    page.writer.set_class(0, 1, 10)
    page.buffer[page.plan.classes + 8] ^= 1
    assert page.reader.classes() == ()


def test_before_the_first_step_there_is_no_boundary() -> None:
    page = Telemetry()
    assert page.reader.boundary_ns() is None
    page.writer.mark_boundary(7)
    assert page.reader.boundary_ns() == 7
    assert page.reader.poll() == [], "a boundary is no record"


@settings(max_examples=60)
@given(st.integers(0, 70), st.sampled_from([1, 5, 16]), st.integers(0, 2**64 - 1))
def test_the_whole_ring_reads_without_its_head(written: int, count: int, head: int) -> None:
    """The head word carries no checksum: a flight recorder must not depend on it."""
    page = Telemetry(record_count=count)
    page.write(written)
    struct.pack_into("<Q", page.buffer, page.plan.ring, head)
    assert sequences(page.new_reader().ring()) == list(range(max(0, written - count) + 1, written + 1))


def test_the_whole_ring_without_what_is_torn() -> None:
    page = Telemetry(record_count=8)
    page.write(12)
    for sequence in (7, 12):
        page.buffer[page.record_offset(sequence) + 20] ^= 1
    assert sequences(page.new_reader().ring()) == [5, 6, 8, 9, 10, 11]


def test_a_record_of_the_lap_before_is_not_of_the_ring() -> None:
    """Left where its successor is missing, as while a writer passes a reader of the whole ring."""
    page = Telemetry(record_count=8)
    page.write(3)
    old = page.buffer[page.record_offset(3) : page.record_offset(4)]
    page.write(9)
    page.buffer[page.record_offset(11) : page.record_offset(11) + len(old)] = old
    assert sequences(page.new_reader().ring()) == [5, 6, 7, 8, 9, 10, 12]


@pytest.mark.parametrize(
    "change",
    [
        {"sections": (288, 2**63, 300, 400, 500)},
        {"sections": (0, 1, 2, 3, 4)},
        {"record_count": 2**60},
        {"page_bytes": 2**62},
    ],
)
def test_a_header_that_points_outside_its_page_is_refused(change: dict[str, object]) -> None:
    page = Telemetry()
    header = PageHeader.unpack(page.buffer, "telemetry")
    page.buffer[:HEADER_BYTES] = replace(header, **change).pack()
    with pytest.raises(LinkError, match="its sections do not lie inside it"):
        page.new_reader()
