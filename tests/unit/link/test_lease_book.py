"""The dead man's switch: which leases a reader honours, by its own clock and eyes alone."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from link_pages import NONCE, Controls

from kvpilot.link.controls import SLOT_BYTES, TTL_MAX_NS, Lease, LeaseBook, Scope
from kvpilot.link.page import HEADER_BYTES

NS = 10**9
TTL = 2 * NS


@dataclass
class Scene:
    """A writer, a reader and the reader's clock."""

    controls: Controls = field(default_factory=Controls)
    book: LeaseBook = field(default_factory=lambda: LeaseBook(NONCE))
    renewal: int = 0

    def write(self, *values: float, ttl_ns: int = TTL, nonce: int = NONCE, renew: bool = True) -> None:
        self.renewal += renew
        knobs = ("max_running", "prefill_chunk_tokens")
        self.controls.writer.write(
            [Lease(k, Scope(), v, ttl_ns, self.renewal) for k, v in zip(knobs, values, strict=False)], nonce
        )

    def read(self, now_ns: int) -> list[float]:
        self.book.observe(bytes(self.controls.page), now_ns)
        return self.in_force(now_ns)

    def in_force(self, now_ns: int) -> list[float]:
        return [lease.value for lease in self.book.in_force(now_ns)]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_lease_seen_to_appear_is_honoured_at_once(scene: Scene) -> None:
    assert scene.read(0) == []
    scene.write(8)
    assert scene.read(NS // 10) == [8]


def test_a_lease_found_at_start_is_history_until_renewed(scene: Scene) -> None:
    scene.write(8)
    assert scene.read(0) == []
    assert scene.read(NS) == []
    scene.write(8)
    assert scene.read(NS + 1) == [8]


@pytest.mark.parametrize(("pause_ns", "honoured"), [(TTL, True), (TTL + 1, False), (3600 * NS, False)])
def test_a_lease_found_after_a_pause_longer_than_its_ttl_is_history(
    scene: Scene, pause_ns: int, honoured: bool
) -> None:
    """An engine idle for an hour must not obey a pilot that died an hour ago."""
    scene.read(0)
    scene.write(8)
    assert bool(scene.read(pause_ns)) is honoured
    scene.write(8)
    assert scene.read(pause_ns + NS) == [8]


def test_it_runs_out_one_ttl_after_the_change_was_seen(scene: Scene) -> None:
    scene.read(0)
    scene.write(8)
    scene.read(NS)
    assert scene.book.next_expiry_ns == NS + TTL
    assert scene.read(NS + TTL - 1) == [8]
    assert scene.read(NS + TTL) == []
    assert scene.book.next_expiry_ns is None


def test_reading_the_same_counter_again_renews_nothing(scene: Scene) -> None:
    scene.read(0)
    scene.write(8)
    for now_ns in range(NS, NS + TTL, NS // 10):
        assert scene.read(now_ns) == [8]
    assert scene.read(NS + TTL) == []


def test_a_table_written_again_without_renewal_renews_nothing(scene: Scene) -> None:
    scene.read(0)
    scene.write(8)
    scene.read(1)
    scene.write(8, renew=False)
    assert scene.read(NS) == [8]
    assert scene.read(1 + TTL) == []


def test_no_ttl_is_longer_than_a_minute(scene: Scene) -> None:
    scene.read(0)
    scene.write(8, ttl_ns=2**63)
    assert scene.read(1) == [8]
    assert scene.in_force(TTL_MAX_NS) == [8]
    assert scene.in_force(TTL_MAX_NS + 1) == []


def test_a_lease_no_longer_listed_is_released_at_once(scene: Scene) -> None:
    scene.read(0)
    scene.write(8, 512)
    assert scene.read(1) == [8, 512]
    scene.write(8)
    assert scene.read(2) == [8]


def test_a_foreign_nonce_is_ignored_and_counted_and_leases_run_out(scene: Scene) -> None:
    scene.read(0)
    scene.write(8)
    scene.read(1)
    scene.write(64, nonce=NONCE + 1)
    assert scene.read(2) == [8]
    assert scene.book.ignored["foreign"] == 1
    assert scene.read(1 + TTL) == []


@pytest.mark.parametrize(("reader", "nonce", "obeyed"), [(NONCE, 0, []), (None, 0, [1]), (None, NONCE, [])])
def test_an_engine_does_not_obey_the_valves_table_nor_a_valve_an_engines(
    reader: int | None, nonce: int, obeyed: list[float]
) -> None:
    scene = Scene(book=LeaseBook(reader))
    scene.read(0)
    scene.write(1, nonce=nonce)
    assert scene.read(1) == obeyed


def damaged_twice(page: bytearray) -> bytes:
    """The page with both slots bad, other sequence words and all."""
    page = bytearray(page)
    for slot in (0, 1):
        page[HEADER_BYTES + slot * SLOT_BYTES] ^= 0xFF
    return bytes(page)


@pytest.mark.parametrize("damage", [damaged_twice, lambda page: bytes(page[:100]), lambda page: b""])
def test_while_nothing_can_be_read_leases_run_out(scene: Scene, damage) -> None:
    scene.read(0)
    scene.write(8)
    scene.read(1)
    for now_ns in (NS, 2 * NS):
        scene.book.observe(damage(scene.controls.page), now_ns)
        assert scene.in_force(now_ns) == [8]
    assert scene.book.error is not None
    assert scene.book.ignored["unreadable"] == 1, "a state, counted once"
    assert scene.in_force(1 + TTL) == []


def test_a_lease_first_read_after_an_unreadable_while_is_history(scene: Scene) -> None:
    """What lay there while nobody could look may be old."""
    scene.read(0)
    scene.write(8)
    scene.book.observe(b"", NS)
    assert scene.read(0 + TTL + 1) == []


def test_a_page_of_another_version_is_one_error_and_never_obeyed(scene: Scene) -> None:
    scene.read(0)
    scene.write(8)
    scene.controls.page[8] = 2
    assert scene.read(1) == []
    assert scene.book.error is not None
    assert "version 2" in scene.book.error


def test_falling_back_to_the_older_slot_is_no_renewal(scene: Scene) -> None:
    """The newer slot goes bad after the pilot died: the older one has another counter, and is older."""
    scene.read(0)
    scene.write(8)
    scene.read(1)
    scene.write(9)
    assert scene.read(2) == [9]
    newest = HEADER_BYTES + SLOT_BYTES * (scene.controls.writer.sequence % 2)
    scene.controls.page[newest : newest + 40] = bytes(40)
    assert scene.read(NS) == [9]
    assert scene.read(2 + TTL) == []


@pytest.mark.parametrize("flips", [0x02, 0xF0])
def test_a_slot_that_goes_bad_and_good_again_is_no_renewal(scene: Scene, flips: int) -> None:
    """The pilot is dead; whichever table shows, nobody has renewed anything."""
    scene.read(0)
    for value in (7, 8, 9):
        scene.write(value)
        scene.read(value)
    newest = HEADER_BYTES + SLOT_BYTES * (scene.controls.writer.sequence % 2)
    for half_second in (1, 2, 3):
        scene.controls.page[newest] ^= flips
        assert scene.read(half_second * NS // 2) == [9]
    scene.controls.page[newest] ^= flips
    assert scene.book.sequence == scene.controls.writer.sequence
    assert scene.read(9 + TTL) == []


def test_a_slot_first_whole_long_after_its_sequence_was_seen_is_history(scene: Scene) -> None:
    """Its pilot may have died writing it: when it was written nobody saw."""
    scene.read(0)
    scene.write(8)
    scene.read(1)
    scene.write(9)
    newest = HEADER_BYTES + SLOT_BYTES * (scene.controls.writer.sequence % 2)
    scene.controls.page[newest + 9] ^= 1
    for tenth in range(1, 40):
        scene.read(tenth * NS // 10)
    scene.controls.page[newest + 9] ^= 1
    assert scene.read(4 * NS) == []
    scene.write(9)
    assert scene.read(4 * NS + 1) == [9]


@pytest.mark.parametrize("earlier", [3, 4, 100])
def test_a_writer_that_began_anew_is_obeyed_from_its_second_renewal(scene: Scene, earlier: int) -> None:
    """Its page was replaced: its count starts at 1 again."""
    for now_ns in range(earlier):
        scene.write(8)
        scene.read(now_ns)
    scene.controls = Controls()
    scene.write(9)
    assert scene.read(earlier) == [8]
    scene.write(9)
    assert scene.read(earlier + 1) == [9]


def test_a_slot_whose_sequence_lands_first_is_read_once_it_is_whole(scene: Scene) -> None:
    """As on a machine that reorders stores: the old table holds until the new one's CRC does."""
    scene.read(0)
    scene.write(8)
    assert scene.read(1) == [8]
    before = bytes(scene.controls.page)
    scene.write(9)
    after = bytes(scene.controls.page)
    slot = HEADER_BYTES + SLOT_BYTES * (scene.controls.writer.sequence % 2)
    scene.controls.page[slot + 8 : slot + SLOT_BYTES] = before[slot + 8 : slot + SLOT_BYTES]
    assert scene.read(2) == [8]
    scene.controls.page[:] = after
    assert scene.read(3) == [9]


def test_a_page_that_was_never_written_is_no_error(scene: Scene) -> None:
    scene.read(0)
    assert scene.book.error is None
    assert scene.book.ignored.total() == 0


@given(st.binary(max_size=5000), st.binary(max_size=5000))
def test_no_bytes_raise_or_are_obeyed(first: bytes, second: bytes) -> None:
    book = LeaseBook(NONCE)
    book.observe(first, 0)
    book.observe(second, 1)
    assert book.in_force(1) == []


class DeadMansSwitch(RuleBasedStateMachine):
    """Whatever the order of writes, reads, pauses and damage: silence ends in baseline.

    The model knows what the book does not: when the writer last renewed the lease, or listed it anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene()
        self.now_ns = 0
        self.renewed_ns: int | None = None
        self.listed = False

    @rule(value=st.integers(1, 9))
    def renew(self, value: int) -> None:
        self.scene.write(value)
        self.renewed_ns = self.now_ns
        self.listed = True

    @rule(value=st.integers(1, 9))
    def write_without_renewing(self, value: int) -> None:
        self.scene.write(value, renew=False)
        if not self.listed:
            self.renewed_ns = self.now_ns
        self.listed = True

    @rule()
    def write_for_another_engine(self) -> None:
        self.scene.write(7, nonce=NONCE + 1)
        self.listed = False

    @rule(slot=st.integers(0, 1))
    def damage(self, slot: int) -> None:
        self.scene.controls.page[HEADER_BYTES + slot * SLOT_BYTES + 9] ^= 1

    @rule(seconds=st.sampled_from([0.01, 0.1, 1.0, 1.9, 2.0, 2.1, 60.0, 3600.0]))
    def wait(self, seconds: float) -> None:
        self.now_ns += round(seconds * NS)

    @rule()
    def read(self) -> None:
        self.scene.read(self.now_ns)

    @invariant()
    def silence_ends_in_baseline(self) -> None:
        """No lease outlives its last renewal by more than the time until it was read (a ttl) and a ttl."""
        if self.scene.in_force(self.now_ns):
            assert self.renewed_ns is not None
            assert self.now_ns - self.renewed_ns < 2 * TTL

    @invariant()
    def the_next_expiry_is_known(self) -> None:
        book = self.scene.book
        in_force = self.scene.in_force(self.now_ns)
        assert (book.next_expiry_ns is None) == (not in_force)
        assert book.next_expiry_ns is None or self.now_ns < book.next_expiry_ns <= self.now_ns + TTL


TestDeadMansSwitch = DeadMansSwitch.TestCase
