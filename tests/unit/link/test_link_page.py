"""The header that every page begins with."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.link.page import HEADER_BYTES, Identity, LinkError, PageHeader

HEADER = PageHeader("telemetry", 4096, 7, Identity("host", "abc", 1, 2), 100, 5, 64, 16, (256, 512))


def test_round_trip() -> None:
    data = HEADER.pack()
    assert len(data) == HEADER_BYTES
    again = PageHeader.unpack(data, "telemetry")
    assert (again.nonce, again.identity, again.record_count) == (7, HEADER.identity, 16)
    assert again.sections[:2] == (256, 512)


def test_another_version_is_refused_in_one_clear_line() -> None:
    data = bytearray(HEADER.pack())
    struct.pack_into("<I", data, 8, 2)
    with pytest.raises(LinkError, match="format version 2, but this kvpilot knows version 1") as caught:
        PageHeader.unpack(data, "telemetry")
    assert "\n" not in str(caught.value)


def test_another_kind_is_refused() -> None:
    with pytest.raises(LinkError, match="not of kind controls"):
        PageHeader.unpack(HEADER.pack(), "controls")


@pytest.mark.parametrize("data", [b"", b"\0" * HEADER_BYTES, HEADER.pack()[:-1], b"#!/bin/sh\n" * 40])
def test_what_is_no_page_is_refused(data: bytes) -> None:
    with pytest.raises(LinkError, match="not a kvpilot telemetry page"):
        PageHeader.unpack(data, "telemetry")


@given(position=st.integers(12, 215), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(position: int, bit: int) -> None:
    data = bytearray(HEADER.pack())
    data[position] ^= 1 << bit
    with pytest.raises(LinkError):
        PageHeader.unpack(data, "telemetry")


@given(st.text(max_size=200))
def test_any_host_name_fits(host: str) -> None:
    """Names are for people: clipped, never half a character, never an error."""
    header = PageHeader("valve", 1, 1, Identity(host, host, 0, 0))
    shown = PageHeader.unpack(header.pack(), "valve").identity.host
    assert host.startswith(shown) or shown == host.rstrip("\0")
