"""The controls page: two slots, of which the reader always finds a whole one if there is one."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from link_pages import IDENTITY, NONCE, Controls

from kvpilot.link.controls import (
    CONTROLS_BYTES,
    MAX_LEASES,
    SLOT_BYTES,
    ControlsWriter,
    Lease,
    Scope,
    decode_slot,
    encode_slot,
    newest_slot,
)
from kvpilot.link.page import HEADER_BYTES, LinkError

NAMES = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=32)
SCOPES = st.one_of(
    st.just(Scope()),
    st.integers(0, 7).map(lambda level: Scope("class_at_most", level)),
    NAMES.map(lambda name: Scope("tenant", name)),
)
LEASES = st.builds(
    Lease,
    knob=NAMES,
    scope=SCOPES,
    value=st.floats(allow_nan=False, allow_infinity=False),
    ttl_ns=st.integers(1, 2**64 - 1),
    renewal=st.integers(0, 2**64 - 1),
    decision_id=st.integers(0, 2**64 - 1),
    order=st.booleans(),
)
LEASE = Lease("max_running", Scope(), 8.0, 10**9, 1, 42)


@given(st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1), st.lists(LEASES, max_size=MAX_LEASES))
def test_round_trip(sequence: int, nonce: int, leases: list[Lease]) -> None:
    data = encode_slot(sequence, nonce, leases)
    assert len(data) <= SLOT_BYTES
    assert decode_slot(data) == (sequence, nonce, tuple(leases), 0)


@given(st.data())
def test_a_damaged_slot_is_never_believed(data: st.DataObject) -> None:
    slot = bytearray(encode_slot(3, NONCE, [LEASE, LEASE]))
    slot[data.draw(st.integers(0, len(slot) - 1))] ^= data.draw(st.integers(1, 255))
    assert decode_slot(slot) is None


@given(st.integers(0, 255))
def test_a_truncated_slot_is_never_believed(size: int) -> None:
    slot = encode_slot(3, NONCE, [LEASE, LEASE])
    assert decode_slot(slot[: min(size, len(slot) - 1)]) is None


def test_the_writer_fills_the_older_slot() -> None:
    """So a writer killed in the middle of a table leaves the one before it whole."""
    controls = Controls()
    for n in range(1, 6):
        controls.writer.write([LEASE], NONCE)
        torn = bytearray(controls.page)
        start = HEADER_BYTES + SLOT_BYTES * (n % 2)
        torn[start + 20 : start + SLOT_BYTES] = b"\xaa" * (SLOT_BYTES - 20)
        slot = newest_slot(torn)
        assert (slot.sequence if slot else 0) == n - 1


def test_both_slots_bad_is_no_table() -> None:
    controls = Controls()
    controls.writer.write([LEASE], NONCE)
    controls.writer.write([LEASE], NONCE)
    for slot in (0, 1):
        controls.page[HEADER_BYTES + slot * SLOT_BYTES + 40] ^= 1
    assert newest_slot(controls.page) is None


def test_a_second_writer_goes_on_counting() -> None:
    """A sequence that began anew would look like damage to readers."""
    controls = Controls()
    controls.writer.write([LEASE], NONCE)
    controls.writer.write([LEASE], NONCE)
    controls.writer.close()
    assert ControlsWriter(controls.page, IDENTITY).write([], NONCE) == 3
    assert newest_slot(controls.page) == (3, NONCE, (), 0)


@pytest.mark.parametrize(
    "leases",
    [
        [LEASE] * (MAX_LEASES + 1),
        [Lease("k" * 33, Scope(), 1, 1, 1)],
        [Lease("k", Scope("tenant", "t" * 33), 1, 1, 1)],
    ],
    ids=["too many", "long knob", "long tenant"],
)
def test_leases_that_do_not_fit_leave_the_page_as_it_was(leases: list[Lease]) -> None:
    controls = Controls()
    controls.writer.write([LEASE], NONCE)
    before = bytes(controls.page)
    with pytest.raises(LinkError, match="at most"):
        controls.writer.write(leases, NONCE)
    assert controls.page == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_ignored_and_counted(value: float) -> None:
    slot = decode_slot(encode_slot(1, NONCE, [Lease("max_running", Scope(), value, 10**9, 1), LEASE]))
    assert slot is not None
    assert (slot.leases, slot.ignored) == ((LEASE,), 1)


def test_scopes_of_a_newer_release_are_ignored_and_counted() -> None:
    data = bytearray(encode_slot(1, NONCE, [LEASE]))
    struct.pack_into("<Q", data, 32 + 64, 9)
    assert decode_slot(_sealed(data)) == (1, NONCE, (), 1)


def test_entries_that_grew_at_their_end_are_read_up_to_what_we_know() -> None:
    old = encode_slot(1, NONCE, [LEASE, LEASE])
    entry = (len(old) - 32) // 2
    grown = b"".join(old[32 + i * entry : 32 + (i + 1) * entry] + b"\x07" * 16 for i in range(2))
    data = bytearray(old[:32] + grown)
    struct.pack_into("<I", data, 20, entry + 16)
    assert decode_slot(_sealed(data)) == (1, NONCE, (LEASE, LEASE), 0)


def _sealed(data: bytearray) -> bytearray:
    struct.pack_into("<Q", data, 24, zlib.crc32(data[32:], zlib.crc32(data[:24])))
    return data


def test_the_page_is_one_page_of_memory() -> None:
    """An engine copies it at every step boundary."""
    assert CONTROLS_BYTES == 4096
