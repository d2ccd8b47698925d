"""`docs/link.md` is enough to read the link: real pages, by the numbers of its tables and no code of ours.

Only the writers under test, and what to compare with, come from kvpilot.
"""

import json
import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from link_pages import IDENTITY, NONCE, Controls, Telemetry

from kvpilot.inside.hook import StepHook
from kvpilot.link.controls import Lease, Scope
from kvpilot.link.ending import Ending
from kvpilot.link.histogram import bucket_bounds_ns, bucket_index
from kvpilot.link.telemetry import TenantRow
from kvpilot.link.valve_layout import LEASES, ROWS, SUMMARY, VALVE_PAGE_BYTES
from kvpilot.link.valve_page import LeaseEcho
from kvpilot.link.valve_writer import ValvePageWriter

DOC = (Path(__file__).parents[3] / "docs/link.md").read_text()
_TYPE = re.compile(r"(u64|i64|u32|f64|text|bytes)(?:\[(\d+)\])?")


class Table:
    """The table of offsets under a heading of the page (the nth, where it has several)."""

    def __init__(self, heading: str, nth: int = 0) -> None:
        section = re.search(rf"^#+ {heading}\n(.*?)(?=^#+ |\Z)", DOC, re.MULTILINE | re.DOTALL)
        assert section is not None, heading
        tables = re.findall(r"\| offset \|.*?\n\|[-|]+\|\n((?:\|.*\n)+)", section.group(1))
        self.rows: dict[str, tuple[int, str]] = {}
        for line in tables[nth].splitlines():
            offset, type_, name, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            self.rows[name] = (int(offset), type_)

    def offset(self, name: str) -> int:
        return self.rows[name][0]

    def read(self, data: bytes, base: int = 0) -> dict[str, Any]:
        return {
            name: _value(data, base + offset, type_)
            for name, (offset, type_) in self.rows.items()
            if _TYPE.fullmatch(type_)
        }


def _value(data: bytes, offset: int, type_: str) -> Any:
    match = _TYPE.fullmatch(type_)
    assert match is not None, type_
    kind, count = match.group(1), match.group(2)
    if kind in ("text", "bytes"):
        raw = data[offset : offset + int(count)]
        return raw if kind == "bytes" else raw.rstrip(b"\0").decode()
    code = {"u64": "Q", "i64": "q", "u32": "I", "f64": "d"}[kind]
    if count is None:
        return struct.unpack_from(f"<{code}", data, offset)[0]
    return struct.unpack_from(f"<{count}{code}", data, offset)


def frame(data: bytes, offset: int, size: int) -> bytes | None:
    """A frame's bytes if it is whole: the last word is the CRC of all before it."""
    raw = data[offset : offset + size]
    whole = len(raw) == size and zlib.crc32(raw[:-8]) == struct.unpack("<Q", raw[-8:])[0]
    return raw if whole else None


def table_frame(table: Table, data: bytes, offset: int) -> dict[str, Any] | None:
    raw = frame(data, offset, table.offset("crc") + 8)
    return None if raw is None else table.read(raw)


HEADER = Table("Header")
KINDS = {1: "telemetry", 2: "controls", 3: "valve"}


def number(text: str) -> int:
    return int(text.replace(",", ""))


def said(pattern: str) -> int:
    """A number that stands in the page's prose."""
    found = re.search(pattern, DOC)
    assert found is not None, pattern
    return number(found.group(1))


def header(data: bytes, kind: str) -> dict[str, Any]:
    read = HEADER.read(data)
    assert read["magic"] == b"kvpilot\0"
    assert KINDS[read["kind"]] == kind
    assert read["crc"] == zlib.crc32(data[: HEADER.offset("crc")])
    assert read["page_bytes"] == len(data)
    return read


def json_body(data: bytes, read: dict[str, Any]) -> Any:
    start = said(r"The first (\d+) bytes of every page")
    body = data[start : start + read["body_bytes"]]
    assert zlib.crc32(body) == read["body_crc"]
    return json.loads(body)


RING = Table("Ring")


def steps(data: bytes) -> list[dict[str, float]]:
    """Every whole record of the page, oldest first, with its sequence."""
    read = header(data, "telemetry")
    fields = json_body(data, read)["fields"]
    size, count, ring = read["record_bytes"], read["record_count"], read["sections"][0]
    assert size == 8 * (len(fields) + 2)
    body = "<Q" + "".join("Q" if type_ == "u64" else "d" for _, type_, *_ in fields)
    found = []
    for place in range(count):
        raw = frame(data, ring + RING.offset("records") + place * size, size)
        if raw is None:
            continue
        sequence, *values = struct.unpack(body, raw[:-8])
        assert (sequence - 1) % count == place
        found.append({"sequence": sequence} | dict(zip([name for name, *_ in fields], values, strict=True)))
    return sorted(found, key=lambda record: record["sequence"])


@pytest.fixture
def telemetry() -> Telemetry:
    """A page with something in every section."""
    page = Telemetry("time_ns", "duration_ns", "steps_total", "running", "demand_16_p50_blocks")
    page.write(37)
    page.writer.mark_boundary(12_345)
    for level in (0, 1):
        histogram = page.writer.histogram("ttft", level)
        for duration_ns in (10**8, 3 * 10**8, 10**8):
            histogram.record(duration_ns)
        histogram.flush()
    page.writer.histogram("step").record(4_000_000)
    page.writer.histogram("step").flush()
    page.writer.set_class(1, 4, 900)
    page.writer.set_tenant(TenantRow("acme", 3, 2, 40, 50, 60))
    page.writer.write_ending(Ending("exception", 7, 8, "torch.OutOfMemoryError\nw.py:run:7"))
    return page


def test_the_header(telemetry: Telemetry) -> None:
    read = header(bytes(telemetry.buffer), "telemetry")
    assert (read["nonce"], read["host"], read["container"]) == (NONCE, IDENTITY.host, IDENTITY.container)
    assert (read["start_wall_ns"], read["start_monotonic_ns"]) == (IDENTITY.start_wall_ns, 5)
    assert read["sections"][5] == 0


def test_the_manifest_has_the_keys_that_are_told(telemetry: Telemetry) -> None:
    data = bytes(telemetry.buffer)
    body = json_body(data, header(data, "telemetry"))
    section = re.search(r"^### Manifest\n(.*?)^### ", DOC, re.MULTILINE | re.DOTALL)
    assert section is not None
    told = [
        key.strip()
        for row in re.findall(r"^\| ([a-z_, ]+) \|", section.group(1), re.MULTILINE)[1:]
        for key in row.split(",")
    ]
    assert set(told) == set(body)
    knob = re.search(r"objects with (.*?) \|", section.group(1))
    assert knob is not None
    assert set(re.findall(r"`(\w+)`", knob.group(1))) == set(body["knobs"][0])


def test_the_ring(telemetry: Telemetry) -> None:
    data = bytes(telemetry.buffer)
    read = header(data, "telemetry")
    words = {
        name: _value(data, read["sections"][0] + RING.offset(name), "u64") for name in ("head", "boundary_ns")
    }
    assert words == {"head": 37, "boundary_ns": 12_345}
    records = steps(data)
    assert [record["sequence"] for record in records] == list(range(37 - 15, 38))
    assert records[-1] == {
        "sequence": 37,
        "time_ns": 37,
        "duration_ns": 37,
        "steps_total": 37,
        "running": 37,
        "demand_16_p50_blocks": 37.0,
    }


def histogram_place(name: str, level: int) -> int:
    """By the sentence: itl of levels 0 to 7, ttft ..., queue_wait ..., step."""
    order = re.search(r"(\d+) histograms of (\d+) words: (.*?)\.\n", DOC, re.DOTALL)
    assert order is not None
    names = [each for each in ("itl", "ttft", "queue_wait") for _ in range(8)] + ["step"]
    assert re.findall(r"`(\w+)`", order.group(3)) == ["itl", "ttft", "queue_wait", "step"]
    assert len(names) == int(order.group(1))
    return (names.index(name) + level) * int(order.group(2)) * 8


def bucket_start_ns(bucket: int) -> int:
    """As the page has it."""
    e, j = divmod(bucket - 1, 16)
    return 2 ** (e + 16) + j * 2 ** (e + 16 - 4)


def test_histograms(telemetry: Telemetry) -> None:
    data = bytes(telemetry.buffer)
    start, table = header(data, "telemetry")["sections"][1], Table("Histograms")
    for name, level, durations in (
        ("ttft", 1, (10**8, 3 * 10**8, 10**8)),
        ("step", 0, (4_000_000,)),
        ("itl", 0, ()),
    ):
        read = table.read(data, start + histogram_place(name, level))
        assert read["sequence"] == (2 if durations else 0)
        assert read["sum_ns"] == sum(durations)
        assert sum(read["counts"]) == len(durations)
        for duration_ns in durations:
            bucket = next(b for b in range(385, 0, -1) if bucket_start_ns(b) <= duration_ns)
            assert read["counts"][bucket] == durations.count(duration_ns)


def test_bucket_bounds_are_those_of_the_formula() -> None:
    for bucket in range(1, 385):
        assert bucket_bounds_ns(bucket)[0] == bucket_start_ns(bucket)
        assert bucket_index(bucket_start_ns(bucket)) == bucket
    assert (bucket_index(2**16 - 1), bucket_index(2**40)) == (0, 385)


def test_classes_and_tenants(telemetry: Telemetry) -> None:
    data = bytes(telemetry.buffer)
    classes, tenants = header(data, "telemetry")["sections"][2:4]
    table = Table("Classes")
    size = table.offset("crc") + 8
    assert table_frame(table, data, classes) is None
    row = table_frame(table, data, classes + size)
    assert row is not None
    assert (row["sequence"], row["waiting"], row["waiting_prompt_tokens"]) == (1, 4, 900)
    row = table_frame(Table("Tenants"), data, tenants)
    assert row is not None
    assert list(row.values())[:-1] == [1, "acme", 3, 2, 40, 50, 60]
    assert tenants >= classes + 8 * size


def test_counts_by_tenant() -> None:
    page = Telemetry(tenant_columns=("hit", "queried"))
    page.writer.set_tenant(TenantRow("other", 0, 0, 0, 0, 0))
    page.writer.set_tenant(TenantRow("acme", 3, 2, 40, 50, 60))
    page.writer.set_tenant_counts("acme", (7, 9))
    data = bytes(page.buffer)
    read, table = header(data, "telemetry"), Table("Counts")
    columns = json_body(data, read)["tenant_columns"]
    size = table.offset("columns") + 8 * (len(columns) + 1)
    place = read["sections"][5] + size
    assert frame(data, place - size, size) is None
    raw = frame(data, place, size)
    assert raw is not None
    assert _value(raw, table.offset("name"), "text[40]") == "acme"
    counts = [_value(raw, table.offset("columns") + 8 * i, "u64") for i in range(len(columns))]
    assert dict(zip(columns, counts, strict=True)) == {"hit": 7, "queried": 9}


def test_the_ending(telemetry: Telemetry) -> None:
    data = bytes(telemetry.buffer)
    place = header(data, "telemetry")["sections"][4]
    row = table_frame(Table("Ending"), data, place)
    assert row is not None
    assert (row["sequence"], row["kind"], row["at_ns"], row["at_wall_ns"]) == (1, 2, 7, 8)
    assert row["what_bytes"] == len(row["what"])
    assert row["what"].splitlines() == ["torch.OutOfMemoryError", "w.py:run:7"]
    assert table_frame(Table("Ending"), bytes(Telemetry().buffer), Telemetry().plan.ending) is None


def controls(data: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The newest valid table."""
    header(data, "controls")
    slot, entry = Table("Controls page"), Table("Controls page", 1)
    size = said(r"each ([\d,]+) bytes\.")
    places = [said(r"slot 0 at byte ([\d,]+)"), said(r"slot 1 at byte ([\d,]+)")]
    found = []
    for place in places:
        head = slot.read(data, place)
        first = slot.offset("entries")
        end = first + head["count"] * head["entry_bytes"]
        if not head["sequence"] or end > size:
            continue
        covered = data[place : place + slot.offset("crc")] + data[place + first : place + end]
        if zlib.crc32(covered) == head["crc"]:
            entries = range(place + first, place + end, head["entry_bytes"])
            found.append((head, [entry.read(data, at) for at in entries]))
    return max(found, key=lambda each: each[0]["sequence"], default=None)


def test_controls() -> None:
    page = Controls()
    assert controls(bytes(page.page)) is None
    page.writer.write([Lease("max_running", Scope(), 8, 10**9, 1)], NONCE)
    page.writer.write(
        [
            Lease("max_running", Scope(), 8.5, 10**9, 2, 77),
            Lease("shed_fraction", Scope("class_at_most", 3), 0.5, 10**9, 2, order=True),
            Lease("shed_fraction", Scope("tenant", "acme"), 1, 10**9, 2),
        ],
        NONCE,
    )
    read = controls(bytes(page.page))
    assert read is not None
    head, (first, second, third) = read
    assert (head["sequence"], head["nonce"], head["count"]) == (2, NONCE, 3)
    assert first == {
        "knob": "max_running",
        "tenant": "",
        "scope": 1,
        "level": 0,
        "value": 8.5,
        "ttl_ns": 10**9,
        "renewal": 2,
        "decision_id": 77,
    }
    assert (second["scope"], second["level"]) == (2 | 256, 3)
    assert (third["scope"], third["tenant"]) == (3, "acme")
    assert head["entry_bytes"] == said(r"bytes of one entry, (\d+) in this release")
    size = said(r"## Controls page\n\n([\d,]+) bytes")
    assert len(page.page) == size == 256 + 2 * said(r"each ([\d,]+) bytes\.")
    page.writer.write([], NONCE)
    read = controls(bytes(page.page))
    assert read is not None
    assert (read[0]["sequence"], read[1]) == (3, []), "in the other slot"


def test_a_controls_page_written_from_the_page_alone_moves_an_engine() -> None:
    """The other direction: a pilot in another language."""
    slot, entry = Table("Controls page"), Table("Controls page", 1)
    page = Telemetry("time_ns", "duration_ns", "steps_total", "running")
    data = bytearray(4096)
    fixed = bytearray(256)
    fixed[:8] = b"kvpilot\0"
    struct.pack_into("<II", fixed, HEADER.offset("version"), HEADER.read(bytes(page.buffer))["version"], 2)
    struct.pack_into("<Q", fixed, HEADER.offset("page_bytes"), 4096)
    struct.pack_into("<Q", fixed, HEADER.offset("crc"), zlib.crc32(fixed[: HEADER.offset("crc")]))
    data[:256] = fixed
    hook = StepHook(page.manifest, page.writer, lambda _now: bytes(data))

    def write(sequence: int, renewal: int) -> None:
        lease = bytearray(112)
        lease[: len(b"max_running")] = b"max_running"
        for name, code, value in (
            ("scope", "Q", 1),
            ("value", "d", 8.0),
            ("ttl_ns", "Q", 10**9),
            ("renewal", "Q", renewal),
        ):
            struct.pack_into(f"<{code}", lease, entry.offset(name), value)
        head = bytearray(slot.offset("entries"))
        struct.pack_into("<QQII", head, 0, sequence, NONCE, 1, len(lease))
        crc = zlib.crc32(bytes(head[: slot.offset("crc")]) + bytes(lease))
        struct.pack_into("<Q", head, slot.offset("crc"), crc)
        place = (256, 2176)[sequence % 2]
        data[place : place + len(head) + len(lease)] = head + lease

    write(1, 1)
    assert hook.begin_step(0)["max_running"] == 32, "history"
    write(2, 2)
    assert hook.begin_step(10**8)["max_running"] == 8
    assert hook.begin_step(10**8 + 10**9)["max_running"] == 32


def valve_rows(data: bytes) -> dict[str, list[dict[str, Any]]]:
    """The valve's three tables by the columns that its own body names."""
    read = header(data, "valve")
    body = json_body(data, read)
    text_bytes = said(r"`text`\s\((\d+) bytes\)")
    codes = {"u64": "Q", "f64": "d", "text": f"{text_bytes}s"}
    found: dict[str, list[dict[str, Any]]] = {}
    counts = {"summary": 1, "leases": 0, "rows": 0}
    for name, place in zip(("summary", "leases", "rows"), read["sections"], strict=False):
        columns = [column.rsplit(":", 1) for column in body[name]]
        layout = struct.Struct("<Q" + "".join(codes[type_] for _, type_ in columns) + "Q")
        found[name] = []
        for row in range(counts[name]):
            raw = frame(data, place + row * layout.size, layout.size)
            assert raw is not None
            sequence, *values, _crc = layout.unpack(raw)
            named = dict(zip([column for column, _ in columns], values, strict=True))
            found[name].append({"sequence": sequence} | named)
        if name == "summary":
            counts |= {"leases": found[name][0]["leases"], "rows": found[name][0]["rows"]}
    return found


def test_the_valve_page() -> None:
    buffer = bytearray(VALVE_PAGE_BYTES)
    writer = ValvePageWriter(buffer, ("batch", "interactive"), nonce=9, identity=IDENTITY)
    writer.admitted(1, "acme", 500, 10, tokens=100)
    writer.shed(0, "", 40, "credits")
    lease = LeaseEcho("shed_fraction", Scope("class_at_most", 0), 0.25, decision_id=5)
    writer.beat(99, (0.25, 0.0), 3, leases=(lease,))
    tables = valve_rows(bytes(buffer))
    (summary,) = tables["summary"]
    assert (summary["written_ns"], summary["controls_sequence"], summary["fraction.0"]) == (99, 3, 0.25)
    assert math.isnan(summary["credits_left.0"])
    (echo,) = tables["leases"]
    assert echo["sequence"] == summary["lease_table"]
    assert (echo["knob"].rstrip(b"\0"), echo["scope"], echo["value"]) == (b"shed_fraction", 2, 0.25)
    admitted, shed = tables["rows"]
    assert (admitted["tenant"].rstrip(b"\0"), admitted["in_flight"], admitted["admitted_tokens"]) == (
        b"acme",
        1,
        100,
    )
    assert (shed["offered"], shed["shed_credits"]) == (1, 1)


def test_the_valves_columns_are_those_that_are_told() -> None:
    section = re.search(r"^## Valve page\n(.*?)^## ", DOC, re.MULTILINE | re.DOTALL)
    assert section is not None
    told: dict[str, set[str]] = {}
    for table, columns in re.findall(
        r"^\| (summary|leases|rows) \| (.*?) \|", section.group(1), re.MULTILINE
    ):
        for column in columns.split(","):
            first, _, last = column.strip().partition(" to ")
            name, _, to = last.rpartition(".")
            names = [f"{name}.{level}" for level in range(int(to) + 1)] if last else [first]
            told.setdefault(table, set()).update(names)
    for name, columns in (("summary", SUMMARY), ("leases", LEASES), ("rows", ROWS)):
        assert told[name] == {column for column, _ in columns}
