"""Format version 1 is frozen: pages as they were written on the day of the freeze, byte by byte.

A difference here is not to be repaired by writing `golden/` anew: it means a format version 2, or a mistake.
What may grow (`docs/link.md`: JSON keys, a valve's columns) is left out of the comparison. The files are the
pages below, by `gzip.compress(page, mtime=0)`.
"""

import gzip
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from link_pages import NONCE, read_at

from kvpilot.link.controls import CONTROLS_BYTES, ControlsWriter, Lease, Scope, newest_slot
from kvpilot.link.ending import Ending
from kvpilot.link.fields import Field
from kvpilot.link.manifest import Manifest, ManifestKnob
from kvpilot.link.page import HEADER_BYTES, VERSION, Identity, PageHeader
from kvpilot.link.telemetry import TelemetryReader, TelemetryWriter, TenantRow, plan_page
from kvpilot.link.valve_layout import VALVE_PAGE_BYTES
from kvpilot.link.valve_writer import ValvePageWriter

GOLDEN = Path(__file__).parent / "golden"
IDENTITY = Identity("höst", "0123456789ab", 1_700_000_000_123_456_789, 42)
MANIFEST_BYTES = 32_768


def manifest() -> Manifest:
    knob = ManifestKnob("max_running", "requests", 1, 64, 32, 1, "drains")
    fields = (Field("time_ns", "u64", "ns", "t"), Field("x", "f64", "ratio", "x"), Field("n", "u64", "", "n"))
    return Manifest("test", "1", "tiny", 16, 64, 1024, 2048, "cpu", (knob,), fields, ("batch", "interactive"))


def telemetry() -> bytes:
    """Every section used: a ring of 4 after 6 records, three histograms, classes, tenants, an ending."""
    buffer = bytearray(plan_page(manifest(), 4).page_bytes)
    writer = TelemetryWriter(buffer, manifest(), nonce=NONCE, identity=IDENTITY, record_count=4)
    for n in range(1, 7):
        writer.mark_boundary(1000 * n - 5)
        writer.write_step((1000 * n, n / 3), (2**63 + n,))
    for name, level in (("itl", 1), ("queue_wait", 7), ("step", 0)):
        histogram = writer.histogram(name, level)
        for duration_ns in (1, 10**6, 10**9, 2**50):
            histogram.record(duration_ns)
        histogram.flush()
    writer.set_class(1, 4, 900)
    writer.set_tenant(TenantRow("acme", 1, 2, 3, 4, 5))
    writer.set_tenant(TenantRow("zürich", 6, 7, 8, 9, 10))
    writer.write_ending(Ending("exception", 5, 6, "torch.OutOfMemoryError\nw.py:run:7"))
    return bytes(buffer)


def controls() -> bytes:
    page = bytearray(CONTROLS_BYTES)
    writer = ControlsWriter(page, IDENTITY)
    writer.write([Lease("max_running", Scope(), 8, 2 * 10**9, 1, 7)], NONCE)
    writer.write(
        [
            Lease("max_running", Scope(), 8.5, 2 * 10**9, 2, 7),
            Lease("shed_fraction", Scope("class_at_most", 1), 0.25, 10**9, 9, 8, order=True),
            Lease("shed_fraction", Scope("tenant", "acme"), 1, 10**9, 9, 2**63),
        ],
        NONCE,
    )
    return bytes(page)


def valve() -> bytes:
    buffer = bytearray(VALVE_PAGE_BYTES)
    writer = ValvePageWriter(buffer, ("batch", "interactive"), nonce=NONCE, identity=IDENTITY)
    writer.admitted(1, "acme", 500, 10, tokens=100)
    writer.shed(0, "", 40, "credits")
    writer.beat(99, (0.25, 0.0), 3)
    return bytes(buffer)


PAGES: dict[str, Callable[[], bytes]] = {"telemetry": telemetry, "controls": controls, "valve": valve}


def golden(kind: str) -> bytes:
    return gzip.decompress((GOLDEN / f"{kind}-1.kvp.gz").read_bytes())


def without_json(page: bytes) -> bytes:
    """The page with its JSON, and what the header says of that, blanked."""
    blank = bytearray(page)
    blank[48:64] = bytes(16)
    blank[248:256] = bytes(8)
    blank[HEADER_BYTES : HEADER_BYTES + MANIFEST_BYTES] = bytes(MANIFEST_BYTES)
    return bytes(blank)


def test_the_version_is_the_one_that_is_frozen() -> None:
    assert VERSION == 1


def test_telemetry_is_written_as_on_the_first_day() -> None:
    assert without_json(telemetry()) == without_json(golden("telemetry"))


def test_controls_are_written_as_on_the_first_day() -> None:
    assert controls() == golden("controls")


@pytest.mark.parametrize("kind", PAGES)
def test_headers_are_written_as_on_the_first_day(kind: str) -> None:
    """But for what depends on the JSON and, in a valve's page, on its columns."""
    then, now = golden(kind)[:HEADER_BYTES], PAGES[kind]()[:HEADER_BYTES]
    assert now[:16] == then[:16]
    assert now[24:48] == then[24:48]
    assert now[128:248] == then[128:248]
    assert zlib.crc32(then[:248]) == struct.unpack("<Q", then[248:])[0]


def test_telemetry_of_the_first_day_is_read() -> None:
    reader = TelemetryReader(read_at(bytearray(golden("telemetry"))))
    assert (reader.nonce, reader.identity) == (NONCE, IDENTITY)
    assert reader.manifest == manifest()
    records = reader.poll()
    assert [(record.sequence, record["time_ns"], record["x"], record["n"]) for record in records] == [
        (n, 1000 * n, n / 3, 2**63 + n) for n in range(3, 7)
    ]
    assert [dict(record) for record in reader.ring()] == [dict(record) for record in records]
    assert reader.boundary_ns() == 5995
    histogram = reader.histogram("itl", 1)
    assert histogram is not None
    assert (histogram.count, histogram.sum_ns) == (4, 1 + 10**6 + 10**9 + 2**40)
    assert reader.classes() == (("interactive", 4, 900),)
    assert reader.tenants() == (("acme", 1, 2, 3, 4, 5), ("zürich", 6, 7, 8, 9, 10))
    assert reader.ending() == ("exception", 5, 6, "torch.OutOfMemoryError\nw.py:run:7")


def test_controls_of_the_first_day_are_read() -> None:
    slot = newest_slot(golden("controls"))
    assert slot is not None
    assert (slot.sequence, slot.nonce, slot.ignored) == (2, NONCE, 0)
    assert slot.leases == (
        Lease("max_running", Scope(), 8.5, 2 * 10**9, 2, 7),
        Lease("shed_fraction", Scope("class_at_most", 1), 0.25, 10**9, 9, 8, order=True),
        Lease("shed_fraction", Scope("tenant", "acme"), 1, 10**9, 9, 2**63),
    )


@pytest.mark.parametrize("page", [golden("valve"), valve()], ids=["then", "now"])
def test_a_valves_page_tells_its_own_columns(page: bytes) -> None:
    """Frames and columns: the way in which it may grow must not change."""
    header = PageHeader.unpack(page, "valve")
    body = json.loads(page[HEADER_BYTES : HEADER_BYTES + header.body_bytes])
    codes = {"u64": "Q", "f64": "d", "text": "32s"}
    columns = [column.rsplit(":", 1) for column in body["rows"]]
    layout = struct.Struct("<Q" + "".join(codes[type_] for _, type_ in columns) + "Q")
    assert layout.size == header.record_bytes
    raw = page[header.sections[2] : header.sections[2] + layout.size]
    _, *values, crc = layout.unpack(raw)
    assert zlib.crc32(raw[:-8]) == crc
    row = dict(zip([name for name, _ in columns], values, strict=True))
    assert (row["level"], row["tenant"].rstrip(b"\0"), row["admitted"], row["in_flight"]) == (
        1,
        b"acme",
        1,
        1,
    )
