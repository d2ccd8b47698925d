"""The ring of ended requests: round trip, wrap, torn records; how far prefix hashes tell prompts apart."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from link_pages import IDENTITY, NONCE, Telemetry

from kvpilot.link.page import LinkError
from kvpilot.link.requests import (
    PREFIX_DEPTHS,
    REQUEST_COLUMNS,
    EndedRequest,
    prefix_hashes,
    request_frame,
    ring_bytes,
)
from kvpilot.link.telemetry import TelemetryReader, TelemetryWriter, plan_page

RECORDS = 8


def ring() -> tuple[bytearray, TelemetryWriter, TelemetryReader]:
    manifest = replace(Telemetry().manifest, request_columns=REQUEST_COLUMNS, request_records=RECORDS)
    buffer = bytearray(plan_page(manifest, 4).page_bytes)
    writer = TelemetryWriter(buffer, manifest, nonce=NONCE, identity=IDENTITY, record_count=4)
    return buffer, writer, TelemetryReader(lambda offset, size: bytes(buffer[offset : offset + size]))


def request(number: int, prefix: tuple[int, ...] = ()) -> EndedRequest:
    return EndedRequest("acme", 100 + number, 200, 300, 1, number, 7, "finished", 2, prefix)


def test_requests_come_back_once_and_in_order() -> None:
    _, writer, reader = ring()
    told = [request(1, (5, 6)), request(2)._replace(fate="cancelled", first_ns=0), request(3)]
    for one in told:
        writer.add_request(one)
    assert reader.requests() == told
    assert reader.requests() == []


@given(st.integers(0, 40))
def test_a_lapped_reader_gets_the_newest(count: int) -> None:
    _, writer, reader = ring()
    for number in range(count):
        writer.add_request(request(number))
    got = [one.prompt_tokens for one in reader.requests()]
    assert got == list(range(max(0, count - RECORDS), count))


def test_a_torn_record_is_left_out() -> None:
    buffer, writer, reader = ring()
    writer.add_request(request(1))
    writer.add_request(request(2))
    size = request_frame(REQUEST_COLUMNS).size
    buffer[len(buffer) - ring_bytes(REQUEST_COLUMNS, RECORDS) + 64 + size + 60] ^= 0xFF
    assert [one.prompt_tokens for one in reader.requests()] == [1]


def test_an_engine_without_the_ring_tells_none() -> None:
    page = Telemetry()
    page.writer.add_request(request(1))
    assert page.reader.requests() == []


def test_a_ring_beyond_the_page_is_refused() -> None:
    manifest = replace(Telemetry().manifest, request_columns=("a",) * 65, request_records=RECORDS)
    with pytest.raises(LinkError, match="65 columns of requests"):
        plan_page(manifest, 4)


@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=300), st.integers(1, 300), st.integers(0, 99))
def test_hashes_agree_exactly_as_far_as_prompts_do(prompt: list[int], shared: int, seed: int) -> None:
    other = [*prompt[:shared], *(token + 1 for token in prompt[shared:])]
    ours, theirs = (prefix_hashes(one, 4, b"salt", "acme") for one in (prompt, other))
    for depth, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        assert (one == two) == (4 << depth <= shared or prompt[: 4 << depth] == other[: 4 << depth])
    assert len(ours) == sum(4 << depth <= len(prompt) for depth in range(PREFIX_DEPTHS))
    assert not set(ours) & set(prefix_hashes(prompt, 4, b"salt", "globex"))
    assert not set(ours) & set(prefix_hashes(prompt, 4, random.Random(seed).randbytes(16), "acme"))
